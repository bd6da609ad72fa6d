"""Fused linear KL: the divergence between two language models from hidden states and LM heads.

With ``z = softcap(logit_scale (W h + b)) / temperature`` on both sides (softcap(x) = c tanh(x/c)):

    forward  KL(t||s) = sum_v p_t log(p_t/p_s)          reverse  KL(s||t)
    jsd      beta KL(t||m) + (1-beta) KL(s||m),  m = beta t + (1-beta) s

Value and gradients are made in the forward pass, chunk by chunk of tokens, so that no more than
``chunk_tokens`` rows of logits ever exist (:mod:`es2fast.ops.linear_kl.chunked`); backward only
multiplies the saved gradients by ``grad_output``, out of place. Logits stay in float32 from the
GEMM's accumulator on and p_s - p_t is formed without cancellation, so that the gradient is right
where ES2 works, next to the teacher.

What is saved for backward are gradients, never an alias of a weight: under ZeRO-3 the head may be
partitioned again between forward and backward. One exception, stated in the docstring:
``reduction="none"`` with a trainable head, whose dW cannot be known before ``grad_output``.

This file holds the contract: the checks, the choice of the backend, the packing of tokens and the
autograd glue, as one ``torch.library.custom_op`` (torch.compile sees one node).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from es2fast.ops import backends
from es2fast.ops.arguments import Arguments
from es2fast.ops.bias import finite_bias
from es2fast.ops.checks import check_head, check_scale, check_tokens, refuse, vocabulary
from es2fast.ops.linear_kl.chunked import (
    FEW_TOKENS,
    KLProblem,
    KLResult,
    deciding_first,
    few_decide,
    run_torch,
)
from es2fast.ops.linear_kl.native import run_native
from es2fast.ops.linear_kl.rows import DIRECTION, KLSpec
from es2fast.ops.tokens import (
    REDUCTIONS,
    default_chunk,
    is_short_of_memory,
    pack,
    reduce_rows,
    row_scale,
    saved_dtype,
    scale_gradient,
    without_autocast,
)
from es2fast.transfer import to_device

# --- backends -------------------------------------------------------------------------------------


def _run_triton(problem: KLProblem) -> KLResult:
    from es2fast.ops.linear_kl.triton import run_triton

    return run_triton(problem)


RUN: dict[str, Callable[[KLProblem], KLResult]] = {
    "torch": run_torch,
    "triton": _run_triton,
    "native": run_native,
}


# --- checks ---------------------------------------------------------------------------------------


def check_teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
) -> None:
    """The teacher's side fits the student's and is not trained."""
    refuse(
        teacher_weight is None and teacher_bias is not None,
        "teacher_bias is given without teacher_weight: a shared head shares its bias; pass "
        "teacher_weight too, or drop teacher_bias",
    )
    check_head(
        "teacher_",
        teacher_hidden,
        weight if teacher_weight is None else teacher_weight,
        teacher_bias,
    )
    refuse(
        hidden.device != teacher_hidden.device,
        f"hidden is on {hidden.device} and teacher_hidden on {teacher_hidden.device}: move one of "
        "them",
    )
    refuse(
        hidden.shape[0] != teacher_hidden.shape[0],
        f"hidden has {hidden.shape[0]} tokens and teacher_hidden {teacher_hidden.shape[0]}: they "
        "must be the same tokens",
    )
    refuse(
        (hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64),
        f"hidden is {hidden.dtype} and teacher_hidden {teacher_hidden.dtype}: float64 goes with "
        "float64 only; cast the other side",
    )
    if torch.is_grad_enabled():
        teacher = dict(
            teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias
        )
        for name, tensor in teacher.items():
            refuse(
                tensor is not None and tensor.requires_grad,
                f"{name} requires grad: the teacher is not trained; pass {name}.detach()"
                + (" or teacher_weight=None for a shared head" if name != "teacher_hidden" else ""),
            )


def check_options(
    direction: str, beta: float, temperature: float, softcap: float | None, reduction: str
) -> None:
    """Options that are no tensors."""
    refuse(
        direction not in DIRECTION, f"direction={direction!r}: expected one of {tuple(DIRECTION)}"
    )
    refuse(reduction not in REDUCTIONS, f"reduction={reduction!r}: expected one of {REDUCTIONS}")
    refuse(not temperature > 0, f"temperature={temperature}: expected a positive number")
    refuse(
        softcap is not None and not softcap > 0,
        f"softcap={softcap}: expected a positive number, or None for a head without soft-cap",
    )
    refuse(
        direction == "jsd" and not 0 < beta < 1,
        f"beta={beta}: JSD is zero outside 0 < beta < 1; for its limits use direction='forward' "
        "or 'reverse'",
    )


# --- the public op --------------------------------------------------------------------------------


def linear_kl_div(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, Ht)
    teacher_weight: Tensor | None = None,  # (V, Ht)
    *,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,  # (N,)
    max_valid_tokens: int | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    grad_buffer_bytes: int | None = None,
    low_memory: bool | None = None,
    exact: bool | None = None,
    backend: str | None = None,
) -> Tensor:  # () or (N,), float32 (float64 for float64 inputs), in nats
    """Divergence of a student from a teacher language model, without holding their logits.

    Args:
        hidden: (N, H) student's final hidden states; bf16, fp16, fp32 (fp64: torch backend).
        weight: (V, H) student's LM head, in hidden's dtype.
        teacher_hidden: (N, Ht) the teacher's final hidden states of the same tokens.
        teacher_weight: (V, Ht) the teacher's head. None: the student's head (weight and bias) is
            shared; no gradient flows through the teacher's use of it.
        bias, teacher_bias: (V,) added to the logits. -inf, a token that is never said, counts as
            128 logits below the lowest other bias: one that the other side alone says costs some
            128 p instead of inf.
        direction: "forward" KL(t||s), "reverse" KL(s||t) or "jsd".
        beta: teacher's share of the mixture in JSD, 0 < beta < 1.
        temperature: divides the logits last. No T^2 factor is applied.
        logit_scale: multiplies W h + b (Granite divides, Cohere multiplies: pass the factor).
        softcap: c of c tanh(z/c), after the scale (Gemma 2); None: none.
        vocab_size: rows of the heads that are real tokens; the rest is padding and costs nothing.
        token_weights: (N,) bool or real. Tokens of weight zero cost nothing: the others are
            gathered chunk by chunk. Their number must be known to the host: weights on the CPU
            cost no synchronization (recommended: the mask comes from the data loader), weights on
            a GPU cost one per call, or none with ``max_valid_tokens``.
        max_valid_tokens: an upper bound on the non-zero weights that the caller knows; N when there
            are no zeros to drop. A bound that is too small makes the loss NaN instead of dropping
            tokens; up to the bound, tokens of weight zero are computed and must be finite.
        reduction: "mean" is sum(w_i KL_i) / sum(w_i) (0 when all weights are 0), "sum", or "none",
            the (N,) values w_i KL_i. "none" with a trainable head recomputes in backward, where
            head and hidden states must still be there: with ZeRO-3 use "mean" or "sum".
        chunk_tokens: rows of logits that exist at once; extra memory is about
            ``8 * chunk_tokens * V`` bytes (triton). None: on a GPU what fills its SMs, 1024 to
            2048 rows, twice that when its head is trained; on a CPU 32 per thread, 256 at least,
            and the thread keeps these bytes for its next call (two buffers, each of 1 GiB at most).
        grad_buffer_bytes: what a trained head's G, 2 V bytes per token in 16 bits, may take so that
            dW is one GEMM straight to the weight's dtype. None: 4 V H, the bytes of the float32 dW
            which that saves: enough for N = 2H tokens in 16 bits. With more tokens dW is added up
            in float32, one GEMM per buffer (of half that by default); with 0 one per chunk.
        low_memory: True: without gradients no logits are stored where the backend can do so
            (triton; 16 bits; KL), which is slower. None: where ``chunk_tokens`` is None and the
            chunk's logits would take more than half of the GPU's free memory.
        exact: True: a bfloat16 G is the sum of two, for one more GEMM each in dX and dW. None:
            where fewer than 64 tokens decide the gradient, whose roundings would not average out:
            (sum w^2)^2 / sum w^4 < 64; under a frozen head of the largest weights only, as far as
            they decide. Weights on a GPU with ``max_valid_tokens`` are not looked
            at, which would synchronise: then ``max_valid_tokens`` < 64.
        backend: "triton", "torch", "native", or None for the best one on hidden's device.

    Precision follows the inputs' dtype, whatever autocast says. float32 GEMMs on a GPU follow
    ``torch.set_float32_matmul_precision``: the accuracy tested here is that of the default.

    Returns:
        The loss in nats. Gradients flow to hidden, and to weight and bias if they require grad
        (only then is dW computed). First derivatives only.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    Source: the definitions above; JSD as in Agarwal et al., arXiv 2306.13649.
    """
    check_options(direction, beta, temperature, softcap, reduction)
    check_scale(logit_scale)
    check_head("", hidden, weight, bias)
    check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias)
    check_tokens(token_weights, max_valid_tokens, hidden.shape[0])
    refuse(
        chunk_tokens is not None and chunk_tokens < 1,
        f"chunk_tokens={chunk_tokens}: expected a positive number, or None for the default",
    )
    refuse(
        grad_buffer_bytes is not None and grad_buffer_bytes < 0,
        f"grad_buffer_bytes={grad_buffer_bytes}: expected 0 or more, or None for the default",
    )
    vocab = vocabulary(weight, teacher_weight, vocab_size)
    chosen = backends.choose_backend(backend, hidden=hidden, teacher_weight=teacher_weight)
    grad = torch.is_grad_enabled()
    outputs = torch.ops.es2fast.linear_kl(
        hidden=hidden,
        weight=weight,
        bias=bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        token_weights=token_weights,
        max_valid_tokens=max_valid_tokens,
        direction=direction,
        beta=float(beta),
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        vocab=vocab,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
        grad_buffer_bytes=grad_buffer_bytes,
        low_memory=low_memory,
        exact=exact,
        backend=chosen,
        need_dx=grad and hidden.requires_grad,
        need_dw=grad and weight.requires_grad,
        need_db=grad and bias is not None and bias.requires_grad,
    )
    return outputs[0]


# --- the custom op --------------------------------------------------------------------------------


def _padded(gradient: Tensor | None, like: Tensor | None) -> Tensor:
    """A gradient in ``like``'s size, zero on padding rows; empty when not asked for."""
    if gradient is None or like is None:
        return torch.empty(0)
    dtype = saved_dtype(like)
    if gradient.shape == like.shape:
        return gradient.to(dtype)
    full = torch.zeros(like.shape, dtype=dtype, device=gradient.device)
    full[: gradient.shape[0]] = gradient
    return full


