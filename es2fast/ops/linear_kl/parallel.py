"""The linear KL with the vocabulary spread over ranks: no rank ever holds a whole head.

Every rank has the same tokens and V/p rows of the head(s). Per chunk of tokens it makes the logits
of its columns and reduces them to six numbers per token (:func:`.rows.partials`); those of all
ranks are gathered and merged by the rule that merges column ranges on one device, and the gradient
G of the own columns follows from the merged ones. ``G W`` is then the rank's part of
dX, which is summed over the ranks in float32, once per call: parts cancel, so they must not be
rounded before. dW is the rank's own and needs no exchange.

The row pass has an exchange between its halves. 16-bit inputs on a GPU take the light row kernel in
parts (:mod:`.triton_sharded`), everything else plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from es2fast.ops.backends import choose_backend
from es2fast.ops.bias import finite_bias
from es2fast.ops.checks import check_head, check_tokens, refuse, vocabulary
from es2fast.ops.linear_kl.chunked import (
    KLProblem,
    RowBackend,
    RowGradient,
    few_decide,
    finished_gradient,
    logit_sides,
    run_chunked,
    torch_gradient_dtype,
)
from es2fast.ops.linear_kl.op import check_options, check_teacher
from es2fast.ops.linear_kl.rows import KLSpec, merge_partials, partials, shifted_gradient
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
class ShardedProblem(KLProblem):
    """A problem whose weights are one rank's rows of the heads."""

    group: dist.ProcessGroup | None = None
    backend: str = "torch"  # of the row pass

    @property
    def saved_dtype(self) -> torch.dtype:
        """A part of dX is summed over the ranks before it is rounded."""
        return self.accum_dtype


def vocab_parallel_linear_kl_div(
    hidden: Tensor,  # (N, H), the same on every rank
    weight: Tensor,  # (V_r, H), this rank's rows
    teacher_hidden: Tensor,  # (N, Ht), the same on every rank
    teacher_weight: Tensor | None = None,  # (V_r, Ht), the same rows of the teacher's head
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,  # (V_r,)
    teacher_bias: Tensor | None = None,  # (V_r,)
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,  # (N,), the same on every rank
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    grad_buffer_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:  # () or (N,), float32 (float64 for float64 inputs), in nats; the same on every rank
    """:func:`es2fast.linear_kl_div` of heads whose rows lie on the ranks of a process group.

    Each rank calls it with the same tokens, weights of tokens and options, and with its own rows of
    the head(s): any split of the vocabulary, the same for both heads. The result is that of the
    whole heads on every rank; the gradient of ``hidden`` is complete on every rank and must not be
    summed over the group again, those of ``weight`` and ``bias`` are of the rank's own rows.

    On the wire, per token and rank with p ranks: 24 (p-1) bytes of statistics received (triton: 28
    (p-1), and 8 (p-1)/p for the value), for JSD another 24 (p-1)/p (triton: 16 (p-1)/p in place of
    the value's), and for dX an all-reduce of H float32, 8 H (p-1)/p bytes. Gathering a
    bfloat16 head instead takes 2 V H (p-1)/p bytes per head, and as much for dW where it trains.
    So this is less for fewer than V/4 tokens with one head, V/2 with two. With p = 8, H = 4096,
    V = 128256 and N = 8192 two heads: 236 MB instead of 1.84 GB.

    Args:
        hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias: as of
            :func:`es2fast.linear_kl_div`, of each head this rank's rows.
        group: the ranks that share the heads; None: all.
        vocab_size: how many of this rank's rows are real tokens, 1 at least; the rest is padding.
        direction, beta, temperature, logit_scale, softcap, token_weights, grad_buffer_bytes: as of
            :func:`es2fast.linear_kl_div`.
        reduction: "mean", "sum", or, where only hidden trains, "none".
        chunk_tokens: tokens between two exchanges, the same on every rank; None: 1024 on a GPU,
            256 on a CPU, or 32 per thread if that is more.
        backend: of the row pass, the same on every rank: "triton" (16-bit inputs), "torch", or None
            for triton where it can.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    The collectives are all-gather and all-reduce; tested with gloo on CPUs, not yet with NCCL.
    """
    check_options(direction, beta, temperature, softcap, reduction)
    check_head("", hidden, weight, bias)
    check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias)
    check_tokens(token_weights, None, hidden.shape[0])
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    refuse(
        reduction == "none" and any(needs[1:]),
        "reduction='none' with a head that trains: its gradient depends on what follows; use "
        "'mean' or 'sum' with token_weights",
    )
    refuse(
        chunk_tokens is not None and chunk_tokens < 1,
        f"chunk_tokens={chunk_tokens}: expected a positive number, or None for the default",
    )
    vocab = vocabulary(weight, teacher_weight, vocab_size)
    accum = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    index, weights = pack(hidden, token_weights, None, accum)
    gain, ranks = logit_scale / temperature, dist.group.WORLD if group is None else group
    problem = ShardedProblem(
        hidden=hidden.detach(),
        weight=weight.detach()[:vocab],
        bias=finite_bias(None if bias is None else bias.detach(), gain, vocab, ranks),
        teacher_hidden=teacher_hidden,
        teacher_weight=None if teacher_weight is None else teacher_weight[:vocab],
        teacher_bias=finite_bias(teacher_bias, gain, vocab, ranks),
        index=index,
        scale=row_scale(weights, reduction),
        spec=KLSpec(direction, beta, temperature, logit_scale, softcap),
        chunk_tokens=chunk_tokens or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK),
        fused=False,
        need_dx=needs[0],
        need_dw=needs[1],
        need_db=needs[2],
        exact=any(needs) and few_decide(weights),
        buffer_bytes=grad_buffer_bytes,
        group=ranks,
        backend=choose_row_pass(backend, hidden),
    )
    return _VocabParallel.apply(hidden, weight, bias, problem, reduction)


