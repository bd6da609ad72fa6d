"""Forward KL against a teacher that has been reduced to moments: exact, without the teacher.

With the student's head W frozen, softmax(W h) is an exponential family in h with the rows of W as
sufficient statistic, so KL(t||s) and its gradient need only the teacher's mean of W:

    KL = A(h_s) - gain m_t.h_s - gain b.p_t - entropy(p_t)      m_t = W^T p_t
    dKL/dh_s = gain (m_s - m_t)

:func:`teacher_moments` makes ``m_t`` once, from any teacher over the same vocabulary;
:func:`moment_kl_div` then costs two GEMMs (4NHV flop) per step where :func:`es2fast.linear_kl_div`
costs three. Alone, the moment is badly conditioned next to the teacher: the gradient is a small
difference of two large vectors, one of which went through a 16-bit GEMM. So the teacher's likeliest
tokens, the anchors, are kept apart with their probabilities and subtracted before the rounding, and
a bfloat16 head may be held in float16 (:func:`es2fast.half_head`), which leaves 8 times less noise
in the rest. What that buys, measured: docs/teacher_moments.md.

The cache in its plain form has been described publicly (J. Chang, "KL cache trick", May 2026). The
anchors, the float16 head and the refusals are ours.

This file holds the contract; the formulas are in :mod:`es2fast.ops.moments.chunked`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from es2fast.ops import backends
from es2fast.ops.arguments import Arguments
from es2fast.ops.bias import finite_bias
from es2fast.ops.checks import (
    check_bias,
    check_head,
    check_matrix,
    check_scale,
    check_tokens,
    refuse,
    vocabulary,
)
from es2fast.ops.moments.cache import TeacherMoments, head_fingerprint
from es2fast.ops.moments.chunked import MomentProblem, make_moments, run_torch
from es2fast.ops.moments.native import run_native
from es2fast.ops.tokens import (
    REDUCTIONS,
    default_chunk,
    pack,
    reduce_rows,
    row_scale,
    saved_dtype,
    scale_gradient,
    without_autocast,
)


def _run_triton(problem: MomentProblem) -> tuple[Tensor, Tensor | None]:
    from es2fast.ops.moments.triton import run_triton

    return run_triton(problem)


# The row passes' contract stands in chunked.py.
RUN: dict[str, Callable[[MomentProblem], tuple[Tensor, Tensor | None]]] = {
    "torch": run_torch,
    "triton": _run_triton,
    "native": run_native,
}


# --- checks ---------------------------------------------------------------------------------------


def _check_reduction_holds(softcap: float | None, **frozen: Tensor | None) -> None:
    """What breaks the reduction to moments: a soft-cap, a head that is trained."""
    refuse(
        softcap is not None,
        f"softcap={softcap}: a soft-capped head is not linear in its logits, so the teacher does "
        "not reduce to moments; use linear_kl_div",
    )
    for name, tensor in frozen.items():
        refuse(
            tensor is not None and tensor.requires_grad and torch.is_grad_enabled(),
            f"{name} requires grad: the moments hold for one frozen head; use linear_kl_div to "
            f"train it, or pass {name}.detach()",
        )


def _check_chunk(chunk_tokens: int | None) -> None:
    refuse(
        chunk_tokens is not None and chunk_tokens < 1,
        f"chunk_tokens={chunk_tokens}: expected a positive number, or None for the default",
    )


def _check_moments(
    hidden: Tensor, weight: Tensor, moments: TeacherMoments, options: dict[str, float | None]
) -> None:
    refuse(
        len(moments) != hidden.shape[0],
        f"hidden has {hidden.shape[0]} tokens and moments {len(moments)}: they must be the same "
        "tokens; take them with moments[index]",
    )
    refuse(
        moments.hidden_size != weight.shape[1] or moments.vocab_size > weight.shape[0],
        f"weight has shape {tuple(weight.shape)}: the moments were made for a head of "
        f"{moments.vocab_size} tokens and width {moments.hidden_size}; make them again for this "
        "head, or use linear_kl_div",
    )
    refuse(
        moments.tail_moment.device != hidden.device,
        f"moments are on {moments.tail_moment.device} and hidden on {hidden.device}: use "
        f"moments.to({str(hidden.device)!r})",
    )
    refuse(
        (moments.tail_moment.dtype == torch.float64) != (hidden.dtype == torch.float64),
        f"moments are {moments.tail_moment.dtype} and hidden {hidden.dtype}: float64 goes with "
        "float64 only; make the moments from states of the same kind",
    )
    for name, value in options.items():
        refuse(
            value is not None and value != getattr(moments, name),
            f"{name}={value}: the moments were made with {getattr(moments, name)}, which is part "
            "of them; make them again, or use linear_kl_div",
        )


# --- the public functions -------------------------------------------------------------------------


@torch.no_grad()
def teacher_moments(
    teacher_hidden: Tensor,  # (N, Ht)
    teacher_weight: Tensor,  # (V, Ht)
    weight: Tensor | None = None,  # (V, H)
    *,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    top_k: int = 16,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> TeacherMoments:
    """Reduce a teacher to what forward KL needs of it when the student's head is frozen.

    Args:
        teacher_hidden: (N, Ht) the teacher's final hidden states; bf16, fp16, fp32, fp64.
        teacher_weight: (V, Ht) the teacher's head, in teacher_hidden's dtype (or float16 beside
            bfloat16 states).
        weight: (V, H) the student's head; None: the teacher's, bias included. Make the moments
            with the very head that training will use: if that is held in float16, pass it here
            as teacher_weight (a shared head makes the value more accurate as well).
        bias: (V,) added to the student's logits (to both sides' when ``weight`` is None).
        teacher_bias: (V,) added to the teacher's logits; only with ``weight``.
        temperature, logit_scale: both sides' logits are logit_scale (W h + b) / temperature.
        top_k: anchors per token. 16 costs 128 bytes per token; 0 is the plain cache, whose
            gradient is poor next to the teacher.
        softcap: refused unless None.
        vocab_size: rows of the heads that are real tokens; the rest is padding.
        chunk_tokens: rows of logits that exist at once, in two buffers. None: 1024 to 2048 on a
            GPU, 256 on a CPU, or 32 per thread if that is more.

    Returns:
        The moments, on teacher_hidden's device: ``4 H + 8 top_k + 24`` bytes per token. No
        gradient flows into them. Takes 4NHV flop (6NHV for 16-bit heads on a GPU, where p_t goes
        through the GEMM in two parts) and one synchronization for the head's fingerprint.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.
    """
    refuse(
        weight is None and teacher_bias is not None,
        "teacher_bias is given without weight: a shared head shares its bias; pass it as bias, or "
        "pass weight too",
    )
    shared = weight is None
    student = teacher_weight if weight is None else weight
    refuse(not temperature > 0, f"temperature={temperature}: expected a positive number")
    check_scale(logit_scale)
    _check_reduction_holds(softcap)
    _check_chunk(chunk_tokens)
    t_bias = bias if shared else teacher_bias
    check_head("teacher_", teacher_hidden, teacher_weight, t_bias, half_head=True)
    check_matrix("weight", student)
    check_bias("", student, bias)
    vocab = vocabulary(teacher_weight, weight, vocab_size)
    refuse(
        not 0 <= top_k <= vocab,
        f"top_k={top_k}: expected 0 (no anchors) to {vocab}, the size of the vocabulary",
    )
    with without_autocast(teacher_hidden.device.type):
        made = make_moments(
            teacher_hidden,
            teacher_weight[:vocab],
            finite_bias(t_bias, logit_scale / temperature, vocab),
            student[:vocab],
            finite_bias(bias, logit_scale / temperature, vocab),
            shared,
            logit_scale / temperature,
            top_k,
            chunk_tokens or default_chunk(teacher_hidden, False),
        )
    return TeacherMoments(
        **vars(made),
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        vocab_size=vocab,
        head=head_fingerprint(student, bias, vocab),
    )


def moment_kl_div(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    moments: TeacherMoments,  # N tokens
    *,
    bias: Tensor | None = None,  # (V,)
    token_weights: Tensor | None = None,  # (N,)
    max_valid_tokens: int | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    backend: str | None = None,
    direction: str = "forward",
    temperature: float | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # () or (N,), float32 (float64 for float64 inputs), in nats
    """Forward KL(t||s) of a student with a frozen head from a teacher's moments.

    Args:
        hidden: (N, H) student's final hidden states; bf16, fp16, fp32 (fp64: torch backend).
        weight: (V, H) the student's frozen head, the one the moments were made with, in hidden's
            dtype. Beside bfloat16 states it may be held in float16 (:func:`es2fast.half_head`):
            same speed, 8 times less noise in the gradient, and the accuracy promised: dX within
            1e-2 down to KL 2e-4. A bfloat16 head reaches that on a GPU with a peaked teacher
            only (4 % seen in between, docs/teacher_moments.md).
        moments: of the same N tokens, in the same order. Which head they belong to is checked by
            its shape here and in full by ``moments.check_head(weight, bias)``, once per run.
        bias: (V,) added to the logits.
        token_weights, max_valid_tokens, reduction, chunk_tokens, backend: as in
            :func:`es2fast.linear_kl_div`. Extra memory is about ``4 * chunk_tokens * V`` bytes.
        direction, temperature, logit_scale, softcap: stand here to be refused: only "forward",
            only the moments' own temperature and scale (None), no soft-cap.

    Returns:
        The loss in nats, within 1e-5 (so it may be that much below 0 at the teacher). Gradients
        flow to hidden only. First derivatives only.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    Source: es2fast; plain cache: J. Chang, "KL cache trick", May 2026.
    """
    refuse(
        direction != "forward",
        f"direction={direction!r}: only forward KL reduces to moments (the gradient of reverse KL "
        "and JSD needs the teacher's logits); use linear_kl_div",
    )
    refuse(reduction not in REDUCTIONS, f"reduction={reduction!r}: expected one of {REDUCTIONS}")
    _check_reduction_holds(softcap, weight=weight, bias=bias)
    check_head("", hidden, weight, bias, half_head=True)
    _check_moments(hidden, weight, moments, dict(temperature=temperature, logit_scale=logit_scale))
    check_tokens(token_weights, max_valid_tokens, hidden.shape[0])
    _check_chunk(chunk_tokens)
    return torch.ops.es2fast.moment_kl(
        hidden=hidden,
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        tail_moment=moments.tail_moment,
        top_ids=moments.top_ids,
        top_probs=moments.top_probs,
        tail_sums=moments.tail_sums,
        token_weights=token_weights,
        max_valid_tokens=max_valid_tokens,
        gain=moments.logit_scale / moments.temperature,
        vocab=moments.vocab_size,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
        backend=backends.choose_backend(backend, hidden=hidden),
        need_dx=torch.is_grad_enabled() and hidden.requires_grad,
    )[0]


# --- the custom op --------------------------------------------------------------------------------


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail_moment: Tensor,
    top_ids: Tensor,
    top_probs: Tensor,
    tail_sums: Tensor,
    token_weights: Tensor | None,
    max_valid_tokens: int | None,
    gain: float,
    vocab: int,
    reduction: str,
    chunk_tokens: int | None,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, dX); dX is an empty tensor when it is not needed."""
    accum = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    index, weights = pack(hidden, token_weights, max_valid_tokens, accum)
    scale = row_scale(weights, reduction)
    problem = MomentProblem(
        hidden=hidden,
        weight=weight[:vocab],
        bias=finite_bias(bias, gain, vocab),
        tail_moment=tail_moment,
        top_ids=top_ids,
        top_probs=top_probs,
        tail_sums=tail_sums,
        index=index,
        scale=scale,
        gain=gain,
        chunk_tokens=chunk_tokens or default_chunk(hidden, False),
        need_dx=need_dx,
    )
    with without_autocast(hidden.device.type):
        rows, dx = RUN[backend](problem)
    loss = reduce_rows(rows * scale, reduction, index, hidden.shape[0])
    return loss, torch.empty(0) if dx is None else dx


