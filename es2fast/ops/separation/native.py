"""The ``native`` backend of the separation losses: the tile loop with csrc's passes and GEMMs.

Per tile of the n x m matrix: one GEMM, one sweep that turns it into squared distances and notes the
close pairs, one that turns those into losses and the gradient's coefficients, two GEMMs. Few pairs,
as in a training step, take one pass over the differences for the losses and one for the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from es2fast.ops.separation.chunked import (
    CLOSE,
    KIND,
    LOG_FLOOR,
    Distances,
    PairProblem,
    PairResult,
    PairSpec,
    RowBlock,
    TileWork,
    run_tiles,
)

FEW_PAIRS = 64 * 64  # up to here the differences themselves are quicker than GEMMs
FEW_ROWS = 256  # of b, as in csrc/kernels.h


def _distances(a: RowBlock, b: RowBlock, tile: Tensor) -> Distances:
    torch.ops.es2fast.native_gemm_nt(a.x, b.x, tile)
    close = torch.ops.es2fast.native_pair_distances(tile, a.sq, b.sq, CLOSE)
    return tile, (close[0], close[1]) if close.shape[1] else None


def _pair_pass(d2: Tensor, u: Tensor, v: Tensor, spec: PairSpec, need_grad: bool) -> Tensor:
    return torch.ops.es2fast.native_pair_rows(
        d2, u, v, KIND[spec.kind], spec.margin, spec.scale, LOG_FLOOR, need_grad
    )


def _product(out: Tensor, c: Tensor, x: Tensor, add: bool) -> None:
    torch.ops.es2fast.native_gemm_nn(c, x, out, add)


NATIVE_TILE = TileWork(_distances, _pair_pass, _product)


def _run_few(p: PairProblem) -> PairResult:
    """Without GEMMs: exact differences, one pass for the losses and one for the gradients."""
    values, da, db = torch.ops.es2fast.native_few_pairs(
        p.a, p.b, p.u, p.v, KIND[p.spec.kind], p.spec.margin, p.spec.scale, LOG_FLOOR,
        p.need_da, p.need_db,
    )  # fmt: skip
    return PairResult(values.sum(), da if p.need_da else None, db if p.need_db else None)


def run_native(problem: PairProblem) -> PairResult:
    """The ``native`` backend."""
    n, m = problem.a.shape[0], problem.b.shape[0]
    if 0 < n * m <= FEW_PAIRS and m <= FEW_ROWS and problem.chunk_rows is None:
        return _run_few(problem)
    return run_tiles(problem, NATIVE_TILE)
