"""Device functions of the linear KL's Triton kernels: series, and the head's transform."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def phi(u):
    """e^u - 1 - u for |u| <= 0.5, to float32 precision."""
    a = u * (1.0 / 40320) + 1.0 / 5040
    a = a * u + 1.0 / 720
    a = a * u + 1.0 / 120
    a = a * u + 1.0 / 24
    a = a * u + 1.0 / 6
    a = a * u + 0.5
    return a * u * u


@triton.jit
def clip(u):
    return tl.minimum(tl.maximum(u, -0.5), 0.5)


@triton.jit
def exp_capped(u):
    return tl.exp(tl.minimum(u, 80.0))


@triton.jit
def phi_any(u):
    return tl.where(tl.abs(u) <= 0.5, phi(clip(u)), exp_capped(u) - 1.0 - u)


@triton.jit
def expm1(u):
    return tl.where(tl.abs(u) <= 0.5, u + phi(clip(u)), exp_capped(u) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1 by 2 artanh(x / (2 + x)) while |x| <= 0.5."""
    y = clip(x)
    t = y / (2.0 + y)
    t2 = t * t
    a = 2.0 / 11 + t2 * (2.0 / 13)
    a = 2.0 / 9 + t2 * a
    a = 2.0 / 7 + t2 * a
    a = 2.0 / 5 + t2 * a
    a = 2.0 / 3 + t2 * a
    near = t * (2.0 + t2 * a)
    return tl.where(tl.abs(x) <= 0.5, near, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def transform(raw_t, raw_s, gain, cap_in, cap_out, IS_DELTA: tl.constexpr, SOFTCAP: tl.constexpr):
    """(z_t, z_s - z_t, dz_s/draw_s) from raw logits; see rows.head_transform."""
    raw_d = raw_s if IS_DELTA else raw_s - raw_t
    if SOFTCAP:
        x_t = raw_t * cap_in
        x_d = raw_d * cap_in
        tanh_t = tanh(x_t)
        tanh_s = tanh(x_t + x_d)
        z_t = tanh_t * cap_out
        d = tanh(x_d) * (1.0 - tanh_s * tanh_t) * cap_out
        slope = (1.0 - tanh_s * tanh_s) * gain
    else:
        z_t = raw_t * gain
        d = raw_d * gain
        slope = gain
    return z_t, d, slope
