"""The linear KL of a frozen head that ZeRO-3 has parted: tokens travel, the head stays.

DeepSpeed cuts a weight (V, H), flattened, into one slice of S = ceil(V H / p) elements per rank,
the last one padded. Here a rank owns the rows that begin in its slice; the end of a row that is cut
in two comes from the next rank. Hidden states of all ranks are gathered, each rank makes the logits
of its rows for all of them (:mod:`.parallel`), and the parts of dX are added up and handed back to
the ranks whose tokens they are by a reduce-scatter in float32.

Received per rank and call in 16 bits, with p ranks and N tokens in all (as many on each as on the
largest): 4 H N (p-1)/p bytes of states, as much of dX, 24 to 28 (p-1) N of statistics. Gathering
the head takes 2 V H (p-1)/p bytes, and under ZeRO-3 as much again before the backward pass. So this
receives less for fewer than about V/4 tokens (V/2 with the second gather), and no rank ever holds
the head: with p = 8, V = 128256, H = 4096 and N = 8192 it is 236 MB instead of 919 MB twice. With a
small H or many ranks the statistics count too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from es2fast.ops.checks import check_tokens, refuse
from es2fast.ops.linear_kl.chunked import few_decide, run_chunked
from es2fast.ops.linear_kl.op import check_options
from es2fast.ops.linear_kl.parallel import SHARDED, ShardedProblem, choose_row_pass
from es2fast.ops.linear_kl.rows import KLSpec
from es2fast.ops.tokens import (
    CPU_CHUNK,
    GPU_CHUNK,
    pack,
    reduce_rows,
    row_scale,
    saved_dtype,
    scale_gradient,
    without_autocast,
)


@dataclass(frozen=True)
class Shard:
    """Which rows of (V, H) begin in the slice of a rank, and where they lie in it."""

    first: int  # row
    stop: int  # row
    lead: int  # elements before the first row: the end of the row before
    missing: int  # elements of the last row that lie in the next slice

    @staticmethod
    def of(rank: int, size: int, vocab: int, width: int) -> Shard:
        first, stop = (min(-(-at * size // width), vocab) for at in (rank, rank + 1))
        end = (rank + 1) * size
        return Shard(first, stop, first * width - rank * size, max(0, stop * width - end))


def own_rows(
    flat: Tensor,  # (S,) this rank's slice
    vocab: int,
    width: int,
    group: dist.ProcessGroup | None,
) -> Tensor:  # (R, H)
    """The rows of a head (vocab, width) that begin in this rank's slice, whole.

    A view of ``flat`` where no rank cuts a row; else a copy, after an all-gather of H elements from
    every rank.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shards = [Shard.of(r, flat.numel(), vocab, width) for r in range(ranks)]
    own = shards[rank]
    body = flat[own.lead : min(flat.numel(), own.lead + (own.stop - own.first) * width)]
    if any(shard.missing for shard in shards):
        leads = [torch.empty_like(flat[:width]) for _ in shards]
        dist.all_gather(leads, flat[:width].contiguous(), group=group)
        if own.missing:
            body = torch.cat([body, leads[rank + 1][: own.missing]])
    return body.view(-1, width)


def zero3_linear_kl_div(
    hidden: Tensor,  # (N, H), this rank's tokens
    flat_weight: Tensor,  # (S,), this rank's slice of the head
    vocab_size: int,
    teacher_hidden: Tensor,  # (N, H)
    *,
    group: dist.ProcessGroup | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:  # () or (N,), float32 (float64 for float64 inputs), in nats; of this rank's tokens
    """:func:`es2fast.linear_kl_div` of this rank's tokens with a head that lies on all ranks.

    Student and teacher share the head, which is frozen and has no bias. Every rank of the group
    calls it, with tokens of its own (none, maybe) and the same options; value and gradient are
    those of a call with the whole head. Nothing is exchanged in backward.

    Args:
        flat_weight: this rank's slice of the flattened head, as ``weight.ds_tensor`` of DeepSpeed:
            every slice equally long, the last one padded at its end. On hidden's device, or moved.
        vocab_size: rows of the head, V.
        group: the ranks that share the head; None: all.
        hidden, teacher_hidden, direction, beta, temperature, logit_scale, softcap, token_weights,
            reduction: as of :func:`es2fast.linear_kl_div`.
        chunk_tokens, backend: as of :func:`es2fast.vocab_parallel_linear_kl_div`.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    The numbers of tokens are exchanged first, which on a GPU synchronizes once. Tested with gloo on
    CPUs, not yet with NCCL. DeepSpeed's slices: ``Init._partition_param`` in
    deepspeed/runtime/zero/partition_parameters.py.
    """
    check_options(direction, beta, temperature, softcap, reduction)
    check_tokens(token_weights, None, hidden.shape[0])
    _check_shard(hidden, flat_weight, vocab_size, teacher_hidden, dist.get_world_size(group))
    accum = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    index, weights = pack(hidden, token_weights, None, accum)
    scale = row_scale(weights, reduction)
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    counts, any_needs, any_few = _agree(weights, needs_grad, group)

    def gathered(x: Tensor) -> Tensor:
        kept = x.detach() if index is None else x.detach().index_select(0, index)
        return _gather_rows(kept, counts, group)

    problem = ShardedProblem(
        hidden=gathered(hidden),
        weight=own_rows(flat_weight.to(hidden.device), vocab_size, hidden.shape[1], group),
        bias=None,
        teacher_hidden=gathered(teacher_hidden),
        teacher_weight=None,
        teacher_bias=None,
        index=None,
        scale=_gather_rows(scale, counts, group),
        spec=KLSpec(direction, beta, temperature, logit_scale, softcap),
        chunk_tokens=chunk_tokens or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK),
        fused=False,
        need_dx=any_needs,
        need_dw=False,
        need_db=False,
        exact=any_needs and any_few,
        group=group,
        backend=choose_row_pass(backend, hidden),
    )
    return _Zero3.apply(hidden, problem, counts, index, scale, reduction)


