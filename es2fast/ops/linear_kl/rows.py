"""The row pass in plain torch: two rows of raw logits -> divergence, and its logit gradient.

Both directions of KL are one formula. Call the measure's side *base* (the teacher for KL(t||s) and
JSD, the student for KL(s||t)) and the other side *other*; with ``d = z_other - z_base``,
``c = E_base[d]`` and ``u = d - c``:

    KL(base||other)       = log1p(S) - E_base[u],  S = sum_v p_base (e^u - 1 - u) + E_base[u]
    log(p_other / p_base) = u - log1p(S) =: r      (E_base[u] is 0 up to rounding)
    forward gradient      = p_s - p_t = p_t (e^r - 1)
    reverse gradient      = -p_base (u - E_base[u])
    JSD gradient          = a p_s (l - E_s[l]),    l = log(p_s/m) = r - log1p(a (e^r - 1)),
                                                   a = 1 - beta

Every term of S is non-negative, so nothing cancels however close student and teacher are. Far from
the teacher, where S may overflow, the plain difference of logsumexps is exact enough.

Shared float32 heads go one step further: the caller hands over ``W (h_s - h_t)`` instead of the
student's logits (``is_delta``), so that the difference itself is free of cancellation; through a
soft-cap it stays so by ``tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SERIES_BELOW = 0.5  # |u| under which e^u - 1 - u is a polynomial; above, it is subtracted
DIRECT_TOLERANCE = 1e-5  # where the two forms of the value differ by more, times |logits|, direct
DIRECTION = {"forward": 0, "reverse": 1, "jsd": 2}  # the numbers of csrc/kernels.h


@dataclass(frozen=True)
class KLSpec:
    """Everything about the divergence that is not a tensor."""

    direction: str = "forward"  # a key of DIRECTION
    beta: float = 0.5
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None


def phi(u: Tensor) -> Tensor:
    """``e^u - 1 - u`` for ``|u| <= 0.5`` by its Taylor series, to the dtype's precision."""
    terms = 13 if u.dtype == torch.float64 else 7
    acc = torch.full_like(u, 1.0 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        acc.mul_(u).add_(1.0 / math.factorial(k))
    return acc.mul_(u).mul_(u)


def head_transform(
    raw_t: Tensor,  # (C, V) teacher W h + b
    raw_s: Tensor,  # (C, V) student W h + b, or their difference to the teacher's when is_delta
    spec: KLSpec,
    is_delta: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z_t, z_s - z_t, dz_s/draw_s or None when it is the constant scale / T)."""
    if spec.softcap is None:
        gain = spec.logit_scale / spec.temperature
        delta = raw_s if is_delta else raw_s - raw_t
        return raw_t * gain, delta * gain, None
    x_t = raw_t * (spec.logit_scale / spec.softcap)
    x_d = (raw_s if is_delta else raw_s - raw_t) * (spec.logit_scale / spec.softcap)
    tanh_t, tanh_s = torch.tanh(x_t), torch.tanh(x_t + x_d)
    height = spec.softcap / spec.temperature
    delta = torch.tanh(x_d).mul_(1.0 - tanh_s * tanh_t).mul_(height)
    slope = (1.0 - tanh_s * tanh_s).mul_(spec.logit_scale / spec.temperature)
    return tanh_t.mul_(height), delta, slope


def _divergence(z_b: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL(base||other) and what the gradients need: (kl, u, E[u], log p_base, log E_base[e^u])."""
    z_o = z_b + d
    lse_b = torch.logsumexp(z_b, -1, keepdim=True)
    lse_o = torch.logsumexp(z_o, -1, keepdim=True)
    log_b = z_b - lse_b
    p_b = log_b.exp()
    first = d[:, :1]  # centring in two steps keeps a common offset out of the sum's rounding
    c = first + (p_b * (d - first)).sum(-1, keepdim=True)
    u = d - c
    mean_u = (p_b * u).sum(-1, keepdim=True)
    clipped = u.clamp(-SERIES_BELOW, SERIES_BELOW)
    near = phi(clipped).mul_(p_b)
    far = (log_b + u).exp_().sub_(p_b * (1.0 + u))
    total = torch.where(u == clipped, near, far).sum(-1, keepdim=True) + mean_u
    log_ratio = torch.log1p(total)
    kl = log_ratio - mean_u
    direct = lse_o - lse_b - c
    tolerance = DIRECT_TOLERANCE * (1.0 + lse_o.abs() + lse_b.abs() + c.abs())
    agree = (kl - direct).abs() <= tolerance
    kl = torch.where(agree, kl, direct)
    log_ratio = torch.where(agree, log_ratio, direct + mean_u)
    return kl, u, mean_u, log_b, log_ratio


def _jsd_terms(r: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(the value's terms, p_s, log(p_s/m)) from r = log(p_s/p_t)."""
    a = 1.0 - beta
    p_t, p_s = log_t.exp(), (log_t + r).exp()
    # log(p_s/m): near the teacher by expm1/log1p of a small ratio, far from it by the larger side
    near = r.clamp(-SERIES_BELOW, SERIES_BELOW)
    w = torch.expm1(near)
    q = torch.exp(-r.abs())
    log_m = -torch.log(torch.where(r > 0, a + beta * q, beta + a * q))  # -log(m / larger side)
    is_near = r == near
    log_sm = torch.where(is_near, near - torch.log1p(a * w), log_m + r.clamp(max=0))
    log_tm = log_m - r.clamp(min=0)
    # near: p_t [a h(w) - h(a w)], h(w) = (1+w) log1p(w) - w >= 0
    h = (1 + w) * near - w
    aw = a * w
    h_a = (1 + aw) * torch.log1p(aw) - aw
    small = w.abs() < 0.1
    value = torch.where(small, _jsd_series(w, a), a * h - h_a).mul_(p_t)
    value = torch.where(is_near, value, beta * p_t * log_tm + a * p_s * log_sm)
    return value, p_s, log_sm


def _jsd(
    r: Tensor, log_t: Tensor, beta: float, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """JSD per row and its gradient by the student's z, from r = log(p_s/p_t)."""
    value, p_s, log_sm = _jsd_terms(r, log_t, beta)
    sums = torch.stack([value.sum(-1), (p_s * log_sm).sum(-1), p_s.sum(-1)])
    total, drawn, mass = over_ranks(sums)[..., None]
    return total, p_s.mul_(log_sm - drawn / mass).mul_(1.0 - beta)


def _jsd_series(w: Tensor, a: float) -> Tensor:
    """sum_{k>=2} (-w)^k (a - a^k) / (k (k-1)), to the dtype's precision for |w| < 0.1."""
    last = 17 if w.dtype == torch.float64 else 8
    acc = torch.zeros_like(w)
    for k in range(last, 1, -1):
        acc.mul_(-w).add_((a - a**k) / (k * (k - 1)))
    return acc.mul_(w).mul_(w)


def base_and_difference(
    raw_t: Tensor,  # (C, V) teacher's raw logits, fp32 or fp64
    raw_s: Tensor,  # (C, V) student's raw logits, or W (h_s - h_t) when is_delta
    spec: KLSpec,
    is_delta: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z_base, z_other - z_base, dz_s/draw_s or None when it is the constant scale / T)."""
    z_t, d, slope = head_transform(raw_t, raw_s, spec, is_delta)
    return (z_t + d, -d, slope) if spec.direction == "reverse" else (z_t, d, slope)


def row_divergence(
    z_b: Tensor,  # (C, V) the base's z, fp32 or fp64
    d: Tensor,  # (C, V) z_other - z_base
    slope: Tensor | None,  # (C, V) dz_s/draw_s; None: the constant scale / T
    spec: KLSpec,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergence per row (C,) and its gradient by the student's raw logits (C, V) or None."""
    kl, u, mean_u, log_b, log_ratio = _divergence(z_b, d)
    grad = None
    if spec.direction == "jsd":
        kl, grad = _jsd(u - log_ratio, log_b, spec.beta, lambda sums: sums)
    elif need_grad and spec.direction == "reverse":
        grad = log_b.exp().mul_(mean_u - u)
    elif need_grad:
        grad = _forward_gradient(log_b, u - log_ratio)
    return kl.squeeze(-1), _by_raw_logits(grad, slope, spec) if need_grad else None


def _forward_gradient(log_b: Tensor, r: Tensor) -> Tensor:
    """p_s - p_t from log p_t and r = log(p_s/p_t)."""
    near = r.clamp(-SERIES_BELOW, SERIES_BELOW)
    p_t = log_b.exp()
    return torch.where(r == near, (phi(near) + near) * p_t, (log_b + r).exp() - p_t)


def _by_raw_logits(grad: Tensor | None, slope: Tensor | None, spec: KLSpec) -> Tensor | None:
    """The gradient by z_s, overwritten, times dz_s/draw_s."""
    if grad is None:
        return None
    return grad.mul_(spec.logit_scale / spec.temperature) if slope is None else grad.mul_(slope)


# --- columns in several places --------------------------------------------------------------------


def partials(z_b: Tensor, d: Tensor) -> Tensor:
    """Statistics (6, C) of some columns (C, V), as :func:`merge_partials` merges them."""
    lowest, tiny = -1e30, torch.finfo(z_b.dtype).tiny  # columns may all be -inf
    m = z_b.amax(-1, keepdim=True).clamp(min=lowest)
    log_e = z_b - m
    e = log_e.exp()
    p = e.sum(-1, keepdim=True)
    first = d[:, :1]
    c = first + (e * (d - first)).sum(-1, keepdim=True) / p.clamp(min=tiny)
    u = d - c
    near = u.clamp(-SERIES_BELOW, SERIES_BELOW)
    far = (log_e + u).exp_().sub_(e * (1.0 + u))
    s = torch.where(u == near, phi(near).mul_(e), far).sum(-1, keepdim=True)
    z_o = z_b + d
    m_o = z_o.amax(-1, keepdim=True).clamp(min=lowest)
    p_o = (z_o - m_o).exp().sum(-1, keepdim=True)
    return torch.cat([m, p, c, s, m_o, p_o], 1).t().contiguous()


def shifted_gradient(
    z_b: Tensor,  # (C, V) the base's z of some columns
    d: Tensor,  # (C, V) z_other - z_base
    slope: Tensor | None,
    kl: Tensor,  # (C,) KL(base||other) of all columns
    merged: Tensor,  # (6, C) statistics of all columns
    spec: KLSpec,
    need_grad: bool,
    over_ranks: Callable[[Tensor], Tensor],  # sums of some columns -> of all
) -> tuple[Tensor, Tensor | None]:
    """As :func:`row_divergence` for some of the columns, from statistics of all of them."""
    top, p, centre = (x[:, None] for x in merged[:3])
    log_b, u = z_b - (top + p.log()), d - centre
    rows, grad = kl, None
    if spec.direction == "jsd":
        value, grad = _jsd(u - kl[:, None], log_b, spec.beta, over_ranks)
        rows = value.squeeze(-1)
    elif need_grad and spec.direction == "reverse":
        grad = -log_b.exp() * u
    elif need_grad:
        grad = _forward_gradient(log_b, u - kl[:, None])
    return rows, _by_raw_logits(grad, slope, spec) if need_grad else None


def merge_partials(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge per-row partials of disjoint column ranges into (KL(base||other), merged partials).

    ``parts`` is (K, 6, N), float32 or float64: max m and sumexp p of the base's z, centre
    c = E_base[d], the centred sum s = sum e^(z-m) (e^(d-c) - 1 - (d-c)), and the other side's max
    and sumexp. The K ranges come from one device (the tile-fused path) or from vocabulary-parallel
    ranks.
    """
    m, p, c, s, m_o, p_o = parts.double().unbind(1)
    top, top_o = m.amax(0), m_o.amax(0)
    shrink = (m - top).exp()
    p, s = p * shrink, s * shrink
    p_all, p_o_all = p.sum(0), (p_o * (m_o - top_o).exp()).sum(0)
    centre = c[0] + (p * (c - c[0])).sum(0) / p_all
    k = c - centre
    s_all = (s * k.exp() + p * (torch.expm1(k) - k)).sum(0)
    kl = torch.log1p(s_all / p_all)
    lse_o, lse_b = top_o + p_o_all.log(), top + p_all.log()
    direct = lse_o - lse_b - centre
    tolerance = DIRECT_TOLERANCE * (1.0 + lse_o.abs() + lse_b.abs() + centre.abs())
    kl = torch.where((kl - direct).abs() <= tolerance, kl, direct)
    merged = torch.stack([top, p_all, centre, s_all, top_o, p_o_all])
    return kl.to(parts.dtype), merged.to(parts.dtype)
