"""Triton kernels of the linear KL, and their launchers.

``row_kernel``, for float32 inputs: one program per token, over float32 raw logits of student and
teacher in memory. It sweeps the row once forwards for the statistics (both logsumexps, the centre
and the value in the cancellation-free form, merged tile by tile) and once *backwards* for the
gradient. JSD needs one more sweep. G is written to a buffer of its own or over the student's
logits: 16-bit G (``triton_light.light_row_kernel``) goes to the upper half of the row's own memory,
which a backward sweep has already read, a second part of it over the teacher's logits. A row comes
from memory once per sweep: rows in flight exceed the L2 cache.

``fused_kernel``: the no-grad path. One program per (block of rows, range of columns) makes the
logits tile by tile with tensor cores and folds them into the same statistics; nothing of size
N x V is stored, and with a shared head each tile of W is read once for both sides.

Formulas: :mod:`es2fast.ops.linear_kl.rows`, whose names are used here. Statistics per row, merged
by :func:`es2fast.ops.linear_kl.rows.merge_partials`: base's max m and sumexp p, centre c, centred
sum s, other's max and sumexp. Offsets of rows and of head entries are 64-bit: N V and V H exceed
2^31 for real models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from es2fast.ops.linear_kl.chunked import (
    KLProblem,
    KLResult,
    RowBackend,
    RowGradient,
    run_chunked,
)
from es2fast.ops.linear_kl.device import clip, exp_capped, log1p, phi, phi_any, transform
from es2fast.ops.linear_kl.rows import DIRECTION, merge_partials
from es2fast.ops.linear_kl.triton_light import (
    LIGHT,
    LIGHT_INTERPRETED,
    LIGHT_REGISTERS,
    light_row_kernel,
    light_softcap,
)
from es2fast.ops.tokens import sm_count
from es2fast.ops.triton_rows import (
    INTERPRETED,
    LOWEST,
    ROW_CONFIG_INTERPRETED,
    RowConfig,
    gradient_place,
    on_device_of,
    rounded,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
STATISTICS = 6


@dataclass(frozen=True)
class FusedConfig:
    """Launch configuration of ``fused_kernel``."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int  # pieces of a tile of logits that are folded one after the other
    max_registers: int | None = None  # per thread; 255 is no bound, but see fused_config


# float32 inputs. Left alone, ptxas trades a spill of 8 bytes in some variants for one more block
# per SM; the explicit bound keeps it from that.
ROW_CONFIG = RowConfig(max_registers=168)
FUSED_CONFIG_INTERPRETED = FusedConfig(16, 512, 64, 4, 1, 2)


def fused_config(capability: int, softcap: bool = False) -> FusedConfig:
    """The configuration in use for a compute capability (80, 90, 100, ...).

    The largest tile that bench/compile_report.py shows free of spills; chips other than Hopper and
    data-center Blackwell have about 100 KiB of shared memory at least, which the small one fits.
    With a soft-cap on sm_100 ptxas would stop at 128 registers and spill 8 bytes for an occupancy
    that shared memory rules out anyway; any explicit bound keeps it from that.
    """
    small = FusedConfig(128, 64, 64, 8, 3, 4)
    if not 90 <= capability < 110:
        return small
    return replace(small, max_registers=255) if softcap else FusedConfig(128, 128, 64, 8, 3, 4)


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _orient(z_t, d, valid, DIRECTION: tl.constexpr):
    """(base's z with -inf on padding, z_other - z_base)."""
    if DIRECTION == 1:
        z_b = z_t + d
        d = -d
    else:
        z_b = z_t
    return tl.where(valid, z_b, float("-inf")), tl.where(valid, d, 0.0)


@triton.jit
def _wide(x, AXIS: tl.constexpr):
    """A per-row scalar or vector, broadcastable against its tile."""
    if AXIS == 1:
        return x[:, None]
    else:
        return x


