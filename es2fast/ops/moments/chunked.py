"""The two chunk loops of the teacher moments: making them, and the loss against them.

With ``z = gain (W x + b)``, gain = logit_scale / temperature, and K anchors (the teacher's
likeliest tokens), a teacher is per token its anchors' ids and probabilities and, over all other
tokens (the tail), the moment ``m = sum p_t w`` and the sums of ``p_t``, ``p_t b``, ``p_t log p_t``.

    KL    = sum_anchors p_t (log p_t - log p_s) + sum_tail p_t log p_t
            - (gain (m.x + sum_tail p_t b) - mass * A_s)                 A_s = logsumexp z_s
    dX    = gain (W^T G - m),   G = p_s - p_t at the anchors, p_s elsewhere

The value is centred: every probability meets a *log-probability* of the student, so that an offset
common to all logits cancels before anything is summed; what has one entry per token is computed in
float64. The gradient's tail is a difference of two large numbers, of which p_s has been rounded to
the GEMM's dtype: that noise, not the float32 sums, is what limits it (docs/teacher_moments.md).

A *row pass* is what differs between backends. Contract (see :data:`RowPass`):

    row_pass(zs, row_gain, top_ids, top_probs, problem) -> (row_max, row_sum, g)
      zs         (C, V) raw products x W^T in the accumulation dtype, without bias; strided rows
                 (:func:`es2fast.ops.scratch.logit_rows`). Scratch: it may be overwritten, and what
                 lies between V and the stride may be anything.
      row_gain   (C,) accumulation dtype; z[i, v] = row_gain[i] zs[i, v] + problem.gain bias[v]
      top_ids    (C, K) int32, distinct within a row; K may be 0
      top_probs  (C, K) accumulation dtype
      row_max    (C,) accumulation dtype, max_v z (any number near it will do)
      row_sum    (C,) accumulation dtype, sum_v exp(z - row_max)
      g          (C, V), None when not problem.need_dx: u (p_s - p_t), p_t only at the anchors, the
                 difference formed before rounding; u = grad_unit(g.dtype). Its dtype is the
                 weight's, or the accumulation dtype where the GEMM upcasts anyway. It may alias zs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.ops.checks import HALVES
from es2fast.ops.gemms import TORCH_GEMMS, Gemms, input_gradient
from es2fast.ops.scratch import Scratch
from es2fast.ops.tokens import PackedTokens

MOMENT_BLOCK = 2048  # tokens of the vocabulary summed in float32 before float64 takes over


@dataclass(frozen=True)
class MomentProblem(PackedTokens):
    """One call of the loss, checked: what a backend gets. Heads are cut to the real vocabulary."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    tail_moment: Tensor  # (N, H)
    top_ids: Tensor  # (N, K)
    top_probs: Tensor  # (N, K)
    tail_sums: Tensor  # (N, 3) float64: mass, sum p_t b, sum p_t log p_t
    index: Tensor | None  # (M,) rows that count; None: all
    scale: Tensor  # (M,) factor of each row in the loss
    gain: float  # logit_scale / temperature
    chunk_tokens: int
    need_dx: bool


# (raw student logits, gain of each row, anchors' ids, anchors' p_t, problem)
#   -> (row maximum, sum of exponentials, G)
RowPass = Callable[
    [Tensor, Tensor, Tensor, Tensor, MomentProblem], tuple[Tensor, Tensor, Tensor | None]
]


def grad_unit(dtype: torch.dtype) -> float:
    """The factor of G: float16 gets its range by 2^15 (|G| <= 1), the others need none."""
    return 2.0**15 if dtype == torch.float16 else 1.0


# --- the head -------------------------------------------------------------------------------------


