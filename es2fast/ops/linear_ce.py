"""Cross-entropy of a language model against given next tokens, from hidden states and LM head.

With ``z = softcap(logit_scale (W h + b))`` and target y:

    loss = sum_i w_i (log sum_v exp z_iv - z_iy)

Value and gradients are made in the forward pass, chunk by chunk of tokens, as the linear KL does:
no more than ``chunk_tokens`` rows of logits ever exist, and what is saved for backward are
gradients, never an alias of the weight, which ZeRO-3 may partition again in between. Logits are
float32 (float64 for float64 inputs) from the GEMM's accumulator on. Plain torch on every device:
the refusal anchor sees a few dozen tokens per row, where the KL beside it sees hundreds.

The head may lie on several ranks (:mod:`.zero3_linear_ce`): a row's statistics, its largest logit,
its logsumexp, the target's logit and whether that is the largest, are then those of the own columns
and merged with the other ranks' before the gradient is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from es2fast.ops.checks import check_head, refuse
from es2fast.ops.gemms import (
    add_weight_gradient,
    has_mixed_gemm,
    input_gradient,
    logits_into,
)
from es2fast.ops.scratch import Scratch
from es2fast.ops.tokens import default_chunk, saved_dtype, without_autocast


def linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    token_weights: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:  # (), (N,) bool
    """Weighted sum of token cross-entropies in nats, and where the target is the likeliest token.

    Args:
        hidden: (N, H) final hidden states, each the one that predicts its target.
        weight: (V, H) LM head, in hidden's dtype.
        targets: (N,) int64 ids of the tokens to be predicted.
        token_weights: (N,) real; the loss is the sum, not the mean.
        bias: (V,) added to the logits.
        logit_scale: multiplies W h + b.
        softcap: c of c tanh(z/c), after the scale; None: none.
        chunk_tokens: rows of logits that exist at once; None: as the linear KL.

    Returns:
        (loss, hits): float32 scalar (float64 for float64 inputs) with gradients to hidden, weight
        and bias where they require grad, first derivatives only; (N,) bool.

    Raises:
        ValueError: shapes or dtypes that do not fit; the message names the argument.
    """
    check_head("", hidden, weight, bias)
    check_targets(hidden, targets, token_weights, chunk_tokens)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    accum = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    problem = CEProblem(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        targets=targets.to(hidden.device),
        scale=token_weights.to(hidden.device, accum),
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_tokens=chunk_tokens or default_chunk(hidden, needs[1]),
        needs=needs,
        saved_dtype=saved_dtype(hidden),
    )
    return _LinearCrossEntropy.apply(hidden, weight, bias, problem)


def check_targets(
    hidden: Tensor, targets: Tensor, token_weights: Tensor, chunk_tokens: int | None
) -> None:
    """One target and one weight per token; a chunk has tokens."""
    for name, tensor in (("targets", targets), ("token_weights", token_weights)):
        refuse(
            tuple(tensor.shape) != (hidden.shape[0],),
            f"{name} has shape {tuple(tensor.shape)}: expected ({hidden.shape[0]},), one per token",
        )
    refuse(
        chunk_tokens is not None and chunk_tokens < 1,
        f"chunk_tokens={chunk_tokens}: expected a positive number, or None for the default",
    )


@dataclass(frozen=True)
class CEProblem:
    """One call, checked; with `merged` the rows of the head are those from `first` on of V."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    scale: Tensor  # (N,) in the accumulation dtype
    logit_scale: float
    softcap: float | None
    chunk_tokens: int
    needs: tuple[bool, ...]  # gradients by hidden, weight, bias
    saved_dtype: torch.dtype  # of dX
    first: int = 0
    merged: Callable[[Tensor], Tensor] = lambda own: own  # (4, C) of the own columns -> of all


@dataclass
class CEResult:
    """Cross-entropies of the tokens, (N,), where the target is the likeliest, and the gradients
    asked for (already scaled)."""

    rows: Tensor
    hits: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Autograd around `run`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, p: CEProblem
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(hidden.device.type):
            result = run(p)
        dw = None if result.dw is None else result.dw.to(saved_dtype(weight))
        ctx.save_for_backward(result.dx, dw, result.db)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(result.hits)
        counted = torch.where(p.scale != 0, result.rows * p.scale, 0.0)  # not inf times 0
        return counted.sum(), result.hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        made = (
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return (*made, None)


def run(p: CEProblem) -> CEResult:
    """Value and gradients, chunk by chunk of tokens."""
    hidden, weight, bias, needs = p.hidden, p.weight, p.bias, p.needs
    acc, device, count = p.scale.dtype, hidden.device, hidden.shape[0]
    rows = torch.empty(count, dtype=acc, device=device)
    hits = torch.empty(count, dtype=torch.bool, device=device)
    dx = torch.empty_like(hidden, dtype=p.saved_dtype) if needs[0] else None
    dw = torch.zeros(weight.shape, dtype=acc, device=device) if needs[1] else None
    db = torch.zeros(weight.shape[0], dtype=acc, device=device) if needs[2] else None
    with Scratch() as scratch:
        buffer = scratch.logit_rows(min(p.chunk_tokens, count), weight.shape[0], acc, device)
        for start in range(0, count, p.chunk_tokens):
            part = slice(start, min(start + p.chunk_tokens, count))
            x, z = hidden[part].contiguous(), buffer[: part.stop - start]
            logits_into(x, weight, z)
            if bias is not None:
                z.add_(bias.to(acc))
            rows[part], hits[part] = _row_pass(z, p.targets[part], p.scale[part], p)
            g = z.to(torch.bfloat16) if has_mixed_gemm(z) and x.dtype == torch.bfloat16 else z
            if dx is not None:
                dx[part] = input_gradient(g, weight, acc)
            if dw is not None:
                add_weight_gradient(dw, g, x, start == 0)
            if db is not None:
                db.add_(g.sum(0, dtype=acc))
    return CEResult(rows, hits, dx, dw, db)


def _row_pass(z: Tensor, targets: Tensor, scale: Tensor, p: CEProblem) -> tuple[Tensor, Tensor]:
    """Cross-entropies and hits of raw logits z (C, V), which become, in place, the gradient by
    them times the token's weight."""
    z.mul_(p.logit_scale)
    slope: Tensor | None = None
    if p.softcap is not None:
        z.div_(p.softcap).tanh_()
        slope = 1 - z * z
        z.mul_(p.softcap)
    place = targets - p.first
    is_own = (place >= 0) & (place < z.shape[1])
    column = place.clamp(0, z.shape[1] - 1)[:, None]
    largest, likeliest = z.max(-1)
    wanted = z.gather(1, column).squeeze(1).masked_fill(~is_own, -torch.inf)
    hit = (likeliest == place).to(z.dtype)
    _, total, wanted, hit = p.merged(torch.stack([largest, z.logsumexp(-1), wanted, hit]))
    z.sub_(total[:, None]).exp_()
    z.scatter_add_(1, column, -is_own.to(z.dtype)[:, None])
    if slope is not None:
        z.mul_(slope)
    z.mul_((scale * p.logit_scale)[:, None])
    return total - wanted, hit > 0