@triton.jit
def _fold(z_b, d, m, p, c, s, m_o, p_o, AXIS: tl.constexpr):
    """Fold a tile (its columns along AXIS) into the row statistics."""
    m_new = tl.maximum(m, tl.max(z_b, AXIS))  # finite: m starts at LOWEST
    log_e = z_b - _wide(m_new, AXIS)
    e = tl.exp(log_e)
    p_tile = tl.sum(e, AXIS)
    d_c = d - _wide(c, AXIS)
    mean = tl.where(p_tile > 0, tl.sum(e * d_c, AXIS) / tl.where(p_tile > 0, p_tile, 1.0), 0.0)
    u = d_c - _wide(mean, AXIS)
    far = tl.exp(log_e + u) - e * (1.0 + u)
    s_tile = tl.sum(tl.where(tl.abs(u) <= 0.5, e * phi(clip(u)), far), AXIS)
    shrink = tl.exp(m - m_new)
    p_old = p * shrink
    p_new = p_old + p_tile
    move = tl.where(p_new > 0, mean * (p_tile / p_new), 0.0)
    rest = mean - move
    s_old = s * shrink * exp_capped(-move) + p_old * phi_any(-move)
    s_new = s_old + s_tile * exp_capped(rest) + p_tile * phi_any(rest)
    z_o = z_b + d
    m_o_new = tl.maximum(m_o, tl.max(z_o, AXIS))
    p_o_tile = tl.sum(tl.exp(z_o - _wide(m_o_new, AXIS)), AXIS)
    p_o_new = p_o * tl.exp(m_o - m_o_new) + p_o_tile
    return m_new, p_new, c + move, s_new, m_o_new, p_o_new


@triton.jit
def _value(m, p, c, s, m_o, p_o):
    """KL(base||other): the centred form, or the plain one where they disagree (far away)."""
    lse_b = m + tl.log(p)
    lse_o = m_o + tl.log(p_o)
    near = log1p(s / p)
    direct = lse_o - lse_b - c
    tolerance = 1e-5 * (1.0 + tl.abs(lse_b) + tl.abs(lse_o) + tl.abs(c))
    return tl.where(tl.abs(near - direct) <= tolerance, near, direct), lse_b


@triton.jit
def _jsd_near(w, a):
    """a h(w) - h(a w) for small w, h(w) = (1+w) log1p(w) - w: sum (-w)^k (a - a^k) / (k (k-1))."""
    a2 = a * a
    a4 = a2 * a2
    acc = (a - a4 * a2 * a) / 42.0 * (-w)
    acc = ((a - a4 * a2) / 30.0 + acc) * (-w)
    acc = ((a - a4 * a) / 20.0 + acc) * (-w)
    acc = ((a - a4) / 12.0 + acc) * (-w)
    acc = ((a - a2 * a) / 6.0 + acc) * (-w)
    return ((a - a2) / 2.0 + acc) * w * w