ARGUMENTS = Arguments(_run)

_moment_kl = torch.library.custom_op("es2fast::moment_kl", mutates_args=())(_run)


@_moment_kl.register_fake
def _(*inputs):
    a = ARGUMENTS.named(inputs)
    accum = torch.float64 if a.hidden.dtype == torch.float64 else torch.float32
    shape = (a.hidden.shape[0],) if a.reduction == "none" else ()
    dx = torch.empty(a.hidden.shape, dtype=saved_dtype(a.hidden), device=a.hidden.device)
    return a.hidden.new_empty(shape, dtype=accum), dx if a.need_dx else torch.empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    _, dx = output
    a = ARGUMENTS.named(inputs)
    ctx.reduction, ctx.need_dx, ctx.dtype = a.reduction, a.need_dx, a.hidden.dtype
    ctx.save_for_backward(dx)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "moment_kl_div has no second derivatives (create_graph=True): use "
            "es2fast.ops.reference.linear_kl_div_reference where they are needed"
        )
    if grad_loss is None or not ctx.need_dx:
        return ARGUMENTS.gradients()
    (dx,) = ctx.saved_tensors
    return ARGUMENTS.gradients(hidden=scale_gradient(dx, grad_loss, ctx.reduction, ctx.dtype))


_moment_kl.register_autograd(_backward, setup_context=_setup_context)
