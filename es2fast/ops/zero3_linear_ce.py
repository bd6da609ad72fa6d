"""The linear cross-entropy of a frozen head that ZeRO-3 has parted: tokens travel, the head stays.

As the KL in :mod:`.linear_kl.zero3`: states and targets of all ranks are gathered, each rank makes
the logits of its rows for all of them, and the parts of dX are added up and handed back by a
reduce-scatter in float32. Of a token the ranks exchange four numbers.

Received per rank and call in 16 bits, with p ranks and N tokens in all (as many on each as on the
largest): 2 H N (p-1)/p bytes of states, twice as much of dX, 16 (p-1) N of statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from es2fast.ops.checks import check_matrix
from es2fast.ops.linear_ce import CEProblem, check_targets, run
from es2fast.ops.tokens import CPU_CHUNK, GPU_CHUNK, saved_dtype, without_autocast
from es2fast.ops.zero3 import (
    RankTokens,
    all_gathered,
    check_slices,
    exchanged,
    own_rows,
    whole_bias,
)


def zero3_linear_cross_entropy(
    hidden: Tensor,  # (N, H), this rank's tokens
    flat_weight: Tensor,  # (S,), this rank's slice of the head
    vocab_size: int,
    targets: Tensor,  # (N,) int64
    token_weights: Tensor,  # (N,)
    *,
    flat_bias: Tensor | None = None,  # (ceil(V / p),), this rank's slice
    group: dist.ProcessGroup | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:  # (), (N,) bool, of this rank's tokens
    """:func:`.linear_ce.linear_cross_entropy` of this rank's tokens with a frozen head that lies on
    all ranks.

    Every rank of the group calls it, with tokens of its own (none, maybe) and the same options;
    value and gradient are those of a call with the whole head. Nothing is exchanged in backward.

    Args:
        flat_weight, vocab_size, flat_bias, group: as of :func:`es2fast.zero3_linear_kl_div`.
        hidden, targets, token_weights, logit_scale, softcap: as of
            :func:`.linear_ce.linear_cross_entropy`.
        chunk_tokens: tokens between two exchanges, the same on every rank; None: 1024 on a GPU,
            256 on a CPU, or 32 per thread if that is more.

    Returns:
        (loss, hits) as of :func:`.linear_ce.linear_cross_entropy`, of this rank's tokens.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    The numbers of tokens are exchanged first, which on a GPU synchronizes once. Tested with gloo on
    CPUs, not yet with NCCL.
    """
    check_matrix("hidden", hidden)
    check_targets(hidden, targets, token_weights, chunk_tokens)
    check_slices(hidden, flat_weight, flat_bias, vocab_size, dist.get_world_size(group))
    device, accum = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
    needs = torch.is_grad_enabled() and hidden.requires_grad
    counts, any_needs = zip(*exchanged([hidden.shape[0], needs], device, group), strict=True)
    tokens = RankTokens(list(counts), group)
    weight, rows = own_rows(flat_weight.to(device), vocab_size, hidden.shape[1], group)
    bias = whole_bias(flat_bias, vocab_size, device, group)
    scale = token_weights.to(device, accum)
    problem = CEProblem(
        hidden=tokens.gathered(hidden.detach()),
        weight=weight,
        bias=None if bias is None else bias[rows],
        targets=tokens.gathered(targets.to(device)),
        scale=tokens.gathered(scale),
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_tokens=chunk_tokens or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK),
        needs=(any(any_needs), False, False),
        saved_dtype=accum,  # parts of dX are added up before they are rounded
        first=rows.start,
        merged=lambda own: merged_statistics(torch.stack(all_gathered(own, group))),
    )
    return _Zero3.apply(hidden, problem, tokens, scale)


def merged_statistics(parts: Tensor) -> Tensor:  # (p, 4, C) -> (4, C)
    """Of ranges of columns, in their order: (largest logit, logsumexp, the target's logit or -inf,
    whether the target is the first largest) -> those of all columns."""
    largest, total, wanted, hit = parts.unbind(1)
    top, where = largest.max(0)
    hit = hit.gather(0, where[None]).squeeze(0)
    return torch.stack([top, total.logsumexp(0), wanted.amax(0), hit])


class _Zero3(torch.autograd.Function):
    """Value and gradient in forward; backward scales what was saved, out of place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, p: CEProblem, tokens: RankTokens, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(hidden.device.type):
            result = run(p)
        dx = None
        if result.dx is not None:
            dx = tokens.scattered_sum(result.dx).to(saved_dtype(hidden))
        ctx.save_for_backward(dx)
        ctx.dtype = hidden.dtype
        hits = tokens.own(result.hits)
        ctx.mark_non_differentiable(hits)
        counted = torch.where(scale != 0, tokens.own(result.rows) * scale, 0.0)  # not inf times 0
        return counted.sum(), hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        (dx,) = ctx.saved_tensors
        return (dx * grad_loss).to(ctx.dtype), None, None, None