def decided_by_few(weights: Tensor, given: Tensor | None, max_valid: int | None) -> bool:
    """``few_decide`` where looking at the weights costs no synchronization of its own."""
    if given is None or (given.is_cuda and max_valid is not None):
        return weights.shape[0] < FEW_TOKENS
    return few_decide(given)


def _seen(given: Tensor | None, max_valid: int | None) -> Tensor | None:
    """The weights that `pack` keeps, in its order, where looking at them costs no synchronization
    of its own."""
    if given is None:
        return None
    if max_valid is None:
        return given[given != 0]
    return None if given.is_cuda or max_valid < given.shape[0] else given


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    token_weights: Tensor | None,
    max_valid_tokens: int | None,
    direction: str,
    beta: float,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    vocab: int,
    reduction: str,
    chunk_tokens: int | None,
    grad_buffer_bytes: int | None,
    low_memory: bool | None,
    exact: bool | None,
    backend: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dX, dW, db); a gradient that is not needed now is an empty tensor."""
    if _made_later(reduction, need_dw, need_db):
        need_dx = need_dw = need_db = False
    accum = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    index, weights = pack(hidden, token_weights, max_valid_tokens, accum)
    need_grad = need_dx or need_dw or need_db
    chunk = chunk_tokens or default_chunk(hidden, need_dw)
    if low_memory is None and not need_grad and chunk_tokens is None:
        low_memory = is_short_of_memory(8 * min(chunk, weights.shape[0]) * vocab, hidden.device)
    exact_rows = None
    if exact is None:
        exact = need_grad and decided_by_few(weights, token_weights, max_valid_tokens)
        seen = None if need_dw or not exact else _seen(token_weights, max_valid_tokens)
        if seen is not None:
            order, exact_rows = deciding_first(seen)
            order = to_device(order, hidden.device)
            index = order if index is None else index[order]
            weights = weights[order]
    scale = row_scale(weights, reduction)
    problem = KLProblem(
        hidden=hidden,
        weight=weight[:vocab],
        bias=finite_bias(bias, logit_scale / temperature, vocab),
        teacher_hidden=teacher_hidden,
        teacher_weight=None if teacher_weight is None else teacher_weight[:vocab],
        teacher_bias=finite_bias(teacher_bias, logit_scale / temperature, vocab),
        index=index,
        scale=scale,
        spec=KLSpec(direction, beta, temperature, logit_scale, softcap),
        chunk_tokens=chunk,
        fused=bool(low_memory),
        need_dx=need_dx,
        need_dw=need_dw,
        need_db=need_db,
        exact=exact,
        exact_rows=exact_rows,
        buffer_bytes=grad_buffer_bytes,
    )
    with without_autocast(hidden.device.type):
        result = RUN[backend](problem)
    loss = reduce_rows(result.rows * scale, reduction, index, hidden.shape[0])
    dx = torch.empty(0) if result.dx is None else result.dx
    return loss, dx, _padded(result.dw, weight), _padded(result.db, bias)


ARGUMENTS = Arguments(_run)
TENSORS = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias",
           "token_weights")  # fmt: skip
TRAINED = ("hidden", "weight", "bias")  # in the order of the op's gradients

_linear_kl = torch.library.custom_op("es2fast::linear_kl", mutates_args=())(_run)


def _made_later(reduction: str, need_dw: bool, need_db: bool) -> bool:
    """A head's gradient can only be made with the factor of every token, which backward brings."""
    return reduction == "none" and (need_dw or need_db)


