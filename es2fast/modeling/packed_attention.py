"""Attention of a packed micro-batch, row by row.

A mask over the one sequence would be S x S, most of it empty: of 8 + 8 short rows (546 to 587
tokens) it takes four to five times the products of the rows themselves. So queries, keys and values
are gathered into (R, W) rows, the common prefix in front of each, attention is causal there, needs
no mask and no keys repeated for grouped heads, and its output goes back to its places:

    (S, heads, D) --index--> (R, W, heads, D) --attention--> (R, W, heads, D) --home--> (S, ...)

Rows are padded behind, where a causal row does not look. Both gathers are their own adjoint but for
a prefix, whose gradients add up; PyTorch's own backward of an index would add row by row.

Models reach it by a name of transformers' attention registry. A call without `attention_rows` is
transformers' sdpa. 16-bit operands stay so, though on a CPU attention in fp32 is faster: it rounds
less, and that is another model than the base model whose states a cache holds (DEVELOPING.md). The
gradient alone may go through fp32 (`row_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from es2fast.data.packing import AttentionRows
from es2fast.modeling.row_attention import causal_attention

NAME = "es2fast_sdpa"


def install(model: nn.Module) -> None:
    """Lets a model that uses sdpa attend packed rows; any other stays as it is."""
    config: Any = model.config
    if getattr(config, "_attn_implementation", None) == "sdpa":
        config._attn_implementation = NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_rows: AttentionRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' registry.

    Args:
        query, key, value: (B, heads, T, D), keys and values with one head per group; B = 1 and
            T = S where the sequence is packed.
        attention_mask: of padded rows; a packed sequence needs none.
        dropout, scaling: as for sdpa.
        attention_rows: the rows of a packed sequence.

    Returns:
        (B, T, heads, D), and no probabilities.
    """
    if attention_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    heads, groups = query.shape[1], key.shape[1]
    joined = torch.cat([part[0].transpose(0, 1) for part in (query, key, value)], 1)
    outputs = []
    for row in to_rows(joined, attention_rows):
        q, k, v = (part.transpose(1, 2) for part in row.split([heads, groups, groups], 2))
        outputs.append(causal_attention(q, k, v, scaling, dropout).transpose(1, 2))
    return from_rows(outputs, attention_rows)[None], None


class _ToRows(torch.autograd.Function):
    """x (S, ..), home (S,), of G groups the prefixes (P,) and the indices (R, W) -> their rows
    (R, W, ..)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, home: Tensor, *places: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        prefixes, indices = places[: len(places) // 2], places[len(places) // 2 :]
        ctx.save_for_backward(home, *prefixes)
        return tuple(
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]) for index in indices
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        home, *prefixes = ctx.saved_tensors
        own = torch.cat([grad.flatten(0, 1) for grad in grads]).index_select(0, home)
        for prefix in prefixes:
            own.index_fill_(0, prefix, 0.0)
        for prefix, grad in zip(prefixes, grads, strict=True):
            own.index_add_(0, prefix, grad[:, : len(prefix)].sum(0))
        return (own, None, *[None] * (2 * len(grads)))


class _FromRows(torch.autograd.Function):
    """Rows (R, W, ..) of every group -> (S, ..)."""

    @staticmethod
    def forward(ctx: Any, home: Tensor, *rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(home)
        ctx.shapes = [row.shape for row in rows]
        return torch.cat([row.flatten(0, 1) for row in rows]).index_select(0, home)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (home,) = ctx.saved_tensors
        counts = [shape[0] * shape[1] for shape in ctx.shapes]
        every = grad.new_zeros(sum(counts), *grad.shape[1:]).index_copy_(0, home, grad)
        parts = every.split(counts)
        return (None, *[part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)])


def to_rows(x: Tensor, rows: AttentionRows) -> tuple[Tensor, ...]:
    """x (S, ..) -> of each group (R, W, ..)."""
    return _ToRows.apply(x, rows.home, *rows.prefix, *rows.index)


def from_rows(outputs: Sequence[Tensor], rows: AttentionRows) -> Tensor:
    """Of each group (R, W, ..) -> (S, ..); a prefix is that of a first row, see `home`."""
    return _FromRows.apply(rows.home, *outputs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
