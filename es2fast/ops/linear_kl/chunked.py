"""The chunk loop of the linear KL: GEMM -> row pass -> GEMM, common to every backend.

Tokens are cut into chunks; per chunk the raw logits of student and teacher are made in float32
(float64 for float64 inputs) in two buffers that are reused, a *row pass* turns them into the
divergence of each row and, in place, the gradient G by the raw logits, and two GEMMs turn G into a
slice of dX and a contribution to dW. What lives at once is bounded by ``chunk_tokens * V``, never
by ``N * V``; dX and dW come from separate GEMMs, so results repeat bit by bit.

Chunks are counted in tokens, not derived from V / H: 1024 rows fill a big GPU in the dX GEMM, and a
trainable head wants more because its float32 dW is read and written once per chunk.

GEMMs accumulate and return float32: on CUDA by ``torch.mm`` and ``torch.addmm`` with ``out_dtype``
(a float32 ``dw`` there needs torch 2.10), elsewhere by upcasting a block of the weight at a time.
Outputs are written in place: their inner stride is 1, so cuBLAS takes the padded row pitch as its
leading dimension and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.ops.linear_kl.rows import KLSpec, row_divergence

UPCAST_ROWS = 4096  # weight rows upcast at a time where no mixed-precision GEMM exists
LINE = 128  # logit rows start at multiples of this many elements, so that odd V stay aligned


class PackedTokens:
    """Tokens of which ``index`` count, each with the factor ``scale``."""

    hidden: Tensor  # (N, H)
    index: Tensor | None  # (M,) rows that count; None: all
    scale: Tensor  # (M,) factor of each row's gradient, in the accumulation dtype

    @property
    def rows(self) -> int:
        return self.scale.shape[0]

    @property
    def accum_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def saved_dtype(self) -> torch.dtype:
        """What dX is kept in until backward: float16 would lose it before grad_output scales it."""
        return torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the packed tokens of ``tensor``, contiguous."""
        if self.index is None:
            return tensor[start:stop].contiguous()
        return tensor.index_select(0, self.index[start:stop])

    def empty_dx(self) -> Tensor:
        """(N, H) for dX; zero where a token does not count."""
        make = torch.empty if self.index is None else torch.zeros
        return make(self.hidden.shape, dtype=self.saved_dtype, device=self.hidden.device)

    def put(self, dx: Tensor, start: int, stop: int, rows: Tensor) -> None:
        """Write the packed rows ``start:stop`` of dX."""
        if self.index is None:
            dx[start:stop] = rows
        else:
            dx.index_copy_(0, self.index[start:stop], rows.to(dx.dtype))


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


def has_mixed_gemm(x: Tensor) -> bool:
    """Whether 16-bit matrices multiply into float32 where ``x`` lives (cuBLAS does)."""
    return x.is_cuda


def logits_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x @ weight.T`` with the accumulator's precision kept in ``out``."""
    if x.dtype == out.dtype == weight.dtype:
        torch.mm(x, weight.t(), out=out)
    elif has_mixed_gemm(x) and x.dtype == weight.dtype:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        x = x.to(out.dtype)
        for v in range(0, weight.shape[0], UPCAST_ROWS):
            block = weight[v : v + UPCAST_ROWS].to(out.dtype)
            torch.mm(x, block.t(), out=out[:, v : v + UPCAST_ROWS])


def input_gradient(g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``g @ weight`` in ``dtype``."""
    if g.dtype == weight.dtype == dtype:
        return torch.mm(g, weight)
    if has_mixed_gemm(g) and g.dtype == weight.dtype:
        return torch.mm(g, weight, out_dtype=dtype)
    dx = torch.zeros(g.shape[0], weight.shape[1], dtype=dtype, device=g.device)
    for v in range(0, weight.shape[0], UPCAST_ROWS):
        block = weight[v : v + UPCAST_ROWS].to(dtype)
        dx.addmm_(g[:, v : v + UPCAST_ROWS].to(dtype), block)
    return dx


def add_weight_gradient(dw: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
    """``dw += g.T @ x`` (``=`` for the first chunk) in dw's dtype."""
    beta = 0 if first else 1
    if g.dtype == x.dtype == dw.dtype:
        torch.addmm(dw, g.t(), x, beta=beta, out=dw)
    elif has_mixed_gemm(g) and g.dtype == x.dtype:
        torch.addmm(dw, g.t(), x, out_dtype=dw.dtype, beta=beta, out=dw)
    else:
        x = x.to(dw.dtype)
        for v in range(0, dw.shape[0], UPCAST_ROWS):
            part = g[:, v : v + UPCAST_ROWS].to(dw.dtype)
            block = dw[v : v + UPCAST_ROWS]
            torch.addmm(block, part.t(), x, beta=beta, out=block)


@dataclass(frozen=True)
class Gemms:
    """The three products of the chunk loop; each keeps its accumulator's precision."""

    logits_into: Callable[[Tensor, Tensor, Tensor], None]
    input_gradient: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor, bool], None]


TORCH_GEMMS = Gemms(logits_into, input_gradient, add_weight_gradient)


def run_chunked(problem: KLProblem, row_pass: RowPass, gemms: Gemms = TORCH_GEMMS) -> KLResult:
    """Divergence of every packed row and the gradients asked for."""
    p, acc = problem, problem.accum_dtype
    (vocab, width), device = p.weight.shape, p.hidden.device
    chunk = max(1, min(p.chunk_tokens, p.rows))
    pitch = -(-vocab // LINE) * LINE
    raw_t = torch.empty(chunk, pitch, dtype=acc, device=device)
    raw_s = torch.empty(chunk, pitch, dtype=acc, device=device)
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
        zt, zs = raw_t[: stop - start, :vocab], raw_s[: stop - start, :vocab]
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