class _VocabParallel(torch.autograd.Function):
    """Value and gradients in forward; backward scales what was saved, out of place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, p: ShardedProblem,
        reduction: str,
    ) -> Tensor:  # fmt: skip
        with without_autocast(hidden.device.type):
            result = run_chunked(p, SHARDED)
        dx = None if result.dx is None else _summed(result.dx, p).to(saved_dtype(hidden))
        ctx.save_for_backward(dx, _padded(result.dw, weight), _padded(result.db, bias))
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        ctx.reduction = reduction
        return reduce_rows(result.rows * p.scale, reduction, p.index, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        made = (
            None if gradient is None else scale_gradient(gradient, grad_loss, ctx.reduction, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return (*made, None, None)


def _summed(dx: Tensor, p: ShardedProblem) -> Tensor:
    """dX summed over the ranks, of the tokens that count."""
    if p.index is None:
        dist.all_reduce(dx, group=p.group)
        return dx
    rows = dx.index_select(0, p.index)
    dist.all_reduce(rows, group=p.group)
    return dx.index_copy_(0, p.index, rows)


def _padded(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in ``like``'s size and saved dtype, zero on padding rows."""
    if gradient is None or like is None:
        return None
    if gradient.shape == like.shape:
        return gradient.to(saved_dtype(like))
    full = torch.zeros(like.shape, dtype=saved_dtype(like), device=gradient.device)
    full[: gradient.shape[0]] = gradient
    return full


def choose_row_pass(name: str | None, hidden: Tensor) -> str:
    """ "triton" or "torch".

    Raises:
        ValueError: another name, or triton for inputs that it cannot take.
    """
    refuse(
        name not in (None, "triton", "torch"),
        f"backend={name!r}: expected 'triton', 'torch' or None (automatic)",
    )
    is_half = hidden.dtype in (torch.bfloat16, torch.float16)
    refuse(
        name == "triton" and not is_half,
        f"backend='triton' with {hidden.dtype}: the row kernel in parts takes bfloat16 and float16;"
        " use 'torch' or None",
    )
    if name is None:
        return "triton" if is_half and choose_backend(None, hidden=hidden) == "triton" else "torch"
    return choose_backend(name, hidden=hidden)


def _row_pass(
    zt: Tensor, zs: Tensor, scale: Tensor, place: Tensor | None, p: KLProblem
) -> tuple[Tensor, RowGradient | None]:
    """The row pass of the own columns, with the other ranks' statistics."""
    assert isinstance(p, ShardedProblem)

    def gather(mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(p.group))]
        dist.all_gather(parts, mine, group=p.group)
        return torch.stack(parts)

    def over_ranks(sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=p.group)
        return sums

    if p.backend == "triton":
        from es2fast.ops.linear_kl.triton_sharded import sharded_row_pass

        return sharded_row_pass(zt, zs, scale, place, p, gather, over_ranks)
    z_b, d, slope = logit_sides(zt, zs, p)
    kl, merged = merge_partials(gather(partials(z_b, d)))
    rows, g = shifted_gradient(z_b, d, slope, kl, merged, p.spec, p.need_grad, over_ranks)
    if g is None:
        return rows, None
    return rows, finished_gradient(g, scale, place, p)


def _gradient_dtype(p: KLProblem) -> torch.dtype:
    assert isinstance(p, ShardedProblem)
    return p.hidden.dtype if p.backend == "triton" else torch_gradient_dtype(p)


SHARDED = RowBackend(_row_pass, _gradient_dtype)