def _wanted(a: SimpleNamespace) -> dict[str, Tensor]:
    """The tensors whose gradients are needed, by name."""
    needs = zip(TRAINED, (a.need_dx, a.need_dw, a.need_db))
    return {name: getattr(a, name) for name, needed in needs if needed}


@_linear_kl.register_fake
def _(*inputs):
    a = ARGUMENTS.named(inputs)
    wanted = {} if _made_later(a.reduction, a.need_dw, a.need_db) else _wanted(a)
    accum = torch.float64 if a.hidden.dtype == torch.float64 else torch.float32
    shape = (a.hidden.shape[0],) if a.reduction == "none" else ()
    return (
        a.hidden.new_empty(shape, dtype=accum),
        *(
            torch.empty(like.shape, dtype=saved_dtype(like), device=like.device)
            if (like := wanted.get(name)) is not None
            else torch.empty(0)
            for name in TRAINED
        ),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    _, *gradients = output
    a = ARGUMENTS.named(inputs)
    ctx.reduction = a.reduction
    ctx.dtypes = {name: tensor.dtype for name, tensor in _wanted(a).items()}
    ctx.recompute = _made_later(a.reduction, a.need_dw, a.need_db)
    if ctx.recompute:
        ctx.options = {name: value for name, value in vars(a).items() if name not in TENSORS}
        ctx.save_for_backward(*(getattr(a, name) for name in TENSORS))
    else:
        ctx.save_for_backward(*gradients)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_kl_div has no second derivatives (create_graph=True): use "
            "es2fast.ops.reference.linear_kl_div_reference where they are needed"
        )
    if grad_loss is None:
        return ARGUMENTS.gradients()
    made = dict(zip(TRAINED, _recompute(ctx, grad_loss) if ctx.recompute else ctx.saved_tensors))
    if ctx.recompute:  # with grad_loss among the weights
        return ARGUMENTS.gradients(**{n: made[n].to(dtype) for n, dtype in ctx.dtypes.items()})
    return ARGUMENTS.gradients(
        **{
            name: scale_gradient(made[name], grad_loss, ctx.reduction, dtype)
            for name, dtype in ctx.dtypes.items()
        }
    )


def _recompute(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_i grad_i w_i KL_i, for reduction "none" with a trainable head."""
    tensors = dict(zip(TENSORS, ctx.saved_tensors))
    weights = tensors["token_weights"]
    device_weights = 1.0 if weights is None else weights.to(grad_loss.device)
    tensors["token_weights"] = grad_loss * device_weights
    options = ctx.options | dict(max_valid_tokens=None, reduction="sum")
    return torch.ops.es2fast.linear_kl(**tensors, **options)[1:]


_linear_kl.register_autograd(_backward, setup_context=_setup_context)
