"""Causal attention of rows, and a gradient for short bfloat16 rows on a CPU.

torch's own backward there takes several times as long as the products in it (DEVELOPING.md). Rows
of a step are short, and the probabilities of one are little memory: they are made again in float32,
and the gradients are plain products of one row after the other,

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP)) * scale    dQ = dS K    dK = dS^T Q

(Dao et al. 2022, arXiv 2205.14135, appendix B; their rowsum(dO * O) is the same sum out of a
rounded output), with P and dS rounded to bfloat16 for the products alone. What attention returns is
torch's to the last bit, so the model is the same one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDTHS = range(16, 257)  # tokens of a row where it is faster than torch's own


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Of every row apart.

    Args:
        query: (R, heads, W, D).
        key, value: (R, groups, W, D), heads / groups heads each.
        scale: of the scores; default: 1 / sqrt(D).
        dropout: of the probabilities.

    Returns:
        (R, heads, W, D).
    """
    if dropout or not query.requires_grad or not _short(query) or torch.compiler.is_compiling():
        return _attention(query, key, value, scale, dropout)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _ShortRows.apply(query, key, value, scale)


def _short(query: Tensor) -> bool:
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and query.shape[2] in WIDTHS


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float = 0.0
) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


class _ShortRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        out = _attention(query, key, value, scale)
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors  # once: they may be computed again for it
        width = grad.shape[2]
        later = torch.full((width, width), -math.inf).triu(1)
        later = later.repeat(query.shape[1] // key.shape[1], 1)
        parts = [
            _row_gradients(*row, later=later, scale=ctx.scale)
            for row in zip(query, key, value, grad)
        ]
        return (*(torch.stack(part) for part in zip(*parts)), None)


def _row_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, later: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of one row: query, grad (heads, W, D), key, value (groups, W, D); later: what is added to the
    scores of a group's heads, (heads / groups * W, W)."""
    q, g = (x.reshape(len(key), -1, key.shape[-1]) for x in (query, grad))
    p = torch.baddbmm(later, q.float(), key.float().mT, alpha=scale).softmax(-1)
    dp = torch.bmm(g.float(), value.float().mT).mul_(p)
    ds = dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1.0).mul_(scale).to(q.dtype)
    return (ds @ key).view(query.shape), ds.mT @ q, p.to(q.dtype).mT @ g
