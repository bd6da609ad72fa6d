"""The chunk loop of the linear KL: GEMM -> row pass -> GEMM, common to every backend.

Tokens are cut into chunks; per chunk the raw logits of student and teacher are made in float32
(float64 for float64 inputs) in two buffers that are reused, a *row pass* turns them into the
divergence of each row and, in place, the gradient G by the raw logits, and two GEMMs turn G into a
slice of dX and a contribution to dW. What lives at once is bounded by ``chunk_tokens * V``, never
by ``N * V``; dX and dW come from separate GEMMs, so results repeat bit by bit.

Chunks are counted in tokens, not derived from V / H: 1024 rows fill a big GPU in the dX GEMM, and a
trainable head wants more because its float32 dW is read and written once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.ops.gemms import TORCH_GEMMS, Gemms, has_mixed_gemm, logit_rows
from es2fast.ops.linear_kl.rows import KLSpec, row_divergence
from es2fast.ops.tokens import PackedTokens


@dataclass(frozen=True)
class KLProblem(PackedTokens):
    """One call, checked: what a backend gets. Weights are already cut to the real vocabulary."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    teacher_hidden: Tensor  # (N, Ht)
    teacher_weight: Tensor | None  # (V, Ht); None: shared with the student
    teacher_bias: Tensor | None  # (V,)
    index: Tensor | None  # (M,) rows that count; None: all
    scale: Tensor  # (M,) factor of each row's gradient, in the accumulation dtype
    spec: KLSpec
    chunk_tokens: int
    fused: bool  # the caller left the chunk to the backend, which may do without one
    need_dx: bool
    need_dw: bool
    need_db: bool

    @property
    def need_grad(self) -> bool:
        return self.need_dx or self.need_dw or self.need_db

    @property
    def is_delta(self) -> bool:
        """Shared full-precision head: the student's side is W (h_s - h_t), free of cancellation."""
        full = self.hidden.dtype in (torch.float32, torch.float64)
        return self.teacher_weight is None and full


@dataclass
class KLResult:
    """Row divergences of the packed tokens and the gradients asked for (already scaled)."""

    rows: Tensor  # (M,)
    dx: Tensor | None = None  # (N, H) in saved_dtype
    dw: Tensor | None = None  # (V, H) in the accumulation dtype
    db: Tensor | None = None  # (V,) in the accumulation dtype


@dataclass
class RowGradient:
    """G of one chunk. ``unit`` undoes a common factor, ``row_unit`` one per row (float16 only)."""

    g: Tensor  # (C, V)
    unit: Tensor | None = None  # ()
    row_unit: Tensor | None = None  # (C, 1)


# (raw teacher logits, raw student logits or delta, row scale, problem) -> (rows, gradient)
RowPass = Callable[[Tensor, Tensor, Tensor, KLProblem], tuple[Tensor, RowGradient | None]]


def run_chunked(problem: KLProblem, row_pass: RowPass, gemms: Gemms = TORCH_GEMMS) -> KLResult:
    """Divergence of every packed row and the gradients asked for."""
    p, acc = problem, problem.accum_dtype
    (vocab, width), device = p.weight.shape, p.hidden.device
    chunk = max(1, min(p.chunk_tokens, p.rows))
    raw_t = logit_rows(chunk, vocab, acc, device)
    raw_s = logit_rows(chunk, vocab, acc, device)
    result = KLResult(torch.empty(p.rows, dtype=acc, device=device))
    if p.need_dx:
        result.dx = p.empty_dx()
    if p.need_dw:
        result.dw = torch.empty(vocab, width, dtype=acc, device=device)
    if p.need_db:
        result.db = torch.zeros(vocab, dtype=acc, device=device)
    for start in range(0, p.rows, chunk):
        stop = min(start + chunk, p.rows)
        x = p.take(p.hidden, start, stop)
        zt, zs = raw_t[: stop - start], raw_s[: stop - start]
        _chunk_logits(p, gemms, x, start, stop, zt, zs)
        result.rows[start:stop], gradient = row_pass(zt, zs, p.scale[start:stop], p)
        if gradient is not None:
            _chunk_gradients(p, gemms, result, gradient, x, start, stop)
    if p.rows == 0:
        for grad in (result.dx, result.dw):
            if grad is not None:
                grad.zero_()
    return result


def _chunk_logits(
    p: KLProblem, gemms: Gemms, x: Tensor, start: int, stop: int, zt: Tensor, zs: Tensor
) -> None:
    x_t = p.take(p.teacher_hidden, start, stop)
    gemms.logits_into(x_t, p.weight if p.teacher_weight is None else p.teacher_weight, zt)
    gemms.logits_into(x - x_t if p.is_delta else x, p.weight, zs)


def _chunk_gradients(
    p: KLProblem,
    gemms: Gemms,
    result: KLResult,
    gradient: RowGradient,
    x: Tensor,
    start: int,
    stop: int,
) -> None:
    g, unit, row_unit = gradient.g, gradient.unit, gradient.row_unit
    if result.dx is not None:
        dx = gemms.input_gradient(g, p.weight, p.accum_dtype)
        dx = dx if row_unit is None else dx.mul_(row_unit)
        p.put(result.dx, start, stop, dx if unit is None else dx.mul_(unit))
    if result.dw is not None:
        x = x if row_unit is None else (x * row_unit).to(x.dtype)
        gemms.add_weight_gradient(result.dw, g, x, start == 0)
        if unit is not None and stop == p.rows:
            result.dw.mul_(unit)
    if result.db is not None:
        wide = g if row_unit is None else g * row_unit
        db = wide.sum(0, dtype=result.db.dtype)
        result.db.add_(db if unit is None else db * unit)


def torch_row_pass(
    zt: Tensor, zs: Tensor, scale: Tensor, p: KLProblem
) -> tuple[Tensor, RowGradient | None]:
    """The row pass in plain torch. G is rounded to bfloat16 only where a bfloat16 GEMM follows."""
    shared = p.teacher_weight is None
    bias_t = p.bias if shared else p.teacher_bias
    if bias_t is not None:
        zt.add_(bias_t.to(zt.dtype))
    if p.bias is not None and not p.is_delta:
        zs.add_(p.bias.to(zs.dtype))
    rows, g = row_divergence(zt, zs, p.spec, p.is_delta, p.need_grad)
    if g is None:
        return rows, None
    g.mul_(scale[:, None])
    half = has_mixed_gemm(g) and p.hidden.dtype == torch.bfloat16
    return rows, RowGradient(g.to(torch.bfloat16) if half else g)


def run_torch(problem: KLProblem) -> KLResult:
    """The ``torch`` backend: any device, any floating dtype."""
    return run_chunked(problem, torch_row_pass)