def head_input(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(x in the head's dtype, factor per row that undoes its scaling or None).

    A bfloat16 row beside a float16 head is scaled by a power of two so that its largest entry is
    just below 2^15: exact for all entries down to 2^-32 of the largest.
    """
    if x.dtype == weight.dtype:
        return x, None
    wide = x.float()
    exponent = torch.frexp(wide.abs().amax(1).clamp(min=2.0**-100))[1]
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 15)
    return (wide / unit[:, None]).to(weight.dtype), unit


def raw_logits(
    x: Tensor, weight: Tensor, out: Tensor, gain: float, gemms: Gemms = TORCH_GEMMS
) -> Tensor:
    """``out = x W^T`` up to a factor per row; returns (C,), what makes it ``gain x W^T``."""
    x, unit = head_input(x, weight)
    gemms.logits_into(x, weight, out)
    if unit is None:
        return torch.full((x.shape[0],), gain, dtype=out.dtype, device=out.device)
    return (unit * gain).to(out.dtype)


def add_gain(zs: Tensor, row_gain: Tensor, bias: Tensor | None, gain: float) -> Tensor:
    """Raw logits -> z, in place."""
    zs.mul_(row_gain[:, None])
    return zs if bias is None else zs.add_(bias.to(zs.dtype), alpha=gain)


# --- making the moments ---------------------------------------------------------------------------


@dataclass
class TeacherSums:
    """What :func:`make_moments` returns; shapes as in MomentProblem."""

    tail_moment: Tensor
    top_ids: Tensor
    top_probs: Tensor
    tail_sums: Tensor


def precise_gradient(p: Tensor, weight: Tensor) -> Tensor:
    """``p @ weight``, p kept to 16 bits at least and summed over the vocabulary in float64.

    A 16-bit GEMM on a GPU would round p to 8 or 11 bits; it gets p in two parts instead. p is of
    one sign: a float32 accumulator over 128k tokens drifts (7e-6 of 1 was seen), blocks do not.
    """
    split = p.is_cuda and weight.dtype in HALVES
    product = split_gradient if split else _plain_gradient
    out = torch.zeros(p.shape[0], weight.shape[1], dtype=torch.float64, device=p.device)
    for v in range(0, weight.shape[0], MOMENT_BLOCK):
        out += product(p[:, v : v + MOMENT_BLOCK], weight[v : v + MOMENT_BLOCK])
    return out.to(p.dtype)


def _plain_gradient(p: Tensor, weight: Tensor) -> Tensor:
    return input_gradient(p, weight, p.dtype)


def split_gradient(p: Tensor, weight: Tensor) -> Tensor:
    """``p @ weight`` by two GEMMs in the weight's 16-bit dtype, p = coarse + fine."""
    unit = grad_unit(weight.dtype)
    scaled = p * unit
    coarse = scaled.to(weight.dtype)
    out = input_gradient(coarse, weight, p.dtype)
    fine = scaled.sub_(coarse).to(weight.dtype)
    return out.add_(input_gradient(fine, weight, p.dtype)).div_(unit)


def make_moments(
    teacher_hidden: Tensor,  # (N, Ht)
    teacher_weight: Tensor,  # (V, Ht)
    teacher_bias: Tensor | None,  # (V,)
    weight: Tensor,  # (V, H) the student's head
    bias: Tensor | None,  # (V,) the student's bias
    shared: bool,  # teacher's and student's head and bias are the same
    gain: float,
    top_k: int,
    chunk_tokens: int,
) -> TeacherSums:
    """The moments of every token: two or three GEMMs per chunk."""
    n, (vocab, width), device = teacher_hidden.shape[0], weight.shape, teacher_hidden.device
    acc = torch.float64 if teacher_hidden.dtype == torch.float64 else torch.float32
    made = TeacherSums(
        torch.empty(n, width, dtype=acc, device=device),
        torch.empty(n, top_k, dtype=torch.int32, device=device),
        torch.empty(n, top_k, dtype=acc, device=device),
        torch.zeros(n, 3, dtype=torch.float64, device=device),
    )
    chunk = max(1, min(chunk_tokens, n))
    with Scratch() as scratch:
        z_rows = scratch.logit_rows(chunk, vocab, acc, device)
        p_rows = scratch.logit_rows(chunk, vocab, acc, device)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            count = rows.stop - rows.start
            z, p = z_rows[:count], p_rows[:count]
            x = teacher_hidden[rows].contiguous()
            add_gain(z, raw_logits(x, teacher_weight, z, gain), teacher_bias, gain)
            _chunk_moments(z, p, x if shared else None, weight, bias, gain, made, rows)
    return made


def _chunk_moments(
    z: Tensor,  # (C, V) the teacher's logits; overwritten
    p: Tensor,  # (C, V) scratch
    x: Tensor | None,  # (C, H) the teacher's states when the head is shared
    weight: Tensor,
    bias: Tensor | None,
    gain: float,
    made: TeacherSums,
    rows: slice,
) -> None:
    """With a shared head, ``sum p_t log p_t`` over the tail is taken from the moment itself.

    That is what the loss will subtract from it, so whatever rounding the moment and the logits'
    GEMM have in common cancels: the value's error shrinks with the distance to the teacher.
    """
    top_k = made.top_ids.shape[1]
    top_z = z.amax(1)
    z.sub_(top_z[:, None])
    torch.exp(z, out=p)
    top, ids = torch.topk(p, top_k, dim=1)
    p.scatter_(1, ids, 0.0)
    total = p.sum(1, dtype=torch.float64) + top.sum(1, dtype=torch.float64)
    p.div_(total.to(p.dtype)[:, None])
    made.top_ids[rows] = ids.to(torch.int32)
    made.top_probs[rows] = (top.double() / total[:, None]).to(p.dtype)
    tail = made.tail_moment[rows]
    tail.copy_(precise_gradient(p, weight))
    sums = made.tail_sums[rows]
    sums[:, 0] = p.sum(1, dtype=torch.float64)
    if x is None:
        tail_log = z.mul_(p).sum(1, dtype=torch.float64) - total.log() * sums[:, 0]
    if bias is not None:
        sums[:, 1] = torch.mul(p, bias.to(p.dtype), out=z).sum(1, dtype=torch.float64)
    if x is not None:
        tail_z = (tail.double() * x.double()).sum(1) + sums[:, 1]
        tail_log = gain * tail_z - (top_z + total.log()) * sums[:, 0]
    sums[:, 2] = tail_log


# --- the loss -------------------------------------------------------------------------------------


def run_moments(
    p: MomentProblem, row_pass: RowPass, gemms: Gemms = TORCH_GEMMS
) -> tuple[Tensor, Tensor | None]:
    """(KL of every packed row (M,), dX (N, H) scaled by ``scale`` or None)."""
    vocab, acc = p.weight.shape[0], p.accum_dtype
    chunk = max(1, min(p.chunk_tokens, p.rows))
    with Scratch() as scratch:
        raw = scratch.logit_rows(chunk, vocab, acc, p.hidden.device)
        values = torch.empty(p.rows, dtype=acc, device=p.hidden.device)
        dx = p.empty_dx() if p.need_dx else None
        for start in range(0, p.rows, chunk):
            stop = min(start + chunk, p.rows)
            x = p.take(p.hidden, start, stop)
            ids, probs = p.take(p.top_ids, start, stop), p.take(p.top_probs, start, stop)
            tail = p.take(p.tail_moment, start, stop)
            zs = raw[: stop - start]
            row_gain = raw_logits(x, p.weight, zs, p.gain, gemms)
            top_z = _anchor_logits(p, zs, row_gain, ids)  # before the row pass, which may overwrite
            row_max, row_sum, g = row_pass(zs, row_gain, ids, probs, p)
            sums = p.take(p.tail_sums, start, stop)
            values[start:stop] = _value(x, tail, sums, probs, top_z, row_max, row_sum, p.gain)
            if dx is not None and g is not None:
                made = gemms.input_gradient(g, p.weight, acc).div_(grad_unit(g.dtype)).sub_(tail)
                p.put(dx, start, stop, made.mul_(p.scale[start:stop, None] * p.gain))
    return values, dx


def _anchor_logits(p: MomentProblem, zs: Tensor, row_gain: Tensor, ids: Tensor) -> Tensor:
    """(C, K) the student's z at the anchors, float64."""
    index = ids.long()
    z = zs.gather(1, index).double() * row_gain.double()[:, None]
    return z if p.bias is None else z + p.bias[index].double() * p.gain


def _value(
    x: Tensor,  # (C, H)
    tail: Tensor,  # (C, H)
    sums: Tensor,  # (C, 3)
    probs: Tensor,  # (C, K)
    top_z: Tensor,  # (C, K)
    row_max: Tensor,  # (C,)
    row_sum: Tensor,  # (C,)
    gain: float,
) -> Tensor:
    """(C,) KL in float64; the formula of the module docstring."""
    log_norm = row_max.double() + row_sum.double().log()
    wide = probs.double()
    anchors = torch.xlogy(wide, wide) - wide * (top_z - log_norm[:, None])
    mass, tail_bias, tail_log = sums.unbind(1)
    tail_z = (tail.double() * x.double()).sum(1) + tail_bias
    return anchors.sum(1) + tail_log - (gain * tail_z - mass * log_norm)


def torch_row_pass(
    zs: Tensor, row_gain: Tensor, top_ids: Tensor, top_probs: Tensor, p: MomentProblem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The row pass in plain torch. G is rounded to 16 bits only where a 16-bit GEMM follows."""
    add_gain(zs, row_gain, p.bias, p.gain)
    row_max = zs.amax(1)
    zs.sub_(row_max[:, None]).exp_()
    row_sum = zs.sum(1)
    if not p.need_dx:
        return row_max, row_sum, None
    g = zs.div_(row_sum[:, None]).scatter_add_(1, top_ids.long(), -top_probs)
    if g.is_cuda and p.weight.dtype in HALVES:
        g = g.mul_(grad_unit(p.weight.dtype)).to(p.weight.dtype)
    return row_max, row_sum, g


def run_torch(problem: MomentProblem) -> tuple[Tensor, Tensor | None]:
    """The ``torch`` backend: any device, any floating dtype."""
    return run_moments(problem, torch_row_pass)


def rounded_row_pass(
    zs: Tensor, row_gain: Tensor, top_ids: Tensor, top_probs: Tensor, p: MomentProblem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``torch_row_pass`` with G in the weight's dtype anywhere: a GPU's rounding on a CPU."""
    row_max, row_sum, g = torch_row_pass(zs, row_gain, top_ids, top_probs, p)
    if g is not None and p.weight.dtype in HALVES and g.dtype != p.weight.dtype:
        g = g.mul_(grad_unit(p.weight.dtype)).to(p.weight.dtype)
    return row_max, row_sum, g
