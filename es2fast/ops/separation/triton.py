"""Triton kernels of the pairwise separation losses, and their launchers.

Small groups (both up to ``SMALL`` rows) take two kernels and no GEMM: ``small_pairs_kernel``, one
program per harmful row, makes its distances from differences, its losses and its coefficients;
``small_gradient_kernel``, one program per slice of H, applies them. Everything is float32 and
nothing cancels.

Larger groups go chunk by chunk of harmful rows. ``prepare_kernel`` centres a row; 16-bit inputs are
then scaled by a power of two of the row's own and rounded to *float16*, whatever they came in: its
11 bits keep a coefficient or a row to 1.6e-4 where bfloat16 keeps 1.3e-3, at the same GEMM speed,
and the scale takes care of the range. cuBLAS makes the Gram chunk in float32. ``pair_kernel``, one
program per row, turns it into squared distances, values and coefficients: it sweeps the row twice,
for values and the largest coefficient, then for the coefficients divided by it. Two more GEMMs and
``finish_kernel`` give the gradients. There are no atomics: results repeat bit by bit.

Pairs with ``d^2`` below ``CLOSE_HALF`` (float32: ``CLOSE_FULL``) of ``|a|^2 + |b|^2`` are beyond
the rounded Gram form. pair_kernel recomputes their distance from the rows as given, leaves them out
of the coefficients and marks their squared distance by its sign; ``close_kernel`` adds their
gradients, one owner per row. It costs a scan of flagged rows, nothing where there are none.

Nothing here synchronises with the host. Formulas: :mod:`es2fast.ops.separation.chunked`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from es2fast.ops.separation.chunked import (
    KIND,
    LOG_FLOOR,
    PairProblem,
    PairResult,
    nothing,
)
from es2fast.ops.triton_rows import on_device_of

HINGE, L2, LOG, SOFTPLUS, SQUARED, COSINE = map(tl.constexpr, KIND.values())
SMALL = 128  # rows of both groups up to which pairs are made from differences
CHUNK_PAIRS = 1 << 24  # of a chunk: 64 MB of Gram and 32 MB (float32: 64 MB) of coefficients
CLOSE_HALF = 0.02  # of |a|^2 + |b|^2: float16 rows leave a gradient about 1e-3 there
CLOSE_FULL = 1e-3
_LOG_FLOOR = tl.constexpr(LOG_FLOOR)
_NO_COLUMN = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of one kernel: elements per tile and warps."""

    block: int
    num_warps: int
    max_registers: int | None = None  # per thread; None: ptxas decides


