"""Which implementation of an op runs: what each can take, and the choice, the same for every op.

``triton``: own kernels on NVIDIA GPUs. ``native``: C++ kernels on the CPU (csrc/). ``torch``: plain
torch, any device and dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from es2fast.ops import native


def _torch_why_not(**tensors: Tensor) -> str | None:
    return None


def _float64_why_not(tensors: dict[str, Tensor]) -> str | None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            return f"it computes in float32 and {name} is float64"
    return None


def _triton_why_not(**tensors: Tensor) -> str | None:
    """NVIDIA sm_80 or newer (or the interpreter on a CPU), bf16, fp16 or fp32."""
    try:
        from es2fast.ops.triton_rows import INTERPRETED
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    wide = _float64_why_not(tensors)
    if wide is not None:
        return wide
    name, first = next(iter(tensors.items()))
    if INTERPRETED and first.device.type == "cpu":
        return None
    if first.device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU and {name} is on {first.device}"
    if torch.cuda.get_device_capability(first.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def _native_why_not(**tensors: Tensor) -> str | None:
    """A CPU, the library built, bf16, fp16 or fp32."""
    name, first = next(iter(tensors.items()))
    if first.device.type != "cpu":
        return f"it computes on the CPU and {name} is on {first.device}"
    return _float64_why_not(tensors) or native.why_missing()


# Why a backend cannot take some tensors (by argument name); None: it can.
WHY_NOT: dict[str, Callable[..., str | None]] = {
    "torch": _torch_why_not,
    "triton": _triton_why_not,
    "native": _native_why_not,
}
DEFAULT = {"cuda": "triton", "cpu": "native"}


def choose_backend(name: str | None, **tensors: Tensor | None) -> str:
    """The backend by name, or by the first tensor's device when ``name`` is None.

    Args:
        name: "triton", "native", "torch" or None.
        tensors: the inputs that matter, by argument name; None is left out.

    Raises:
        ValueError: an unknown name, or a backend that cannot take these tensors.
    """
    given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    if name is None:
        name = DEFAULT.get(next(iter(given.values())).device.type, "torch")
        return name if WHY_NOT[name](**given) is None else "torch"
    if name not in WHY_NOT:
        raise ValueError(f"backend={name!r}: expected one of {sorted(WHY_NOT)} or None (automatic)")
    reason = WHY_NOT[name](**given)
    if reason is not None:
        usable = [key for key, why_not in WHY_NOT.items() if why_not(**given) is None]
        raise ValueError(f"backend={name!r} cannot run here: {reason}; use one of {usable} or None")
    return name
