"""The linear KL of a frozen head that ZeRO-3 has parted: tokens travel, the head stays.

Hidden states of all ranks are gathered, each rank makes the logits of its rows (:mod:`..zero3`) for
all of them (:mod:`.parallel`), and the parts of dX are added up and handed back to the ranks whose
tokens they are by a reduce-scatter in float32.

Received per rank and call in 16 bits, with p ranks and N tokens in all (as many on each as on the
largest): 4 H N (p-1)/p bytes of states, as much of dX, 24 to 28 (p-1) N of statistics. Gathering
the head takes 2 V H (p-1)/p bytes, once: DeepSpeed keeps it until its backward pass. So this
receives less for fewer than about V/4 tokens, and no rank ever holds the head: with p = 8,
V = 128256, H = 4096 and N = 8192 it is 236 MB instead of 919. With a small H or many ranks the
statistics count too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from es2fast.ops.bias import finite_bias
from es2fast.ops.checks import check_tokens, refuse
from es2fast.ops.linear_kl.chunked import run_chunked
from es2fast.ops.linear_kl.op import check_options, decided_by_few
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
from es2fast.ops.zero3 import RankTokens, check_slices, exchanged, own_rows, whole_bias


def zero3_linear_kl_div(
    hidden: Tensor,  # (N, H), this rank's tokens
    flat_weight: Tensor,  # (S,), this rank's slice of the head
    vocab_size: int,
    teacher_hidden: Tensor,  # (N, H)
    *,
    flat_bias: Tensor | None = None,  # (ceil(V / p),), this rank's slice
    group: dist.ProcessGroup | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,  # (N,)
    max_valid_tokens: int | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:  # () or (N,), float32 (float64 for float64 inputs), in nats; of this rank's tokens
    """:func:`es2fast.linear_kl_div` of this rank's tokens with a head that lies on all ranks.

    Student and teacher share the head, which is frozen. Every rank of the group calls it, with
    tokens of its own (none, maybe) and the same options; value and gradient are those of a call
    with the whole head. Nothing is exchanged in backward.

    Args:
        flat_weight: this rank's slice of the flattened head, as ``weight.ds_tensor`` of DeepSpeed:
            every slice equally long, the last one padded at its end. On hidden's device, or moved.
        vocab_size: rows of the head, V.
        flat_bias: this rank's slice of the head's bias, likewise.
        group: the ranks that share the head; None: all.
        hidden, teacher_hidden, direction, beta, temperature, logit_scale, softcap, token_weights,
            max_valid_tokens, reduction: as of :func:`es2fast.linear_kl_div`.
        chunk_tokens, backend: as of :func:`es2fast.vocab_parallel_linear_kl_div`.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    The numbers of tokens are exchanged first, which on a GPU synchronizes once. Tested with gloo on
    CPUs, not yet with NCCL.
    """
    check_options(direction, beta, temperature, softcap, reduction)
    check_tokens(token_weights, max_valid_tokens, hidden.shape[0])
    check_slices(hidden, flat_weight, flat_bias, vocab_size, dist.get_world_size(group))
    _check_teacher(hidden, teacher_hidden)
    accum = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    index, weights = pack(hidden, token_weights, max_valid_tokens, accum)
    scale = row_scale(weights, reduction)
    needs = torch.is_grad_enabled() and hidden.requires_grad
    few = needs and weights.numel() > 0 and decided_by_few(weights, token_weights, max_valid_tokens)
    counts, any_needs, any_few = zip(
        *exchanged([weights.shape[0], needs, few], hidden.device, group), strict=True
    )
    tokens = RankTokens(list(counts), group)

    def gathered(x: Tensor) -> Tensor:
        return tokens.gathered(x.detach() if index is None else x.detach().index_select(0, index))

    weight, rows = own_rows(flat_weight.to(hidden.device), vocab_size, hidden.shape[1], group)
    bias = finite_bias(
        whole_bias(flat_bias, vocab_size, hidden.device, group),
        logit_scale / temperature,
        vocab_size,
    )
    problem = ShardedProblem(
        hidden=gathered(hidden),
        weight=weight,
        bias=None if bias is None else bias[rows],
        teacher_hidden=gathered(teacher_hidden),
        teacher_weight=None,
        teacher_bias=None,
        index=None,
        scale=tokens.gathered(scale),
        spec=KLSpec(direction, beta, temperature, logit_scale, softcap),
        chunk_tokens=chunk_tokens or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK),
        fused=False,
        need_dx=any(any_needs),
        need_dw=False,
        need_db=False,
        exact=any(any_few),
        group=group,
        backend=choose_row_pass(backend, hidden),
    )
    return _Zero3.apply(hidden, problem, tokens, index, scale, reduction)


def _check_teacher(hidden: Tensor, teacher_hidden: Tensor) -> None:
    refuse(
        hidden.shape != teacher_hidden.shape or hidden.dtype != teacher_hidden.dtype,
        f"teacher_hidden is {tuple(teacher_hidden.shape)} of {teacher_hidden.dtype}, hidden "
        f"{tuple(hidden.shape)} of {hidden.dtype}: a shared head needs both alike",
    )


class _Zero3(torch.autograd.Function):
    """Value and gradient in forward; backward scales what was saved, out of place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, p: ShardedProblem, tokens: RankTokens, index: Tensor | None,
        scale: Tensor, reduction: str,
    ) -> Tensor:  # fmt: skip
        with without_autocast(hidden.device.type):
            result = run_chunked(p, SHARDED)
        dx = None
        if result.dx is not None:
            own = tokens.scattered_sum(result.dx).to(saved_dtype(hidden))
            if index is not None:
                own = own.new_zeros(hidden.shape).index_copy_(0, index, own)
            dx = own
        ctx.save_for_backward(dx)
        ctx.dtype, ctx.reduction = hidden.dtype, reduction
        return reduce_rows(tokens.own(result.rows) * scale, reduction, index, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        (dx,) = ctx.saved_tensors
        dx = scale_gradient(dx, grad_loss, ctx.reduction, ctx.dtype)
        return dx, None, None, None, None, None
