"""The light row kernel in parts, for rows whose columns lie on several ranks; 16-bit inputs.

The sweeps of :mod:`.triton_light` with an exchange between them: statistics of the own columns
(7 numbers per row, merged by :func:`merge_statistics`), of JSD the sums of its terms, then G of the
own columns. For KL the last sweep has the value's terms of the own columns too, whose sums over the
ranks are the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from es2fast.ops.linear_kl.chunked import KLProblem, RowGradient
from es2fast.ops.linear_kl.rows import DIRECTION
from es2fast.ops.linear_kl.triton import gradient_buffers, head_arguments, light_options
from es2fast.ops.linear_kl.triton_light import (
    NEAR,
    across_lanes,
    backward_sweep,
    gradient_scale,
    jsd_value_sweep,
    statistics_sweep,
    tile_offsets,
)
from es2fast.ops.triton_rows import on_device_of

STATISTICS = 7

# --- kernels: C, which is smaller in a last chunk, is no reason to compile another ----------------


@triton.jit(do_not_specialize=["C"])
def statistics_kernel(
    zt_ptr,  # (C, V) float32, teacher's raw logits
    zs_ptr,  # (C, V) float32, student's raw logits
    bt_ptr,  # (V,)
    bs_ptr,  # (V,)
    stats_ptr,  # (7, C) float32
    C,
    V,
    pitch,
    gain,
    cap_in,
    cap_out,
    DIRECTION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_d, m, s_0, s_1, s_2, m_o, s_o = statistics_sweep(
        zt_ptr + row * pitch, zs_ptr + row * pitch, bt_ptr, bs_ptr,
        tile_offsets(GROUPS, LANES, VEC), V, gain, cap_in, cap_out,
        DIRECTION, SOFTCAP, HAS_BT, HAS_BS, GROUPS * LANES * VEC, LANES,
    )  # fmt: skip
    top, p, s_1, s_2, top_o, p_o = across_lanes(m, s_0, s_1, s_2, m_o, s_o)
    out = stats_ptr + row
    tl.store(out, top)
    tl.store(out + C, p)
    tl.store(out + 2 * C, s_1)
    tl.store(out + 3 * C, s_2)
    tl.store(out + 4 * C, first_d)
    tl.store(out + 5 * C, top_o)
    tl.store(out + 6 * C, p_o)


@triton.jit(do_not_specialize=["C"])
def jsd_kernel(
    zt_ptr,
    zs_ptr,
    bt_ptr,
    bs_ptr,
    merged_ptr,  # (3, C) float32, of merge_statistics
    sums_ptr,  # (2, C) float32: JSD, E_s[log(p_s/m)]
    C,
    V,
    pitch,
    gain,
    cap_in,
    cap_out,
    beta,
    SOFTCAP: tl.constexpr,
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total, drawn = jsd_value_sweep(
        zt_ptr + row * pitch, zs_ptr + row * pitch, bt_ptr, bs_ptr,
        tile_offsets(GROUPS, LANES, VEC), V, gain, cap_in, cap_out, beta,
        tl.load(merged_ptr + row), tl.load(merged_ptr + 2 * C + row),
        SOFTCAP, HAS_BT, HAS_BS, GROUPS * LANES * VEC, LANES,
    )  # fmt: skip
    tl.store(sums_ptr + row, tl.sum(total, 0))
    tl.store(sums_ptr + C + row, tl.sum(drawn, 0))


@triton.jit(do_not_specialize=["C"])
def gradient_kernel(
    zt_ptr,
    zs_ptr,
    g_ptr,  # (C, V) gradient; may be the student's own memory
    bt_ptr,
    bs_ptr,
    scale_ptr,  # (C,) float32
    merged_ptr,  # (3, C) float32; of JSD the second row is E_s[log(p_s/m)]
    loss_ptr,  # (C,) float32, the own columns' share of KL
    unit_ptr,  # (C,) float32, power of two by which the row of G was divided
    low_ptr,  # (C, V) what rounding took from G
    C,
    V,
    pitch,
    stride_g,
    stride_low,
    gain,
    cap_in,
    cap_out,
    beta,
    DIRECTION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(merged_ptr + row)
    c = tl.load(merged_ptr + C + row)
    shift = tl.load(merged_ptr + 2 * C + row)
    scale = gradient_scale(scale_ptr, unit_ptr, row, gain, beta, shift - c, DIRECTION, ROW_UNIT)
    total = backward_sweep(
        zt_ptr + row * pitch, zs_ptr + row * pitch, g_ptr + row * stride_g,
        low_ptr + row * stride_low, bt_ptr, bs_ptr, tile_offsets(GROUPS, LANES, VEC), V, pitch,
        gain, cap_in, cap_out, beta, lse, c, shift, scale, tl.zeros([LANES], tl.float32),
        DIRECTION, SOFTCAP, HAS_BT, HAS_BS, NEED_GRAD, TWO_PARTS, GROUPS * LANES * VEC,
    )  # fmt: skip
    tl.store(loss_ptr + row, tl.sum(total, 0))


# --- the row pass ---------------------------------------------------------------------------------


def merge_statistics(parts: Tensor) -> Tensor:
    """Statistics (K, 7, C) of disjoint columns -> (3, C): log2 of the base's sumexp, E_base[d] and
    log E_base[e^d] by the rule of the light row kernel, in float64 until the end.

    Per range of columns: the base's max m in log2, sum e, sum e u, sum e u^2 with e = 2^(z - m) and
    u = d - first, first, and the other side's max and sum.
    """
    m, p, s_1, s_2, first, m_o, p_o = parts.double().unbind(1)
    top, top_o = m.amax(0), m_o.amax(0)
    w, move = torch.exp2(m - top), first - first[0]
    p_all, p_o_all = (p * w).sum(0), (p_o * torch.exp2(m_o - top_o)).sum(0)
    mean = (w * (s_1 + p * move)).sum(0) / p_all
    square = (w * (s_2 + 2 * move * s_1 + p * move.square())).sum(0) / p_all
    variance = square - mean.square()
    shift = ((top_o - top) + torch.log2(p_o_all / p_all)) * math.log(2)
    near = first[0] + mean + variance / 2
    tolerance = 1e-6 + 2e-7 * (top.abs() + top_o.abs())
    is_near = (variance < NEAR.value) & ((near - shift).abs() <= tolerance)
    merged = (top + torch.log2(p_all), first[0] + mean, torch.where(is_near, near, shift))
    return torch.stack(merged).to(parts.dtype)


def sharded_row_pass(
    zt: Tensor,
    zs: Tensor,
    scale: Tensor,
    place: Tensor | None,
    p: KLProblem,
    gather: Callable[[Tensor], Tensor],  # x of this rank -> (ranks, *x.shape)
    over_ranks: Callable[[Tensor], Tensor],  # sums of some columns -> of all
) -> tuple[Tensor, RowGradient | None]:
    """The row pass (:data:`.chunked.RowPass`) of the own columns, with the other ranks'."""
    with on_device_of(zt):
        count, vocab = zt.shape
        biases, scalars = head_arguments(zt, zs, p)
        constants = light_options(p)
        sizes = (count, vocab, zt.stride(0))
        direction = DIRECTION[p.spec.direction]
        stats = torch.empty(STATISTICS, count, dtype=torch.float32, device=zt.device)
        statistics_kernel[(count,)](
            zt, zs, *biases, stats, *sizes, **scalars, DIRECTION=direction, **constants
        )
        merged = merge_statistics(gather(stats))
        rows = torch.empty(count, dtype=torch.float32, device=zt.device)
        if p.spec.direction == "jsd":
            sums = torch.empty(2, count, dtype=torch.float32, device=zt.device)
            jsd_kernel[(count,)](
                zt, zs, *biases, merged, sums, *sizes, **scalars, beta=p.spec.beta, **constants
            )
            rows, merged[1] = over_ranks(sums)
            if not p.need_grad:
                return rows, None
        to = gradient_buffers(zt, zs, scale, place, p)
        kl = torch.empty(count, dtype=torch.float32, device=zt.device)
        gradient_kernel[(count,)](
            zt, zs, to.g, *biases, to.scale, merged, kl, to.units, to.low,
            *sizes, to.g.stride(0), to.low.stride(0), **scalars, beta=p.spec.beta,
            DIRECTION=direction, NEED_GRAD=p.need_grad, ROW_UNIT=to.row_unit,
            TWO_PARTS=to.two_parts, **constants,
        )  # fmt: skip
        if p.spec.direction != "jsd":
            rows = over_ranks(kl)
        return rows, to.gradient() if p.need_grad else None