PREPARE = LaunchConfig(1024, 4)
PAIRS = LaunchConfig(1024, 4, 128)  # left alone, ptxas trades 8 spilled bytes for occupancy
FINISH = LaunchConfig(1024, 4)
CLOSE = LaunchConfig(512, 4)
WIDTH = 1024  # of H per step where two rows are subtracted
SUM_ROWS, SUM_COLUMNS = 128, 128  # of a column_sum_kernel tile
SMALL_WIDTH = 64  # of H per step or program of the small kernels
SMALL_STAGES = 3  # steps in flight


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _relu(x):
    """max(x, 0) that keeps NaN, so that a broken row is seen in the loss."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def _softplus(x):
    """log(1 + e^x) without overflow; below -9, e^x itself (float32 loses 1 + e^x)."""
    small = tl.exp(-tl.abs(x))
    exact = tl.where(small < 1e-4, small - small * small * 0.5, tl.log(1.0 + small))
    return tl.maximum(x, 0.0) + exact


@triton.jit
def _pair(d2, margin, scale, KIND: tl.constexpr):
    """(f(d), f'(d)/d) of squared distances, as chunked.pair_values."""
    if KIND == SQUARED:
        rest = margin * margin - d2
        value = _relu(rest) / (scale * scale)
        slope = tl.where(rest > 0, -2.0 / (scale * scale), 0.0)
    elif KIND == COSINE:
        rest = (1.0 - margin) - d2 * 0.5
        value = _relu(rest)
        slope = tl.where(rest > 0, -1.0, 0.0)
    else:
        is_apart = d2 > 0
        d = tl.sqrt(d2)
        inverse = -1.0 / tl.where(is_apart, d, 1.0)
        if KIND == LOG:
            floor = _LOG_FLOOR * scale
            value = -tl.log(tl.where(d < floor, floor, d) / scale)
            slope = tl.where(d > floor, -inverse * inverse, 0.0)
        else:
            inverse = tl.where(is_apart, inverse / scale, 0.0)
            if KIND == L2:
                value = -d / scale
                slope = inverse
            else:
                rest = (margin - d) / scale
                if KIND == HINGE:
                    value = _relu(rest)
                    slope = tl.where(rest > 0, inverse, 0.0)
                else:
                    value = _softplus(rest)
                    slope = inverse / (1.0 + tl.exp(tl.minimum(-rest, 80.0)))
    return value, slope


@triton.jit
def _power_of_two(x):
    """The power of two in (x / 2, x] for normal x > 0, else 1."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    power = bits.to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), power, 1.0)


@triton.jit
def _reciprocal(power):
    """1 / power for a power of two, exactly and without a division."""
    bits = 0x7F000000 - power.to(tl.int32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _exact_square(x_row, y_row, H, WIDTH: tl.constexpr):
    """||x - y||^2 of two rows as given."""
    offs = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for h in range(0, H, WIDTH):
        mask = h + offs < H
        x = tl.load(x_row + h + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_row + h + offs, mask=mask, other=0.0).to(tl.float32)
        total += (x - y) * (x - y)
    return tl.sum(total, 0)


# --- kernels for larger groups --------------------------------------------------------------------


@triton.jit
def column_sum_kernel(
    x_ptr,  # (N, M)
    w_ptr,  # (N,) float32
    out_ptr,  # (N / ROWS, M) float32: one partial sum per block of rows
    N,
    M,
    stride_x,
    MASK_ONLY: tl.constexpr,  # weigh rows by 1 where w != 0; the others are not read
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, ROWS, STEP):
        rows = part * ROWS + first + tl.arange(0, STEP)
        w = tl.load(w_ptr + rows, mask=rows < N, other=0.0)
        mask = (w != 0)[:, None] & (cols < M)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if not MASK_ONLY:
            x = x * w[:, None]
        total += tl.sum(x, 0)
    tl.store(out_ptr + part * M + cols, total, mask=cols < M)


@triton.jit
def prepare_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (N,) float32
    mean_ptr,  # (H,) float32
    out_ptr,  # (N, H) float16 or float32: (x - mean) / unit
    unit_ptr,  # (N,) float32: power of two; 1 in float32
    sq_ptr,  # (N,) float32: ||out||^2 unit^2
    H,
    stride_x,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = tl.where(tl.load(w_ptr + row) != 0, H, 0)  # a row of weight 0 is not read
    offs = tl.arange(0, BLOCK)
    unit = tl.full((), 1.0, tl.float32)
    if HALF:
        largest = tl.zeros((BLOCK,), tl.float32)
        for h in range(0, H, BLOCK):
            mask = h + offs < width
            x = tl.load(x_ptr + row * stride_x + h + offs, mask=mask, other=0.0).to(tl.float32)
            x -= tl.load(mean_ptr + h + offs, mask=mask, other=0.0)
            largest = tl.maximum(largest, tl.abs(x))
        unit = _power_of_two(tl.max(largest, 0)) * 2.0
    total = tl.zeros((BLOCK,), tl.float32)
    for h in range(0, H, BLOCK):
        mask = h + offs < width
        x = tl.load(x_ptr + row * stride_x + h + offs, mask=mask, other=0.0).to(tl.float32)
        x -= tl.load(mean_ptr + h + offs, mask=mask, other=0.0)
        x = (x * _reciprocal(unit)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * H + h + offs, x, mask=h + offs < H)
        total += x.to(tl.float32) * x.to(tl.float32)
    tl.store(unit_ptr + row, unit)
    tl.store(sq_ptr + row, tl.sum(total, 0) * unit * unit)


@triton.jit
def pair_kernel(
    gram_ptr,  # (C, M) float32; becomes d^2, negative for close pairs
    q_ptr,  # (C, M) float16 or float32: v_j unit_j f'(d)/d / row unit, 0 for close pairs
    a_ptr,  # (C, H) rows as given
    b_ptr,  # (M, H)
    a_unit_ptr,  # (C,) float32, as prepare_kernel made them
    b_unit_ptr,  # (M,)
    a_sq_ptr,  # (C,)
    b_sq_ptr,  # (M,)
    u_ptr,  # (C,)
    v_ptr,  # (M,)
    value_ptr,  # (C,) float32: u_i sum_j v_j f(d_ij)
    sum_ptr,  # (C,) float32: sum_j q_ij / unit_j
    weight_ptr,  # (C,) float32: u_i * row unit
    flag_ptr,  # (C,) int32: the row has close pairs
    M,
    H,
    pitch,  # of gram and q
    stride_a,
    stride_b,
    margin,
    scale,
    close,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    gram_row = gram_ptr + row * pitch
    a_unit = tl.load(a_unit_ptr + row)
    a_sq = tl.load(a_sq_ptr + row)
    u = tl.load(u_ptr + row)
    values = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    flag = 0
    for first in range(0, M, BLOCK):
        cols = first + offs
        mask = cols < M
        b_unit = tl.load(b_unit_ptr + cols, mask=mask, other=1.0)
        v = tl.load(v_ptr + cols, mask=mask, other=0.0)
        size = a_sq + tl.load(b_sq_ptr + cols, mask=mask, other=0.0)
        dot = tl.load(gram_row + cols, mask=mask, other=0.0)
        d2 = size - 2.0 * a_unit * b_unit * dot
        unseen = (d2 < close * size) & (tl.where(u != 0, v, 0.0) != 0)
        is_close = unseen
        d2 = _relu(d2)
        column = tl.min(tl.where(unseen, cols, _NO_COLUMN), 0)
        while column < _NO_COLUMN:
            exact = _exact_square(
                a_ptr + row * stride_a, b_ptr + column.to(tl.int64) * stride_b, H, WIDTH
            )
            d2 = tl.where(cols == column, exact, d2)
            unseen = unseen & (cols != column)
            column = tl.min(tl.where(unseen, cols, _NO_COLUMN), 0)
            flag = 1
        value, slope = _pair(d2, margin, scale, KIND)
        values += tl.where(v != 0, v * value, 0.0)
        if NEED_GRAD:
            tl.store(gram_row + cols, tl.where(is_close, -d2, d2), mask=mask)
            if HALF:
                q = tl.where(is_close, 0.0, tl.abs(v * slope * b_unit))
                largest = tl.maximum(largest, tl.where(mask, q, 0.0))
    tl.store(value_ptr + row, tl.sum(values, 0) * u)
    if NEED_GRAD:
        tl.store(flag_ptr + row, flag)
        unit = tl.full((), 1.0, tl.float32)
        if HALF:
            unit = _power_of_two(tl.max(largest, 0)) * 2.0
        tl.debug_barrier()  # the second sweep reads what other threads stored
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, M, BLOCK):
            cols = first + offs
            mask = cols < M
            b_unit = tl.load(b_unit_ptr + cols, mask=mask, other=1.0)
            v = tl.load(v_ptr + cols, mask=mask, other=0.0)
            d2 = tl.load(gram_row + cols, mask=mask, other=0.0)
            is_close = (d2 < 0) | (d2 == 0)  # at distance 0 every slope that matters is 0
            _, slope = _pair(tl.abs(d2), margin, scale, KIND)
            q = tl.where(is_close, 0.0, v * slope * b_unit) * _reciprocal(unit)
            q = q.to(q_ptr.dtype.element_ty)
            tl.store(q_ptr + row * pitch + cols, q, mask=mask)
            total += tl.where(mask, q.to(tl.float32) * _reciprocal(b_unit), 0.0)
        tl.store(sum_ptr + row, tl.sum(total, 0))
        tl.store(weight_ptr + row, u * unit)


@triton.jit
def finish_kernel(
    product_ptr,  # (N, H) float32: the GEMM of coefficients with the other group
    x_ptr,  # (N, H) rows as given
    w_ptr,  # (N,) float32 weights; rows of weight 0 get no gradient
    mean_ptr,  # (H,)
    sum_ptr,  # (N,) float32
    factor_ptr,  # (N,) float32
    common_ptr,  # () float32
    out_ptr,  # (N, H) float32: += factor (sum (x - mean) - common product)
    H,
    stride_x,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = tl.where(tl.load(w_ptr + row) != 0, H, 0)
    total = tl.load(sum_ptr + row)
    factor = tl.load(factor_ptr + row)
    common = tl.load(common_ptr)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H
    x = tl.load(x_ptr + row * stride_x + offs, mask=offs < width, other=0.0).to(tl.float32)
    x -= tl.load(mean_ptr + offs, mask=offs < width, other=0.0)
    product = tl.load(product_ptr + row * H + offs, mask=mask, other=0.0)
    out = tl.where(offs < width, factor * (total * x - common * product), 0.0)
    if ADD:
        out += tl.load(out_ptr + row * H + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row * H + offs, out, mask=mask)


@triton.jit
def close_kernel(
    d2_ptr,  # (C, M) float32 as pair_kernel leaves it
    flag_ptr,  # (C,) int32
    own_ptr,  # rows as given of the side whose gradient this is
    other_ptr,  # rows as given of the other side
    own_w_ptr,
    other_w_ptr,
    out_ptr,  # (own rows, H) float32: += w_own sum_k w_k f'(d)/d (own - other_k) over close pairs
    N_OTHER,
    H,
    pitch,
    stride_own,
    stride_other,
    margin,
    scale,
    KIND: tl.constexpr,
    BY_COLUMN: tl.constexpr,  # own rows are columns of d2
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDTH)
    own_w = tl.load(own_w_ptr + own)
    flag = 1
    if not BY_COLUMN:
        flag = tl.load(flag_ptr + own)
    if (flag != 0) & (own_w != 0):
        for first in range(0, N_OTHER, BLOCK):
            others = first + tl.arange(0, BLOCK)
            mask = others < N_OTHER
            if BY_COLUMN:
                mask = mask & (tl.load(flag_ptr + others, mask=mask, other=0) != 0)
                place = others.to(tl.int64) * pitch + own
            else:
                place = own * pitch + others
            d2 = tl.load(d2_ptr + place, mask=mask, other=0.0)
            weight = tl.load(other_w_ptr + others, mask=mask, other=0.0)
            unseen = d2 < 0
            _, slope = _pair(tl.abs(d2), margin, scale, KIND)
            pull = own_w * weight * slope
            other = tl.min(tl.where(unseen, others, _NO_COLUMN), 0)
            while other < _NO_COLUMN:
                c = tl.sum(tl.where(others == other, pull, 0.0), 0)
                own_row = own_ptr + own * stride_own
                other_row = other_ptr + other.to(tl.int64) * stride_other
                for h in range(0, H, WIDTH):
                    inside = h + wide < H
                    x = tl.load(own_row + h + wide, mask=inside, other=0.0).to(tl.float32)
                    y = tl.load(other_row + h + wide, mask=inside, other=0.0).to(tl.float32)
                    out = tl.load(out_ptr + own * H + h + wide, mask=inside, other=0.0)
                    tl.store(out_ptr + own * H + h + wide, out + c * (x - y), mask=inside)
                unseen = unseen & (others != other)
                other = tl.min(tl.where(unseen, others, _NO_COLUMN), 0)


# --- kernels for small groups ---------------------------------------------------------------------


@triton.jit
def small_pairs_kernel(
    a_ptr,  # (n, H)
    b_ptr,  # (m, H)
    u_ptr,
    v_ptr,
    c_ptr,  # (n, m) float32 coefficients
    value_ptr,  # (n,) float32
    M,
    H,
    stride_a,
    stride_b,
    margin,
    scale,
    KIND: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_M)
    u = tl.load(u_ptr + row)
    v = tl.load(v_ptr + cols, mask=cols < M, other=0.0)
    counts = tl.where(u != 0, v, 0.0) != 0  # rows of weight 0 are read, and dropped below
    offs = tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for h in tl.range(0, H, WIDTH, num_stages=STAGES):
        mask = h + offs < H
        a = tl.load(a_ptr + row * stride_a + h + offs, mask=mask, other=0.0).to(tl.float32)
        place = b_ptr + cols[:, None].to(tl.int64) * stride_b + h + offs[None, :]
        b = tl.load(place, mask=(cols < M)[:, None] & mask[None, :], other=0.0).to(tl.float32)
        total += (a[None, :] - b) * (a[None, :] - b)
    value, slope = _pair(tl.sum(total, 1), margin, scale, KIND)
    tl.store(value_ptr + row, u * tl.sum(tl.where(counts, v * value, 0.0), 0))
    if NEED_GRAD:
        c = tl.where(counts, u * v * slope, 0.0)
        tl.store(c_ptr + row * M + cols, c, mask=cols < M)


@triton.jit
def small_gradient_kernel(
    own_ptr,  # (N_OWN, H)
    other_ptr,  # (N_OTHER, H)
    own_w_ptr,
    other_w_ptr,
    c_ptr,  # coefficients, strided so that own rows come first
    out_ptr,  # (N_OWN, H) float32
    N_OWN,
    N_OTHER,
    H,
    stride_own,
    stride_other,
    stride_c_own,
    stride_c_other,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_rows = rows < N_OWN
    in_width = offs < H
    counts = tl.load(own_w_ptr + rows, mask=in_rows, other=0.0) != 0
    place = own_ptr + rows[:, None].to(tl.int64) * stride_own + offs[None, :]
    own = tl.load(place, mask=counts[:, None] & in_width[None, :], other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in tl.range(0, N_OTHER, loop_unroll_factor=4):
        row_ptr = other_ptr + tl.cast(k, tl.int64) * stride_other
        other = tl.load(row_ptr + offs, mask=in_width, other=0.0)
        other = tl.where(tl.load(other_w_ptr + k) != 0, other.to(tl.float32), 0.0)
        c = tl.load(c_ptr + rows * stride_c_own + k * stride_c_other, mask=in_rows, other=0.0)
        total += c[:, None] * (own - other[None, :])
    place = out_ptr + rows[:, None].to(tl.int64) * H + offs[None, :]
    tl.store(place, total, mask=in_rows[:, None] & in_width[None, :])


# --- launchers ------------------------------------------------------------------------------------


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _next_power(x: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(x))


def _mm(x: Tensor, y: Tensor) -> Tensor:
    """x @ y with a float32 accumulator and result."""
    if x.dtype == torch.float32:
        return torch.mm(x, y)
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x.float(), y.float())  # the interpreter's machine


def column_sum(x: Tensor, w: Tensor, mask_only: bool) -> Tensor:  # (N, M), (N,) -> (M,)
    """sum_i w_i x_i, or the sum of the rows with w_i != 0; two fixed-order stages."""
    n, m = x.shape
    parts = triton.cdiv(n, SUM_ROWS)
    out = torch.empty(parts, m, dtype=torch.float32, device=x.device)
    if n > 0:
        grid = (parts, triton.cdiv(m, SUM_COLUMNS))
        column_sum_kernel[grid](
            x, w, out, n, m, x.stride(0), mask_only,
            ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, STEP=16, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out.sum(0)


@dataclass(frozen=True)
class Side:
    """One group, ready for the GEMMs."""

    raw: Tensor  # (N, H) rows as given
    w: Tensor  # (N,)
    x: Tensor  # (N, H) float16 or float32, centred, divided by unit
    unit: Tensor  # (N,)
    sq: Tensor  # (N,)

    def rows(self, start: int, stop: int) -> Side:
        part = slice(start, stop)
        return Side(self.raw[part], self.w[part], self.x[part], self.unit[part], self.sq[part])


def _prepare(raw: Tensor, w: Tensor, mean: Tensor, half: bool) -> Side:
    n, h = raw.shape
    dtype = torch.float16 if half else torch.float32
    x = torch.empty(n, h, dtype=dtype, device=raw.device)
    unit, sq = (torch.empty(n, dtype=torch.float32, device=raw.device) for _ in range(2))
    prepare_kernel[(n,)](
        raw, w, mean, x, unit, sq, h, raw.stride(0), half,
        BLOCK=PREPARE.block, num_warps=PREPARE.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return Side(raw, w, x, unit, sq)


def _finish(
    product: Tensor, side: Side, mean: Tensor, sums: tuple[Tensor, ...], out: Tensor, add: bool
) -> None:
    n, h = side.raw.shape
    finish_kernel[(n, triton.cdiv(h, FINISH.block))](
        product, side.raw, side.w, mean, *sums, out, h, side.raw.stride(0), add,
        BLOCK=FINISH.block, num_warps=FINISH.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _add_close(
    p: PairProblem, d2: Tensor, flags: Tensor, own: Side, other: Side, out: Tensor, by_column: bool
) -> None:
    close_kernel[(own.raw.shape[0],)](
        d2, flags, own.raw, other.raw, own.w, other.w, out, other.raw.shape[0], out.shape[1],
        d2.stride(0), own.raw.stride(0), other.raw.stride(0), p.spec.margin, p.spec.scale,
        KIND[p.spec.kind], by_column,
        BLOCK=CLOSE.block, WIDTH=WIDTH, num_warps=CLOSE.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _run_small(p: PairProblem) -> PairResult:
    (n, h), m = p.a.shape, p.b.shape[0]
    device = p.a.device
    values = torch.empty(n, dtype=torch.float32, device=device)
    c = torch.empty(n, m, dtype=torch.float32, device=device)
    small_pairs_kernel[(n,)](
        p.a, p.b, p.u, p.v, c, values, m, h, p.a.stride(0), p.b.stride(0),
        p.spec.margin, p.spec.scale, KIND[p.spec.kind], p.need_grad,
        BLOCK_M=_next_power(m), WIDTH=SMALL_WIDTH, STAGES=SMALL_STAGES, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    result = PairResult(values.sum())
    if p.need_da:
        result.da = _small_gradient(p.a, p.b, p.u, p.v, c)
    if p.need_db:
        result.db = _small_gradient(p.b, p.a, p.v, p.u, c.t())
    return result


def _small_gradient(
    own: Tensor, other: Tensor, own_w: Tensor, other_w: Tensor, c: Tensor
) -> Tensor:
    n, h = own.shape
    out = torch.empty(n, h, dtype=torch.float32, device=own.device)
    rows = min(_next_power(n), 32)
    small_gradient_kernel[(triton.cdiv(h, SMALL_WIDTH), triton.cdiv(n, rows))](
        own, other, own_w, other_w, c, out, n, other.shape[0], h,
        own.stride(0), other.stride(0), c.stride(0), c.stride(1),
        ROWS=rows, WIDTH=SMALL_WIDTH, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _run_chunk(
    p: PairProblem,
    a: Side,
    b: Side,
    mean: Tensor,
    da: Tensor | None,
    db: Tensor | None,
    first: bool,
) -> Tensor:  # (C,) values
    """One chunk of harmful rows against all harmless ones; fills da (C, H), adds to db (m, H)."""
    (c, h), m = a.raw.shape, b.raw.shape[0]
    device, half = a.raw.device, a.x.dtype == torch.float16
    gram = _mm(a.x, b.x.t())
    q = torch.empty(c, m, dtype=a.x.dtype, device=device) if p.need_grad else gram
    values, sums, weights = (torch.empty(c, dtype=torch.float32, device=device) for _ in range(3))
    flags = torch.empty(c, dtype=torch.int32, device=device)
    pair_kernel[(c,)](
        gram, q, a.raw, b.raw, a.unit, b.unit, a.sq, b.sq, a.w, b.w, values, sums, weights, flags,
        m, h, m, a.raw.stride(0), b.raw.stride(0), p.spec.margin, p.spec.scale,
        CLOSE_HALF if half else CLOSE_FULL, KIND[p.spec.kind], half, p.need_grad,
        BLOCK=PAIRS.block, WIDTH=WIDTH, num_warps=PAIRS.num_warps, maxnreg=PAIRS.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    if da is not None:
        one = torch.ones((), dtype=torch.float32, device=device)
        _finish(_mm(q, b.x), a, mean, (sums, weights, one), da, add=False)
        _add_close(p, gram, flags, a, b, da, by_column=False)
    if db is not None:
        columns = column_sum(q, weights, mask_only=False)
        share = weights * a.unit
        most = share.abs().amax()
        share = torch.where(most > 0, share / most, 0.0)
        product = _mm(q.t(), a.x * share.to(a.x.dtype)[:, None])
        _finish(product, b, mean, (columns, 1 / b.unit, most), db, add=not first)
        _add_close(p, gram, flags, b, a, db, by_column=True)
    return values


def _run_chunked(p: PairProblem) -> PairResult:
    (n, h), m = p.a.shape, p.b.shape[0]
    total = column_sum(p.a, p.u, True) + column_sum(p.b, p.v, True)
    mean = total / ((p.u != 0).sum() + (p.v != 0).sum()).clamp_min(1)
    a, b = (_prepare(raw, w, mean, p.half) for raw, w in ((p.a, p.u), (p.b, p.v)))
    chunk = p.chunk_rows or max(256, CHUNK_PAIRS // m // 128 * 128)
    da = torch.empty(n, h, dtype=torch.float32, device=a.raw.device) if p.need_da else None
    db = torch.empty(m, h, dtype=torch.float32, device=a.raw.device) if p.need_db else None
    values = []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        part = None if da is None else da[start:stop]
        values.append(_run_chunk(p, a.rows(start, stop), b, mean, part, db, start == 0))
    return PairResult(torch.cat(values).sum(), da, db)


def run_triton(problem: PairProblem) -> PairResult:
    """The ``triton`` backend: NVIDIA sm_80 or newer (or the interpreter), up to float32."""
    p = replace(problem, a=_row_major(problem.a), b=_row_major(problem.b))
    n, m = p.a.shape[0], p.b.shape[0]
    if min(n, m) == 0:
        return nothing(p)
    with on_device_of(p.a):
        return _run_small(p) if max(n, m) <= SMALL else _run_chunked(p)
