"""The Triton row kernel of the linear KL for 16-bit inputs: few instructions per logit.

As ``triton.row_kernel`` it sweeps a row of float32 raw logits forwards for the statistics and
backwards for G, written over the student's logits. What is lighter:

- A tile is (GROUPS, LANES, VEC) with LANES the threads of the block, so that every thread folds
  its own logits into its own statistics; they meet once, at the end of the row. Per thread: the
  maxima of both sides, and of the base ``sum e``, ``sum e d``, ``sum e d^2``, of the other side
  ``sum f``; ``d = z_other - z_base`` less its value in the first column, so that a common offset
  stays out of the variance.
- Exponentials are base 2 without subnormals, with log2(e) folded into their argument.
- ``shift = log E_base[e^d]`` is the difference of the logsumexps, made from the quotient of their
  sums; where the variance is below ``NEAR`` and both agree, it is mean + variance / 2.
- The value is ``sum p_base (e^r - 1 - r)``, r = d - shift, added up in the backward sweep: all of
  its terms are positive, and an error of the shift enters by its square only.
- Full tiles carry no masks; the rest of the row is one more, masked tile.
- A soft-cap takes two powers and one reciprocal for both sides (``_capped``), 87.5 instructions per
  logit forward on sm_90 and 62 registers, where three tanh of full accuracy took 240 and 102.

JSD: with ``l = log(p_s/m)``, ``l(r)`` near 0 is the cumulant series of a Bernoulli variable, whose
coefficients belong to the row, and its value's term ``v(r)`` follows from ``v' = (1-beta) e^r l``.

float32 inputs keep ``triton.row_kernel``: 16-bit inputs bound G to 4e-3, these to 2e-5. Names as in
:mod:`es2fast.ops.linear_kl.rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from es2fast.ops.linear_kl.device import transform
from es2fast.ops.triton_rows import INTERPRETED, LOWEST, rounded

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEAR = tl.constexpr(1e-4)  # variance of d under which two cumulants give the shift
SERIES = tl.constexpr(0.25)  # |r| under which series are used
LEAST = tl.constexpr(-80.0)  # r below which p_s is nothing beside p_t; e^80 is finite


@dataclass(frozen=True)
class LightConfig:
    """Launch configuration; LANES is 32 num_warps."""

    groups: int = 2
    vec: int = 4
    num_warps: int = 8

    @property
    def block(self) -> int:
        """Logits per tile."""
        return self.groups * self.vec * 32 * self.num_warps


LIGHT = LightConfig()
LIGHT_INTERPRETED = LightConfig(num_warps=2)
# Bounds on registers by light_softcap; ptxas alone takes 88 with 1 and spills 8 bytes with 2.
LIGHT_REGISTERS = (None, 64, 168)
WIDE_CAP = 1024.0  # softcap / temperature above which z needs a tanh that is accurate near 0


def light_softcap(softcap: float | None, temperature: float) -> int:
    """How the kernel caps: 0 not at all, 1 by ``_capped``, 2 by ``device.transform``."""
    if softcap is None:
        return 0
    return 1 if softcap / temperature <= WIDE_CAP else 2


@triton.jit
def _exp2(x):
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log2(x):
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _capped(raw_t, raw_s, cap_in, cap_out):
    """(z_t, z_s - z_t, slope / gain) through a soft-cap, with one reciprocal for both sides.

    With E = e^(2 cap_in raw), bounded by 2^60 so that products stay finite: tanh = 1 - 2 / (E + 1),
    tanh_s - tanh_t = 2 (E_s - E_t) / ((E_s + 1) (E_t + 1)), 1 - tanh_s^2 = 4 E_s / (E_s + 1)^2.
    For near logits E_s - E_t is E_t (e^y - 1) by its series, off by 4e-5 of itself at most. z_t
    errs by 6e-7 cap_out, all approximations included.
    """
    to_log2 = 2.0 * LOG2E * cap_in
    e_t = _exp2(tl.minimum(raw_t * to_log2, 60.0))
    e_s = _exp2(tl.minimum(raw_s * to_log2, 60.0))
    y = (raw_s - raw_t) * (2.0 * cap_in)
    series = ((y * (1.0 / 24) + 1.0 / 6) * y + 0.5) * y + 1.0
    gap = tl.where(tl.abs(y) < SERIES, e_t * y * series, e_s - e_t)
    q_t = e_t + 1.0
    h_s = e_s * 0.5 + 0.5
    r = _reciprocal(q_t * h_s)
    slope = r * q_t
    return cap_out - (2.0 * cap_out) * (r * h_s), gap * r * cap_out, slope * slope * e_s


@triton.jit
def _lane_sum(x):
    """(GROUPS, LANES, VEC) -> (LANES,), inside of the threads."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _lanes(x):
    return x[None, :, None]