@triton.jit
def _jsd_terms(r, log_t, beta):
    """(value term, p_s, log(p_s/m)) from r = log(p_s/p_t) and log p_t."""
    a = 1.0 - beta
    p_t = tl.exp(log_t)
    p_s = tl.exp(log_t + r)
    is_near = tl.abs(r) <= 0.5
    near = clip(r)
    w = near + phi(near)
    aw = a * w
    log1p_aw = log1p(aw)
    q = tl.exp(-tl.abs(r))
    far = -tl.log(tl.where(r > 0, a + beta * q, beta + a * q))
    log_sm = tl.where(is_near, near - log1p_aw, far + tl.minimum(r, 0.0))
    log_tm = far - tl.maximum(r, 0.0)
    by_parts = a * ((1.0 + w) * near - w) - ((1.0 + aw) * log1p_aw - aw)
    value_near = p_t * tl.where(tl.abs(w) < 0.1, _jsd_near(w, a), by_parts)
    value = tl.where(is_near, value_near, beta * p_t * log_tm + a * p_s * log_sm)
    return value, p_s, log_sm


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b. The interpreter multiplies bfloat16 as integers: give it float32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _load_row(
    zt_row,
    zs_row,
    bt_ptr,
    bs_ptr,
    cols,
    V,
    pitch,
    gain,
    cap_in,
    cap_out,
    IS_DELTA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
):
    """One tile of a row, transformed: (z_t, z_s - z_t, slope).

    Rows are padded in memory to whole lines (``pitch``), and loads are masked by that instead of V
    so that they stay vectorized when V is odd; columns from V on hold anything, even NaN.
    """
    valid = cols < V
    raw_t = tl.load(zt_row + cols, mask=cols < pitch, other=0.0)
    raw_s = tl.load(zs_row + cols, mask=cols < pitch, other=0.0)
    if HAS_BT:
        raw_t += tl.load(bt_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    if HAS_BS:
        raw_s += tl.load(bs_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    return transform(raw_t, raw_s, gain, cap_in, cap_out, IS_DELTA, SOFTCAP)


@triton.jit
def _fold_logits(
    acc_t, acc_s, first, bt_ptr, bs_ptr, V, gain, cap_in, cap_out, m, p, c, s, m_o, p_o,
    DIRECTION: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Fold raw logits (BLOCK_M, WIDTH) of the columns from ``first`` on into the statistics."""
    cols = first + tl.arange(0, WIDTH)
    valid = cols < V
    if HAS_BT:
        acc_t += tl.load(bt_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
    if HAS_BS:
        acc_s += tl.load(bs_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
    z_t, d, _ = transform(acc_t, acc_s, gain, cap_in, cap_out, False, SOFTCAP)
    z_b, d = _orient(z_t, d, valid[None, :], DIRECTION)
    return _fold(z_b, d, m, p, c, s, m_o, p_o, 1)


@triton.jit
def _fold_wide(
    acc_t, acc_s, first, bt_ptr, bs_ptr, V, gain, cap_in, cap_out, m, p, c, s, m_o, p_o,
    DIRECTION: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``_fold_logits`` by halves, PARTS pieces in all: fewer live registers."""
    if PARTS == 1:
        return _fold_logits(
            acc_t, acc_s, first, bt_ptr, bs_ptr, V, gain, cap_in, cap_out, m, p, c, s, m_o, p_o,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, WIDTH,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = WIDTH // 2
        t_0, t_1 = acc_t.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        s_0, s_1 = acc_s.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        m, p, c, s, m_o, p_o = _fold_wide(
            t_0, s_0, first, bt_ptr, bs_ptr, V, gain, cap_in, cap_out, m, p, c, s, m_o, p_o,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
        if first + HALF < V:
            m, p, c, s, m_o, p_o = _fold_wide(
                t_1, s_1, first + HALF, bt_ptr, bs_ptr, V, gain, cap_in, cap_out,
                m, p, c, s, m_o, p_o,
                DIRECTION, SOFTCAP, HAS_BT, HAS_BS, ROWS, HALF, PARTS // 2,
            )  # fmt: skip
        return m, p, c, s, m_o, p_o


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def row_kernel(
    zt_ptr,  # (C, V) float32, teacher's raw logits
    zs_ptr,  # (C, V) float32, student's raw logits or their difference to the teacher's
    g_ptr,  # (C, V) gradient; may be the student's own memory (module docstring)
    bt_ptr,  # (V,)
    bs_ptr,  # (V,)
    scale_ptr,  # (C,) float32
    loss_ptr,  # (C,) float32
    unit_ptr,  # (C,) float32, power of two by which the row of G was divided
    V,
    pitch,  # row stride of both logit buffers, at least V
    stride_g,
    gain,  # logit_scale / temperature
    cap_in,  # logit_scale / softcap
    cap_out,  # softcap / temperature
    beta,
    DIRECTION: tl.constexpr,
    IS_DELTA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    zt_row = zt_ptr + row * pitch
    zs_row = zs_ptr + row * pitch
    offs = tl.arange(0, BLOCK)
    tiles = tl.cdiv(V, BLOCK)
    m = LOWEST
    p = 0.0
    c = 0.0
    s = 0.0
    m_o = LOWEST
    p_o = 0.0
    for i in tl.range(0, tiles, num_stages=STAGES):
        cols = i * BLOCK + offs
        z_t, d, _ = _load_row(
            zt_row, zs_row, bt_ptr, bs_ptr, cols, V, pitch, gain, cap_in, cap_out,
            IS_DELTA, SOFTCAP, HAS_BT, HAS_BS,
        )  # fmt: skip
        z_b, d = _orient(z_t, d, cols < V, DIRECTION)
        m, p, c, s, m_o, p_o = _fold(z_b, d, m, p, c, s, m_o, p_o, 0)
    kl, lse_b = _value(m, p, c, s, m_o, p_o)
    shift = c + kl  # log(p_other / p_base) = d - shift
    loss = kl
    mean = 0.0
    if DIRECTION == 2:
        loss = 0.0
        mass = 0.0  # sum of p_s, 1 up to the rounding of large logits: keep that out of the mean
        for i in tl.range(0, tiles, num_stages=STAGES):
            cols = (tiles - 1 - i) * BLOCK + offs
            z_t, d, _ = _load_row(
                zt_row, zs_row, bt_ptr, bs_ptr, cols, V, pitch, gain, cap_in, cap_out,
                IS_DELTA, SOFTCAP, HAS_BT, HAS_BS,
            )  # fmt: skip
            log_t = tl.where(cols < V, z_t - lse_b, float("-inf"))
            term, p_s, log_sm = _jsd_terms(tl.where(cols < V, d - shift, 0.0), log_t, beta)
            loss += tl.sum(term, 0)
            mean += tl.sum(p_s * log_sm, 0)
            mass += tl.sum(p_s, 0)
        mean = mean / mass
    tl.store(loss_ptr + row, loss)
    if NEED_GRAD:
        scale = tl.load(scale_ptr + row)
        if ROW_UNIT:  # float16 G of KL(s||t) is bounded by 2 KL + 1 instead of 1
            unit = tl.exp2(tl.ceil(tl.log2(1.0 + 2.0 * kl)))
            tl.store(unit_ptr + row, unit)
            scale = scale / unit
        g_row = g_ptr + row * stride_g
        for i in tl.range(0, tiles, num_stages=STAGES):
            cols = (tiles - 1 - i) * BLOCK + offs
            z_t, d, slope = _load_row(
                zt_row, zs_row, bt_ptr, bs_ptr, cols, V, pitch, gain, cap_in, cap_out,
                IS_DELTA, SOFTCAP, HAS_BT, HAS_BS,
            )  # fmt: skip
            if DIRECTION == 0:
                log_t = z_t - lse_b
                r = d - shift
                p_t = tl.exp(log_t)
                near = clip(r)
                g = tl.where(r == near, p_t * (near + phi(near)), tl.exp(log_t + r) - p_t)
            elif DIRECTION == 1:
                g = tl.exp(z_t + d - lse_b) * (d + c)  # d is z_s - z_t here, c = E_s[z_t - z_s]
            else:
                _, p_s, log_sm = _jsd_terms(d - shift, z_t - lse_b, beta)
                g = (1.0 - beta) * p_s * (log_sm - mean)
            g = g * (slope * scale)
            tl.debug_barrier()  # this tile has been read by every thread before G overwrites it
            tl.store(g_row + cols, rounded(g, g_ptr.dtype.element_ty), mask=cols < pitch)


@triton.jit
def fused_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    xt_ptr,  # (N, Ht)
    wt_ptr,  # (V, Ht); unused when SHARED
    bt_ptr,  # (V,)
    bs_ptr,  # (V,)
    stats_ptr,  # (splits, 6, N) float32
    N,
    V,
    H,
    HT,
    stride_x,
    stride_w,
    stride_xt,
    stride_wt,
    cols_per_split,  # a multiple of BLOCK_N
    gain,
    cap_in,
    cap_out,
    DIRECTION: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    safe_rows = tl.minimum(rows, N - 1).to(tl.int64)  # rows past the end repeat the last one
    k_offs = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + safe_rows[:, None] * stride_x
    xt_rows = xt_ptr + safe_rows[:, None] * stride_xt
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    p = tl.zeros([BLOCK_M], tl.float32)
    c = tl.zeros([BLOCK_M], tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    m_o = tl.full([BLOCK_M], LOWEST, tl.float32)
    p_o = tl.zeros([BLOCK_M], tl.float32)
    first = split * cols_per_split
    last = tl.minimum(first + cols_per_split, V)
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        safe_cols = tl.minimum(cols, V - 1).to(tl.int64)
        w_cols = w_ptr + safe_cols[None, :] * stride_w
        acc_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_t = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, H, BLOCK_K):
            ks = k + k_offs
            if EVEN_K:
                w = tl.load(w_cols + ks[:, None])
                x = tl.load(x_rows + ks[None, :])
            else:
                w = tl.load(w_cols + ks[:, None], mask=ks[:, None] < H, other=0.0)
                x = tl.load(x_rows + ks[None, :], mask=ks[None, :] < H, other=0.0)
            acc_s = _dot(x, w, acc_s)
            if SHARED:
                if EVEN_K:
                    xt = tl.load(xt_rows + ks[None, :])
                else:
                    xt = tl.load(xt_rows + ks[None, :], mask=ks[None, :] < H, other=0.0)
                acc_t = _dot(xt, w, acc_t)
        if not SHARED:
            wt_cols = wt_ptr + safe_cols[None, :] * stride_wt
            for k in range(0, HT, BLOCK_K):
                ks = k + k_offs
                if EVEN_K:
                    wt = tl.load(wt_cols + ks[:, None])
                    xt = tl.load(xt_rows + ks[None, :])
                else:
                    wt = tl.load(wt_cols + ks[:, None], mask=ks[:, None] < HT, other=0.0)
                    xt = tl.load(xt_rows + ks[None, :], mask=ks[None, :] < HT, other=0.0)
                acc_t = _dot(xt, wt, acc_t)
        m, p, c, s, m_o, p_o = _fold_wide(
            acc_t, acc_s, start, bt_ptr, bs_ptr, V, gain, cap_in, cap_out, m, p, c, s, m_o, p_o,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
    out = stats_ptr + split.to(tl.int64) * 6 * N + rows
    keep = rows < N
    tl.store(out, m, mask=keep)
    tl.store(out + N, p, mask=keep)
    tl.store(out + 2 * N, c, mask=keep)
    tl.store(out + 3 * N, s, mask=keep)
    tl.store(out + 4 * N, m_o, mask=keep)
    tl.store(out + 5 * N, p_o, mask=keep)


# --- launchers ------------------------------------------------------------------------------------


def _scalars(p: KLProblem) -> dict[str, float]:
    cap = p.spec.softcap or 1.0
    return dict(
        gain=p.spec.logit_scale / p.spec.temperature,
        cap_in=p.spec.logit_scale / cap,
        cap_out=cap / p.spec.temperature,
    )


def _biases(p: KLProblem) -> tuple[Tensor | None, Tensor | None]:
    """(teacher's bias, student's bias) as the kernels add them; a shared one cancels in a delta."""
    bias_t = p.bias if p.teacher_weight is None else p.teacher_bias
    bias_s = None if p.is_delta else p.bias
    return (
        None if bias_t is None else bias_t.contiguous(),
        None if bias_s is None else bias_s.contiguous(),
    )


def _common_unit(scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Power of two u such that G / u uses float16's range; computed on the device, no sync."""
    if dtype != torch.float16:
        return None
    largest = scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest)) - 14)


def head_arguments(
    zt: Tensor, zs: Tensor, p: KLProblem
) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """((bt_ptr, bs_ptr), gain and caps); a bias that is not there has any pointer."""
    bias_t, bias_s = _biases(p)
    biases = zt if bias_t is None else bias_t, zs if bias_s is None else bias_s
    return biases, _scalars(p)


def light_options(p: KLProblem) -> dict[str, Any]:
    """Constants and launch options that the light row kernels share."""
    bias_t, bias_s = _biases(p)
    light = LIGHT_INTERPRETED if INTERPRETED else LIGHT
    softcap = light_softcap(p.spec.softcap, p.spec.temperature)
    return dict(
        SOFTCAP=softcap,
        HAS_BT=bias_t is not None,
        HAS_BS=bias_s is not None,
        GROUPS=light.groups,
        LANES=32 * light.num_warps,
        VEC=light.vec,
        num_warps=light.num_warps,
        maxnreg=LIGHT_REGISTERS[softcap],
        enable_fp_fusion=True,
    )


@dataclass(frozen=True)
class GradientBuffers:
    """Where a row kernel writes G, and by what it divides it."""

    g: Tensor  # (C, V)
    low: Tensor  # (C, V), of use with two parts only
    scale: Tensor  # (C,) float32, factor of each row
    unit: Tensor | None  # ()
    units: Tensor  # (C,) float32, of use with row_unit only
    row_unit: bool
    two_parts: bool

    def gradient(self) -> RowGradient:
        return RowGradient(
            self.g,
            self.low if self.two_parts else None,
            self.unit,
            self.units[:, None] if self.row_unit else None,
        )


def gradient_buffers(
    zt: Tensor, zs: Tensor, scale: Tensor, place: Tensor | None, p: KLProblem
) -> GradientBuffers:
    """Buffers for G of a chunk in hidden's dtype."""
    dtype = p.hidden.dtype
    unit = _common_unit(p.scale, dtype) if p.need_grad else None
    g = zs
    if p.need_grad:
        g = gradient_place(zs, dtype) if place is None else place
    two_parts = p.need_grad and p.exact and dtype == torch.bfloat16
    return GradientBuffers(
        g=g,
        low=gradient_place(zt, dtype) if two_parts else g,
        scale=scale if unit is None else scale / unit,
        unit=unit,
        units=torch.empty_like(scale),
        row_unit=p.need_grad and dtype == torch.float16 and p.spec.direction == "reverse",
        two_parts=two_parts,
    )


def row_pass(
    zt: Tensor, zs: Tensor, scale: Tensor, place: Tensor | None, p: KLProblem
) -> tuple[Tensor, RowGradient | None]:
    """Launch the row kernel of hidden's dtype, which G takes, on a chunk."""
    count, vocab = zt.shape
    to = gradient_buffers(zt, zs, scale, place, p)
    biases, scalars = head_arguments(zt, zs, p)
    loss = torch.empty(count, dtype=torch.float32, device=zt.device)
    buffers = (zt, zs, to.g, *biases, to.scale, loss, to.units)
    sizes = (vocab, zt.stride(0), to.g.stride(0))
    common = scalars | dict(
        beta=p.spec.beta,
        DIRECTION=DIRECTION[p.spec.direction],
        NEED_GRAD=p.need_grad,
        ROW_UNIT=to.row_unit,
    )
    if p.hidden.dtype == torch.float32:
        config = ROW_CONFIG_INTERPRETED if INTERPRETED else ROW_CONFIG
        bias_t, bias_s = _biases(p)
        row_kernel[(count,)](
            *buffers, *sizes, **common,
            IS_DELTA=p.is_delta,
            SOFTCAP=p.spec.softcap is not None,
            HAS_BT=bias_t is not None,
            HAS_BS=bias_s is not None,
            BLOCK=min(config.block, max(128, triton.next_power_of_2(vocab))),
            STAGES=config.stages,
            num_warps=config.num_warps,
            maxnreg=config.max_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
    else:
        light_row_kernel[(count,)](
            *buffers, to.low, *sizes, to.low.stride(0), **common, TWO_PARTS=to.two_parts,
            **light_options(p),
        )  # fmt: skip
    return loss, to.gradient() if p.need_grad else None


def gradient_dtype(p: KLProblem) -> torch.dtype:
    """That of the GEMM which follows."""
    return p.hidden.dtype


TRITON = RowBackend(row_pass, gradient_dtype)


def splits(row_blocks: int, col_tiles: int, sms: int) -> int:
    """Column ranges per block of rows: at most two waves of the SMs, at one program each.

    Rounded down: a few programs in a third wave cost as much as a full one (8192 rows on 132 SMs:
    4 ranges fill 97 % of two waves, 5 fill 81 % of three).
    """
    return max(1, min(col_tiles, 2 * sms // row_blocks))


def _fused_reason(p: KLProblem) -> str | None:
    """Why the tile-fused path cannot take this problem (None: it can)."""
    if p.need_grad:
        return "gradients need the logits"
    if not p.fused:
        return "chunks are faster and fit"
    if p.spec.direction == "jsd":
        return "JSD needs normalized rows before its value"
    if p.hidden.dtype == torch.float32 or p.teacher_hidden.dtype != p.hidden.dtype:
        return "float32 has no tensor-core path at full precision"
    w_t = p.weight if p.teacher_weight is None else p.teacher_weight
    if not (INTERPRETED or all(map(has_aligned_rows, (p.hidden, p.teacher_hidden, p.weight, w_t)))):
        return "loads that are not vectorized spill registers"
    return "there are no rows" if p.rows == 0 else None


def has_aligned_rows(x: Tensor) -> bool:
    """Whether rows start at multiples of 16 elements, as Triton's vectorized loads need it.

    Without that the tile-fused kernels spill 8 to 664 bytes per thread. Real models have it.
    """
    if x.stride(1) != 1:  # will be copied
        return x.shape[1] % 16 == 0
    return x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def _contiguous_rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _run_fused(p: KLProblem) -> KLResult:
    """The tile-fused no-grad path."""
    x, x_t = p.take(p.hidden, 0, p.rows), p.take(p.teacher_hidden, 0, p.rows)
    w = _contiguous_rows(p.weight)
    w_t = w if p.teacher_weight is None else _contiguous_rows(p.teacher_weight)
    if INTERPRETED:
        config = FUSED_CONFIG_INTERPRETED
    else:
        major, minor = torch.cuda.get_device_capability(x.device)
        config = fused_config(10 * major + minor, p.spec.softcap is not None)
    row_blocks, col_tiles = -(-p.rows // config.block_m), -(-w.shape[0] // config.block_n)
    count = splits(row_blocks, col_tiles, sm_count(x.device)) if x.is_cuda else min(col_tiles, 3)
    per_split = -(-w.shape[0] // (count * config.block_n)) * config.block_n
    count = -(-w.shape[0] // per_split)  # no empty range after rounding up to whole tiles
    stats = torch.empty(count, STATISTICS, p.rows, dtype=torch.float32, device=x.device)
    launch_fused(p, x, w, x_t, w_t, stats, per_split, config)
    kl, _ = merge_partials(stats)
    return KLResult(kl)


def launch_fused(
    p: KLProblem,
    x: Tensor,
    w: Tensor,
    x_t: Tensor,
    w_t: Tensor,
    stats: Tensor,
    per_split: int,
    config: FusedConfig,
) -> Any:
    """Launch ``fused_kernel``."""
    bias_t, bias_s = _biases(p)
    return fused_kernel[(-(-p.rows // config.block_m), stats.shape[0])](
        x, w, x_t, w_t,
        w if bias_t is None else bias_t, w if bias_s is None else bias_s,
        stats, p.rows, w.shape[0], x.shape[1], x_t.shape[1],
        x.stride(0), w.stride(0), x_t.stride(0), w_t.stride(0), per_split,
        **_scalars(p),
        DIRECTION=DIRECTION[p.spec.direction],
        SHARED=p.teacher_weight is None,
        SOFTCAP=p.spec.softcap is not None,
        HAS_BT=bias_t is not None,
        HAS_BS=bias_s is not None,
        EVEN_K=x.shape[1] % config.block_k == 0 and x_t.shape[1] % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip


def run_triton(problem: KLProblem) -> KLResult:
    """The ``triton`` backend."""
    with on_device_of(problem.hidden):
        if _fused_reason(problem) is None:
            return _run_fused(problem)
        return run_chunked(problem, TRITON)
