"""A linear layer with its LoRA adapter, as one operation.

    y = x W^T + b + s (x A^T) B^T          x (N, in), y (N, out), A (r, in), B (out, r)

peft adds the adapter's output as a tensor of its own: scaled, added, and in the backward scaled and
added again, each a pass over N x out or N x in elements. Here the narrow products are accumulated
by the GEMM onto the wide ones, which also rounds once less.

Source: Hu et al., "LoRA", arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LoraLinear(torch.autograd.Function):
    """x (N, in), W (out, in) frozen, b (out,) frozen or None, A, B, s -> (N, out)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scaling = s
        out = nn.functional.linear(x, weight, bias)
        return torch.addmm(out, inner, b.t(), alpha=s, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inner, weight, a, b = ctx.saved_tensors
        low = (grad @ b).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ weight
            to_x = torch.addmm(to_x, low, a, out=to_x)
        return to_x, None, None, low.t() @ x, (grad.t() @ inner).mul_(ctx.scaling), None


class FusedLoraLinear(Linear):
    """peft's layer, which computes as one operation wherever that is the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._fusible(x)
        if name is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        base: Any = self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        out = _LoraLinear.apply(flat, base.weight, base.bias, a, b, self.scaling[name])
        # a view made here may be changed in place by what follows (Llama 4), one made there not
        return out.view(*x.shape[:-1], out.shape[-1])

    def _fusible(self, x: Tensor) -> str | None:
        """The one adapter that acts, if it is LoRA as in the paper, without dropout, and in one
        precision with the input. Not under ZeRO-3, whose weights come when their modules are
        called, nor with hooks on these; compiled code fuses by itself."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or torch.compiler.is_compiling():
            return None
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        if type(base) is not nn.Linear or b.bias is not None or base.weight.requires_grad:
            return None
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        parts = (base, a, b)
        if any(hasattr(part.weight, "ds_id") or _hooked(part) for part in parts):
            return None
        return name if all(part.weight.dtype == x.dtype for part in parts) else None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fuse_adapters(model: nn.Module) -> None:
    """Makes peft's linear layers inside `model` compute as one operation; names, weights and what
    is saved stay."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
