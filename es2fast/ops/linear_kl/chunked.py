"""The chunk loop of the linear KL: GEMM -> row pass -> GEMM, common to every backend.

Tokens are cut into chunks; per chunk the raw logits of student and teacher are made in float32
(float64 for float64 inputs) in two buffers that are reused, a *row pass* turns them into the
divergence of each row and the gradient G by the raw logits, and two GEMMs turn G into dX and dW,
which come apart from each other, so that results repeat bit by bit.

Chunks are counted in tokens, not derived from V / H: 1024 rows fill a big GPU in the dX GEMM.

dW waits: G is kept for as many rows as a byte budget holds (:func:`buffered_rows`), by default that
of the float32 dW which is not needed then. Where all rows fit, and with a 16-bit G that is up to
N = 2H, dW is one GEMM with k = N straight to the weight's dtype. Above, it is one GEMM per buffer,
added up in float32; by default the buffer is then half as large, so that with 16-bit weights the
peak is that of a float32 dW and its copy, 6VH bytes, in every case. Where it would hold less than
two chunks, each chunk has its GEMM. So what lives at once is bounded by ``chunk_tokens * V`` and
the budget, never by ``N * V``.

A 16-bit G is rounded, which averages out over tokens. Where few tokens decide the gradient it does
not, and their bfloat16 G is then the sum of two (``KLProblem.exact``; :func:`few_decide` is the
rule, :func:`deciding_first` says which tokens those are). They come first, and the second GEMM has
their rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from es2fast.ops.gemms import TORCH_GEMMS, Gemms, has_mixed_gemm
from es2fast.ops.linear_kl.rows import KLSpec, base_and_difference, row_divergence
from es2fast.ops.scratch import Scratch, logit_rows
from es2fast.ops.tokens import PackedTokens, saved_dtype

# Below this many deciding tokens a bfloat16 G has two parts. One part errs by at most 0.29 % in a
# gradient over sweeps at 64 tokens and more, by 0.42 % with three (bound: 0.4 %).
FEW_TOKENS = 64


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
    fused: bool  # no logits are to be stored, where the backend can do so and nothing needs them
    need_dx: bool
    need_dw: bool
    need_db: bool
    exact: bool = False  # a bfloat16 G has two parts
    exact_rows: int | None = None  # of so many leading rows, where there is no dW; None: of all
    buffer_bytes: int | None = None  # for G of a head that trains; None: those of a float32 dW

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
    dw: Tensor | None = None  # (V, H) in the accumulation dtype, or rounded once to what is saved
    db: Tensor | None = None  # (V,) in the accumulation dtype


@dataclass
class RowGradient:
    """G of one chunk. ``unit`` undoes a common factor, ``row_unit`` one per row (float16 only)."""

    g: Tensor  # (C, V)
    low: Tensor | None = None  # (C or fewer, V) what rounding to bfloat16 took from G, in bfloat16
    unit: Tensor | None = None  # ()
    row_unit: Tensor | None = None  # (C, 1)


# (raw teacher logits, raw student logits or delta, row scale, where G goes, problem) -> (rows,
# gradient). The place is None, for one of the backend's own, or where G waits; a G as wide as the
# logits waits where the student's logits are.
RowPass = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, KLProblem], tuple[Tensor, RowGradient | None]
]


@dataclass(frozen=True)
class RowBackend:
    """What differs between the backends of the chunk loop."""

    row_pass: RowPass
    gradient_dtype: Callable[[KLProblem], torch.dtype]  # of G
    gemms: Gemms = TORCH_GEMMS


def few_decide(weights: Tensor) -> bool:
    """Whether fewer than ``FEW_TOKENS`` tokens make most of a gradient's L2 norm, by their weights.

    Token i adds w_i^2 to the squared norm, so the number that decides it is that of equal shares
    which are as uneven: (sum w^2)^2 / sum w^4. Synchronises when the weights are on a GPU.
    """
    shares = weights.double().square()
    shares = shares / shares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return bool(shares.square().sum() * FEW_TOKENS > 1)


def deciding_first(weights: Tensor) -> tuple[Tensor, int]:
    """An order of the tokens, and how many of the first ones need a G of two parts.

    Of so many that fewer than ``FEW_TOKENS`` do not decide the others, or that these have at most
    half of the squared norm: one part then errs by at most 0.42 % / sqrt(2) = 0.3 % of the whole.

    Args:
        weights: (M,), not all zero. Synchronises when they are on a GPU.
    """
    shares, order = weights.double().square().sort(descending=True, stable=True)
    shares = shares / shares.sum()
    squares = shares.square()

    def rest(x: Tensor) -> Tensor:  # without the first 0, 1, .. M
        return torch.cat([x.flip(0).cumsum(0).flip(0), x.new_zeros(1)])

    enough = (rest(shares) <= 0.5) | (rest(squares) * FEW_TOKENS <= rest(shares).square())
    return order, int(enough.int().argmax())


def buffered_rows(p: KLProblem, dtype: torch.dtype, chunk: int) -> int:
    """Rows of G that are kept for one dW GEMM: all, whole chunks, or 0 (each chunk has its own)."""
    if not p.need_dw or (p.exact and dtype == torch.bfloat16):
        return 0
    vocab, width = p.weight.shape
    budget = 4 * vocab * width if p.buffer_bytes is None else p.buffer_bytes
    rows = budget // (vocab * dtype.itemsize)
    if rows >= p.rows:
        return p.rows
    if p.buffer_bytes is None:
        rows //= 2
    return rows - rows % chunk if rows >= 2 * chunk else 0


@dataclass
class _HeadGradient:
    """dW of the rows that have passed, and the G of those that still wait."""

    p: KLProblem
    gemms: Gemms
    buffer: Tensor | None  # (R, V), R rows or fewer pass between two GEMMs; None: G does not wait
    dw: Tensor | None = None
    first: int = 0  # of the rows that wait
    row_units: list[Tensor] = field(default_factory=list)
    unit: Tensor | None = None

    def place(self, start: int, stop: int) -> Tensor | None:
        """Where G of rows start:stop goes."""
        return None if self.buffer is None else self.buffer[start - self.first : stop - self.first]

    def add(self, gradient: RowGradient, x: Tensor, start: int, stop: int) -> None:
        """Take G of rows start:stop, whose hidden states are x."""
        self.unit = gradient.unit
        if self.buffer is None:
            x = x if gradient.row_unit is None else (x * gradient.row_unit).to(x.dtype)
            self._accumulate(gradient.g, x, start == 0)
            if gradient.low is not None:
                self._accumulate(gradient.low, x, False)
            return
        if gradient.row_unit is not None:
            self.row_units.append(gradient.row_unit)
        if stop == self.p.rows or stop - self.first == self.buffer.shape[0]:
            self._flush(self.buffer[: stop - self.first], stop)

    def _flush(self, g: Tensor, stop: int) -> None:
        x = self.p.take(self.p.hidden, self.first, stop)
        if self.row_units:
            x = (x * torch.cat(self.row_units)).to(x.dtype)
            self.row_units.clear()
        if self.first == 0 and stop == self.p.rows:
            self.dw = self.gemms.weight_gradient(g, x, saved_dtype(self.p.weight))
        else:
            self._accumulate(g, x, self.first == 0)
        self.first = stop

    def _accumulate(self, g: Tensor, x: Tensor, first: bool) -> None:
        if self.dw is None:
            shape = self.p.weight.shape
            self.dw = torch.empty(shape, dtype=self.p.accum_dtype, device=g.device)
        self.gemms.add_weight_gradient(self.dw, g, x, first)

    def finish(self) -> Tensor:
        if self.dw is None:  # no rows
            return torch.zeros_like(self.p.weight, dtype=saved_dtype(self.p.weight))
        return self.dw if self.unit is None else self.dw.mul_(self.unit)


def run_chunked(problem: KLProblem, backend: RowBackend) -> KLResult:
    """Divergence of every packed row and the gradients asked for."""
    p, acc, gemms = problem, problem.accum_dtype, backend.gemms
    vocab, device = p.weight.shape[0], p.hidden.device
    chunk = max(1, min(p.chunk_tokens, p.rows))
    dtype = backend.gradient_dtype(p)
    kept = buffered_rows(p, dtype, chunk)
    head = _HeadGradient(p, gemms, logit_rows(kept, vocab, dtype, device) if kept else None)
    in_place = kept > 0 and dtype == acc  # the student's logits are made where G will be
    with Scratch() as scratch:
        raw_t = scratch.logit_rows(chunk, vocab, acc, device)
        raw_s = raw_t if in_place else scratch.logit_rows(chunk, vocab, acc, device)
        two_parts = 0 if not p.exact else p.rows if p.exact_rows is None else p.exact_rows
        one_part = replace(p, exact=False)
        result = KLResult(torch.empty(p.rows, dtype=acc, device=device))
        if p.need_dx:
            result.dx = p.empty_dx()
        if p.need_db:
            result.db = torch.zeros(vocab, dtype=acc, device=device)
        for start in range(0, p.rows, chunk):
            stop = min(start + chunk, p.rows)
            x = p.take(p.hidden, start, stop)
            place = head.place(start, stop)
            zt = raw_t[: stop - start]
            zs = place if in_place and place is not None else raw_s[: stop - start]
            _chunk_logits(p, gemms, x, start, stop, zt, zs)
            own = p if start < two_parts else one_part
            result.rows[start:stop], gradient = backend.row_pass(
                zt, zs, p.scale[start:stop], place, own
            )
            if gradient is not None:
                if gradient.low is not None:
                    gradient.low = gradient.low[: two_parts - start]
                _chunk_gradients(p, gemms, result, gradient, start, stop)
                if p.need_dw:
                    head.add(gradient, x, start, stop)
    if p.need_dw:
        result.dw = head.finish()
    if p.rows == 0 and result.dx is not None:
        result.dx.zero_()
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
    start: int,
    stop: int,
) -> None:
    """dX and db of a chunk."""
    g, low, unit, row_unit = gradient.g, gradient.low, gradient.unit, gradient.row_unit
    if result.dx is not None:
        dx = gemms.input_gradient(g, p.weight, p.accum_dtype)
        if low is not None:
            dx[: len(low)].add_(gemms.input_gradient(low, p.weight, p.accum_dtype))
        dx = dx if row_unit is None else dx.mul_(row_unit)
        p.put(result.dx, start, stop, dx if unit is None else dx.mul_(unit))
    if result.db is not None:
        wide = g if row_unit is None else g * row_unit
        db = wide.sum(0, dtype=result.db.dtype)
        if low is not None:
            db.add_(low.sum(0, dtype=result.db.dtype))
        result.db.add_(db if unit is None else db * unit)


def torch_gradient_dtype(p: KLProblem) -> torch.dtype:
    """G is rounded to bfloat16 only where a bfloat16 GEMM follows."""
    half = has_mixed_gemm(p.hidden) and p.hidden.dtype == torch.bfloat16
    return torch.bfloat16 if half else p.accum_dtype


def torch_row_pass(
    zt: Tensor, zs: Tensor, scale: Tensor, place: Tensor | None, p: KLProblem
) -> tuple[Tensor, RowGradient | None]:
    """The row pass in plain torch."""
    rows, g = row_divergence(*logit_sides(zt, zs, p), p.spec, p.need_grad)
    return rows, None if g is None else finished_gradient(g, scale, place, p)


def logit_sides(zt: Tensor, zs: Tensor, p: KLProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Raw logits, without bias and overwritten -> (z of the base, z_other - z_base, slope)."""
    bias_t = p.bias if p.teacher_weight is None else p.teacher_bias
    if bias_t is not None:
        zt.add_(bias_t.to(zt.dtype))
    if p.bias is not None and not p.is_delta:
        zs.add_(p.bias.to(zs.dtype))
    return base_and_difference(zt, zs, p.spec, p.is_delta)


def finished_gradient(
    g: Tensor, scale: Tensor, place: Tensor | None, p: KLProblem
) -> RowGradient:  # fmt: skip
    """G of the rows' scaled losses, rounded as the GEMMs want it; g is overwritten."""
    dtype = torch_gradient_dtype(p)
    if place is None and dtype == g.dtype:
        return RowGradient(g.mul_(scale[:, None]))
    if p.exact and dtype == torch.bfloat16:
        high = g.mul_(scale[:, None]).to(dtype)
        return RowGradient(high, g.sub_(high).to(dtype))
    place = torch.empty_like(g, dtype=dtype) if place is None else place
    return RowGradient(torch.mul(g, scale[:, None], out=place))


def run_torch(problem: KLProblem) -> KLResult:
    """The ``torch`` backend: any device, any floating dtype."""
    return run_chunked(problem, RowBackend(torch_row_pass, torch_gradient_dtype))
