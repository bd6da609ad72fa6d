"""The ``native`` backend of the moment KL: the chunk loop with csrc's row pass and GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from es2fast.ops import native
from es2fast.ops.moments.chunked import MomentProblem, run_moments


def moment_row_pass(
    zs: Tensor, row_gain: Tensor, top_ids: Tensor, top_probs: Tensor, p: MomentProblem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The row pass (contract in moments.chunked), G in bfloat16 for a bfloat16 GEMM."""
    half = native.HAS_GEMM_BF16 and p.weight.dtype == torch.bfloat16
    row_max, row_sum = torch.ops.es2fast.native_moment_rows(
        zs,
        row_gain.contiguous(),
        native.as_float(p.bias),
        p.gain,
        top_ids.contiguous(),
        top_probs.contiguous(),
        p.need_dx,
        half,
    )
    if not p.need_dx:
        return row_max, row_sum, None
    return row_max, row_sum, native.packed_half(zs) if half else zs


def run_native(problem: MomentProblem) -> tuple[Tensor, Tensor | None]:
    """The ``native`` backend."""
    return run_moments(problem, moment_row_pass, native.NATIVE_GEMMS)
