"""The products of a chunk of logits, with the precision of their accumulator.

Logits are made by ``x W^T``, gradients by ``G W`` and ``G^T x``; the results are float32 (float64
for float64 inputs) even where the factors have 16 bits: on CUDA by ``torch.mm`` and ``torch.addmm``
with ``out_dtype`` (a float32 ``dw`` there needs torch 2.10), elsewhere by upcasting a block of the
weight at a time. A dW made by one product alone may have 16 bits: it is rounded once, at the end.
Outputs are written in place: their inner stride is 1, so cuBLAS takes the padded row pitch as its
leading dimension and copies nothing. A backend with GEMMs of its own passes another :class:`Gemms`
to the chunk loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

UPCAST_ROWS = 4096  # weight rows upcast at a time where no mixed-precision GEMM exists
# Tiles of 128 x 256 from which on cuBLAS has no use for splitting k, whose parts it would add up in
# 16 bits (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction): waves of any GPU.
TILES_WITHOUT_SPLIT = 512


def has_mixed_gemm(x: Tensor) -> bool:
    """Whether 16-bit matrices multiply into float32 where ``x`` lives (cuBLAS does)."""
    return x.is_cuda


def logits_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x @ weight.T`` with the accumulator's precision kept in ``out``."""
    if x.dtype == out.dtype == weight.dtype:
        torch.mm(x, weight.t(), out=out)
    elif has_mixed_gemm(x) and x.dtype == weight.dtype:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        x = x.to(out.dtype)
        for v in range(0, weight.shape[0], UPCAST_ROWS):
            block = weight[v : v + UPCAST_ROWS].to(out.dtype)
            torch.mm(x, block.t(), out=out[:, v : v + UPCAST_ROWS])


def input_gradient(g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``g @ weight`` in ``dtype``."""
    if g.dtype == weight.dtype == dtype:
        return torch.mm(g, weight)
    if has_mixed_gemm(g) and g.dtype == weight.dtype:
        return torch.mm(g, weight, out_dtype=dtype)
    dx = torch.zeros(g.shape[0], weight.shape[1], dtype=dtype, device=g.device)
    for v in range(0, weight.shape[0], UPCAST_ROWS):
        block = weight[v : v + UPCAST_ROWS].to(dtype)
        dx.addmm_(g[:, v : v + UPCAST_ROWS].to(dtype), block)
    return dx


def add_weight_gradient(dw: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
    """``dw += g.T @ x`` (``=`` for the first chunk) in dw's dtype."""
    beta = 0 if first else 1
    if g.dtype == x.dtype == dw.dtype:
        torch.addmm(dw, g.t(), x, beta=beta, out=dw)
    elif has_mixed_gemm(g) and g.dtype == x.dtype:
        torch.addmm(dw, g.t(), x, out_dtype=dw.dtype, beta=beta, out=dw)
    else:
        x = x.to(dw.dtype)
        for v in range(0, dw.shape[0], UPCAST_ROWS):
            part = g[:, v : v + UPCAST_ROWS].to(dw.dtype)
            block = dw[v : v + UPCAST_ROWS]
            torch.addmm(block, part.t(), x, beta=beta, out=block)


def weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``g.T @ x`` in ``dtype``, rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if g.dtype == x.dtype == dtype == wide:
        return torch.mm(g.t(), x)
    if has_mixed_gemm(g) and g.dtype == x.dtype:
        tiles = -(-g.shape[1] // 128) * -(-x.shape[1] // 256)
        if dtype == g.dtype and tiles >= TILES_WITHOUT_SPLIT:
            return torch.mm(g.t(), x)
        return torch.mm(g.t(), x, out_dtype=wide).to(dtype)
    dw = torch.empty(g.shape[1], x.shape[1], dtype=dtype, device=g.device)
    x = x.to(wide)
    for v in range(0, dw.shape[0], UPCAST_ROWS):
        dw[v : v + UPCAST_ROWS] = g[:, v : v + UPCAST_ROWS].to(wide).t() @ x
    return dw


@dataclass(frozen=True)
class Gemms:
    """The products of the chunk loop; all but the last keep their accumulator's precision."""

    logits_into: Callable[[Tensor, Tensor, Tensor], None]
    input_gradient: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor, bool], None]
    weight_gradient: Callable[[Tensor, Tensor, torch.dtype], Tensor]


TORCH_GEMMS = Gemms(logits_into, input_gradient, add_weight_gradient, weight_gradient)