@triton.jit
def _load(
    zt_row, zs_row, bt_ptr, bs_ptr, cols, V, gain, cap_in, cap_out,
    DIRECTION: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(z_base, z_other - z_base, slope / gain) of a tile; columns from V on are -inf and 0."""
    if MASKED:
        valid = cols < V
        raw_t = tl.load(zt_row + cols, mask=valid, other=0.0)
        raw_s = tl.load(zs_row + cols, mask=valid, other=0.0)
        if HAS_BT:
            raw_t += tl.load(bt_ptr + cols, mask=valid, other=0.0).to(tl.float32)
        if HAS_BS:
            raw_s += tl.load(bs_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    else:
        raw_t = tl.load(zt_row + cols)
        raw_s = tl.load(zs_row + cols)
        if HAS_BT:
            raw_t += tl.load(bt_ptr + cols).to(tl.float32)
        if HAS_BS:
            raw_s += tl.load(bs_ptr + cols).to(tl.float32)
    if SOFTCAP == 1:
        z, d, slope = _capped(raw_t, raw_s, cap_in, cap_out)
    elif SOFTCAP == 2:
        z, d, slope = transform(raw_t, raw_s, 1.0, cap_in, cap_out, False, True)
    else:
        z = raw_t * gain
        d = (raw_s - raw_t) * gain
        slope = 1.0
    if DIRECTION == 1:
        z = z + d
        d = -d
    if MASKED:
        z = tl.where(valid, z, float("-inf"))
    return z, d, slope


@triton.jit
def _fold(z, d, first_d, m, s_0, s_1, s_2, m_o, s_o):
    """Fold a tile into every thread's statistics; maxima are in units of log2."""
    b = z * LOG2E
    o = (z + d) * LOG2E
    m_new = tl.maximum(m, _lane_max(b))
    m_o_new = tl.maximum(m_o, _lane_max(o))
    shrink = _exp2(m - m_new)
    u = d - first_d
    e = _exp2(b - _lanes(m_new))
    eu = e * u
    s_0 = s_0 * shrink + _lane_sum(e)
    s_1 = s_1 * shrink + _lane_sum(eu)
    s_2 = s_2 * shrink + _lane_sum(eu * u)
    s_o = s_o * _exp2(m_o - m_o_new) + _lane_sum(_exp2(o - _lanes(m_o_new)))
    return m_new, s_0, s_1, s_2, m_o_new, s_o


@triton.jit
def across_lanes(m, s_0, s_1, s_2, m_o, s_o):
    """Every thread's statistics as those of the row."""
    top = tl.max(m, 0)
    top_o = tl.max(m_o, 0)
    w = _exp2(m - top)
    p = tl.sum(s_0 * w, 0)
    p_o = tl.sum(s_o * _exp2(m_o - top_o), 0)
    return top, p, tl.sum(s_1 * w, 0), tl.sum(s_2 * w, 0), top_o, p_o


@triton.jit
def _merge(top, p, s_1, s_2, top_o, p_o, first_d):
    """(log2 sumexp of the base, E_base[d], log E_base[e^d]) of the row."""
    mean = s_1 / p
    variance = s_2 / p - mean * mean
    shift = ((top_o - top) + tl.log2(p_o / p)) * LN2
    near = first_d + (mean + variance * 0.5)
    tolerance = 1e-6 + 2e-7 * (tl.abs(top) + tl.abs(top_o))  # what the quotient itself loses
    is_near = (variance < NEAR) & (tl.abs(near - shift) <= tolerance)
    return top + tl.log2(p), first_d + mean, tl.where(is_near, near, shift)


@triton.jit
def _kl_terms(z, d, lse, c, shift, DIRECTION: tl.constexpr):
    """(p_base (e^r - 1 - r), dKL/dz_s) of a tile."""
    r = d - shift
    log_b = z * LOG2E - lse
    p = _exp2(log_b)
    p_o = _exp2(r * LOG2E + log_b)
    first = p * r
    series = ((r * (1.0 / 120) + 1.0 / 24) * r + 1.0 / 6) * r + 0.5
    near = first * r * series
    term = tl.where(tl.abs(r) < SERIES, near, (p_o - p) - first)
    g = term + first if DIRECTION == 0 else p * (c - d)
    return term, g


@triton.jit
def _jsd_series(beta):
    """Coefficients of l(r) / r, r^0 first: cumulants of Bernoulli(beta) over factorials."""
    ab = beta * (1.0 - beta)
    skew = ab * (1.0 - 2.0 * beta)
    l_2 = -ab * 0.5
    l_3 = skew * (1.0 / 6)
    l_4 = -ab * (1.0 - 6.0 * ab) * (1.0 / 24)
    l_5 = skew * (1.0 - 12.0 * ab) * (1.0 / 120)
    return beta, l_2, l_3, l_4, l_5


@triton.jit
def _jsd_ratio(z, d, lse, shift, beta):
    """(r, log2 p_t, p_s, log(p_s/m)) of a tile."""
    l_1, l_2, l_3, l_4, l_5 = _jsd_series(beta)
    r = tl.maximum(d - shift, LEAST, propagate_nan=tl.PropagateNan.ALL)
    log_t = z * LOG2E - lse
    p_s = _exp2(r * LOG2E + log_t)
    near = ((((l_5 * r + l_4) * r + l_3) * r + l_2) * r + l_1) * r
    q = _exp2(r * -LOG2E)
    far = _log2(q * beta + (1.0 - beta)) * -LN2
    return r, log_t, p_s, tl.where(tl.abs(r) < SERIES, near, far)


@triton.jit
def _jsd_value(z, d, lse, shift, beta):
    """(value's terms, p_s log(p_s/m)) of a tile."""
    a = 1.0 - beta
    l_1, l_2, l_3, l_4, l_5 = _jsd_series(beta)
    v_2 = a * l_1 * 0.5
    v_3 = a * (l_2 + l_1) * (1.0 / 3)
    v_4 = a * (l_3 + l_2 + l_1 * 0.5) * 0.25
    v_5 = a * (l_4 + l_3 + l_2 * 0.5 + l_1 * (1.0 / 6)) * 0.2
    v_6 = a * (l_5 + l_4 + l_3 * 0.5 + l_2 * (1.0 / 6) + l_1 * (1.0 / 24)) * (1.0 / 6)
    r, log_t, p_s, log_sm = _jsd_ratio(z, d, lse, shift, beta)
    p_t = _exp2(log_t)
    drawn = p_s * log_sm
    near = p_t * (((((v_6 * r + v_5) * r + v_4) * r + v_3) * r + v_2) * r * r)
    far = a * drawn + (beta * p_t) * (log_sm - r)
    return tl.where(tl.abs(r) < SERIES, near, far), drawn


@triton.jit
def _store(row, cols, x, pitch, MASKED: tl.constexpr):
    if MASKED:
        tl.store(row + cols, x, mask=cols < pitch)
    else:
        tl.store(row + cols, x)


@triton.jit
def _backward_tile(
    zt_row, zs_row, g_row, low_row, bt_ptr, bs_ptr, cols, V, pitch, gain, cap_in, cap_out, beta,
    lse, c, shift, scale, total,
    DIRECTION: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    NEED_GRAD: tl.constexpr, TWO_PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of the backward sweep: its value (not of JSD) added to ``total``, its G stored."""
    z, d, slope = _load(
        zt_row, zs_row, bt_ptr, bs_ptr, cols, V, gain, cap_in, cap_out,
        DIRECTION, SOFTCAP, HAS_BT, HAS_BS, MASKED,
    )  # fmt: skip
    if DIRECTION == 2:
        _, _, p_s, log_sm = _jsd_ratio(z, d, lse, shift, beta)
        g = p_s * (log_sm - c)
    else:
        term, g = _kl_terms(z, d, lse, c, shift, DIRECTION)
        total += _lane_sum(term)
    if NEED_GRAD:
        wide = g * (slope * scale)
        g = rounded(wide, g_row.dtype.element_ty)
        tl.debug_barrier()  # this tile has been read by every thread before G overwrites it
        _store(g_row, cols, g, pitch, MASKED)
        if TWO_PARTS:
            rest = rounded(wide - g.to(tl.float32), low_row.dtype.element_ty)
            _store(low_row, cols, rest, pitch, MASKED)
    return total


@triton.jit
def tile_offsets(GROUPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile, (GROUPS, LANES, VEC)."""
    lanes = tl.arange(0, LANES) * VEC
    offs = (tl.arange(0, GROUPS) * (LANES * VEC))[:, None, None] + lanes[None, :, None]
    return offs + tl.arange(0, VEC)[None, None, :]


@triton.jit
def statistics_sweep(
    zt_row, zs_row, bt_ptr, bs_ptr, offs, V, gain, cap_in, cap_out,
    DIRECTION: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Forwards over a row: d in its first column, then every thread's statistics."""
    full = V // BLOCK
    rest = full * BLOCK
    _z_0, first_d, _slope_0 = _load(
        zt_row, zs_row, bt_ptr, bs_ptr, 0, V, gain, cap_in, cap_out,
        DIRECTION, SOFTCAP, HAS_BT, HAS_BS, False,
    )  # fmt: skip
    m = tl.full([LANES], LOWEST, tl.float32)
    s_0 = tl.zeros([LANES], tl.float32)
    s_1 = tl.zeros([LANES], tl.float32)
    s_2 = tl.zeros([LANES], tl.float32)
    m_o = tl.full([LANES], LOWEST, tl.float32)
    s_o = tl.zeros([LANES], tl.float32)
    for i in tl.range(0, full, num_stages=1):
        z, d, _ = _load(
            zt_row, zs_row, bt_ptr, bs_ptr, i * BLOCK + offs, V, gain, cap_in, cap_out,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, False,
        )  # fmt: skip
        m, s_0, s_1, s_2, m_o, s_o = _fold(z, d, first_d, m, s_0, s_1, s_2, m_o, s_o)
    if rest < V:
        z, d, _ = _load(
            zt_row, zs_row, bt_ptr, bs_ptr, rest + offs, V, gain, cap_in, cap_out,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, True,
        )  # fmt: skip
        m, s_0, s_1, s_2, m_o, s_o = _fold(z, d, first_d, m, s_0, s_1, s_2, m_o, s_o)
    return first_d, m, s_0, s_1, s_2, m_o, s_o


@triton.jit
def jsd_value_sweep(
    zt_row, zs_row, bt_ptr, bs_ptr, offs, V, gain, cap_in, cap_out, beta, lse, shift,
    SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Backwards over a row: every thread's (JSD, sum p_s log(p_s/m))."""
    full = V // BLOCK
    rest = full * BLOCK
    total = tl.zeros([LANES], tl.float32)
    drawn = tl.zeros([LANES], tl.float32)
    if rest < V:
        z, d, _ = _load(
            zt_row, zs_row, bt_ptr, bs_ptr, rest + offs, V, gain, cap_in, cap_out,
            2, SOFTCAP, HAS_BT, HAS_BS, True,
        )  # fmt: skip
        term, part = _jsd_value(z, d, lse, shift, beta)
        total += _lane_sum(term)
        drawn += _lane_sum(part)
    for i in tl.range(0, full, num_stages=1):
        z, d, _ = _load(
            zt_row, zs_row, bt_ptr, bs_ptr, (full - 1 - i) * BLOCK + offs, V,
            gain, cap_in, cap_out, 2, SOFTCAP, HAS_BT, HAS_BS, False,
        )  # fmt: skip
        term, part = _jsd_value(z, d, lse, shift, beta)
        total += _lane_sum(term)
        drawn += _lane_sum(part)
    return total, drawn


@triton.jit
def backward_sweep(
    zt_row, zs_row, g_row, low_row, bt_ptr, bs_ptr, offs, V, pitch, gain, cap_in, cap_out, beta,
    lse, c, shift, scale, total,
    DIRECTION: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BT: tl.constexpr, HAS_BS: tl.constexpr,
    NEED_GRAD: tl.constexpr, TWO_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backwards over a row: ``total`` and every thread's KL (nothing of JSD); G is stored."""
    full = V // BLOCK
    rest = full * BLOCK
    if rest < V:
        total = _backward_tile(
            zt_row, zs_row, g_row, low_row, bt_ptr, bs_ptr, rest + offs, V, pitch,
            gain, cap_in, cap_out, beta, lse, c, shift, scale, total,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, NEED_GRAD, TWO_PARTS, True,
        )  # fmt: skip
    for i in tl.range(0, full, num_stages=1):
        total = _backward_tile(
            zt_row, zs_row, g_row, low_row, bt_ptr, bs_ptr, (full - 1 - i) * BLOCK + offs, V,
            pitch, gain, cap_in, cap_out, beta, lse, c, shift, scale, total,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, NEED_GRAD, TWO_PARTS, False,
        )  # fmt: skip
    return total


@triton.jit
def gradient_scale(
    scale_ptr, unit_ptr, row, gain, beta, divergence,
    DIRECTION: tl.constexpr, ROW_UNIT: tl.constexpr,
):  # fmt: skip
    """The row's factor of G, and in ``unit_ptr`` by what it was divided."""
    scale = tl.load(scale_ptr + row) * gain
    if ROW_UNIT:  # float16 G of KL(s||t) is bounded by 2 KL + 1 instead of 1
        unit = tl.exp2(tl.ceil(tl.log2(1.0 + 2.0 * tl.maximum(divergence, 0.0))))
        tl.store(unit_ptr + row, unit)
        scale = scale / unit
    return scale * (1.0 - beta) if DIRECTION == 2 else scale


@triton.jit
def light_row_kernel(
    zt_ptr,  # (C, V) float32, teacher's raw logits
    zs_ptr,  # (C, V) float32, student's raw logits
    g_ptr,  # (C, V) gradient; may be the student's own memory
    bt_ptr,  # (V,)
    bs_ptr,  # (V,)
    scale_ptr,  # (C,) float32
    loss_ptr,  # (C,) float32
    unit_ptr,  # (C,) float32, power of two by which the row of G was divided
    low_ptr,  # (C, V) what rounding took from G; may be the teacher's own memory
    V,
    pitch,  # row stride of both logit buffers, at least V
    stride_g,
    stride_low,
    gain,  # logit_scale / temperature
    cap_in,  # logit_scale / softcap
    cap_out,  # softcap / temperature
    beta,
    DIRECTION: tl.constexpr,
    SOFTCAP: tl.constexpr,  # a value of light_softcap
    HAS_BT: tl.constexpr,
    HAS_BS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    zt_row = zt_ptr + row * pitch
    zs_row = zs_ptr + row * pitch
    g_row = g_ptr + row * stride_g
    low_row = low_ptr + row * stride_low
    offs = tile_offsets(GROUPS, LANES, VEC)
    first_d, m, s_0, s_1, s_2, m_o, s_o = statistics_sweep(
        zt_row, zs_row, bt_ptr, bs_ptr, offs, V, gain, cap_in, cap_out,
        DIRECTION, SOFTCAP, HAS_BT, HAS_BS, BLOCK, LANES,
    )  # fmt: skip
    top, p, s_1, s_2, top_o, p_o = across_lanes(m, s_0, s_1, s_2, m_o, s_o)
    lse, c, shift = _merge(top, p, s_1, s_2, top_o, p_o, first_d)
    total = tl.zeros([LANES], tl.float32)
    if DIRECTION == 2:
        total, drawn = jsd_value_sweep(
            zt_row, zs_row, bt_ptr, bs_ptr, offs, V, gain, cap_in, cap_out, beta, lse, shift,
            SOFTCAP, HAS_BT, HAS_BS, BLOCK, LANES,
        )  # fmt: skip
        c = tl.sum(drawn, 0)  # E_s[log(p_s/m)]
    if NEED_GRAD or DIRECTION != 2:
        scale = gradient_scale(scale_ptr, unit_ptr, row, gain, beta, shift - c, DIRECTION, ROW_UNIT)
        total = backward_sweep(
            zt_row, zs_row, g_row, low_row, bt_ptr, bs_ptr, offs, V, pitch, gain, cap_in, cap_out,
            beta, lse, c, shift, scale, total,
            DIRECTION, SOFTCAP, HAS_BT, HAS_BS, NEED_GRAD, TWO_PARTS, BLOCK,
        )  # fmt: skip
    tl.store(loss_ptr + row, tl.sum(total, 0))