def _check_shard(
    hidden: Tensor, flat: Tensor, vocab: int, teacher_hidden: Tensor, ranks: int
) -> None:
    refuse(
        hidden.shape != teacher_hidden.shape or hidden.dtype != teacher_hidden.dtype,
        f"teacher_hidden is {tuple(teacher_hidden.shape)} of {teacher_hidden.dtype}, hidden "
        f"{tuple(hidden.shape)} of {hidden.dtype}: a shared head needs both alike",
    )
    refuse(
        flat.dtype != hidden.dtype,
        f"flat_weight is {flat.dtype} and hidden {hidden.dtype}: cast hidden",
    )
    size = -(-vocab * hidden.shape[1] // ranks)
    refuse(
        flat.dim() != 1 or flat.numel() < size,
        f"flat_weight has shape {tuple(flat.shape)}: expected ({size},), a rank's share of "
        f"{vocab} x {hidden.shape[1]} over {ranks} ranks (weight.ds_tensor)",
    )
    last = Shard.of(ranks - 1, flat.numel(), vocab, hidden.shape[1])
    refuse(
        flat.numel() < hidden.shape[1] or last.first >= last.stop,
        f"vocab_size={vocab}: too few rows for {ranks} ranks, one of which has none; gather the "
        "head and use linear_kl_div",
    )


def _agree(
    weights: Tensor, needs_grad: bool, group: dist.ProcessGroup | None
) -> tuple[list[int], bool, bool]:
    """(tokens of each rank, whether any needs a gradient, whether any has few that decide it)."""
    few = needs_grad and weights.numel() > 0 and few_decide(weights)
    mine = torch.tensor([weights.shape[0], needs_grad, few], device=weights.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    counts, needs, fews = zip(*torch.stack(found).tolist(), strict=True)
    return list(counts), any(needs), any(fews)


def _gather_rows(x: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows (counts[rank], ...) of every rank, one after the other: (sum(counts), ...)."""
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _scatter_sum(x: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks (sum(counts), H), added up over the ranks -> the own (counts[rank], H)."""
    rank, most = dist.get_rank(group), max(counts)
    padded = x.new_zeros(len(counts), most, x.shape[1])
    for row, part in zip(padded, x.split(counts), strict=True):
        row[: part.shape[0]] = part
    out = torch.empty_like(padded[0])
    dist.reduce_scatter_tensor(out, padded.flatten(0, 1), group=group)
    return out[: counts[rank]]


class _Zero3(torch.autograd.Function):
    """Value and gradient in forward; backward scales what was saved, out of place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, p: ShardedProblem, counts: list[int], index: Tensor | None,
        scale: Tensor, reduction: str,
    ) -> Tensor:  # fmt: skip
        with without_autocast(hidden.device.type):
            result = run_chunked(p, SHARDED)
        dx = None
        if result.dx is not None:
            own = _scatter_sum(result.dx, counts, p.group).to(saved_dtype(hidden))
            if index is not None:
                own = own.new_zeros(hidden.shape).index_copy_(0, index, own)
            dx = own
        ctx.save_for_backward(dx)
        ctx.dtype, ctx.reduction = hidden.dtype, reduction
        rows = result.rows.split(counts)[dist.get_rank(p.group)]
        return reduce_rows(rows * scale, reduction, index, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        (dx,) = ctx.saved_tensors
        dx = scale_gradient(dx, grad_loss, ctx.reduction, ctx.dtype)
        return dx, None, None, None, None, None
