"""What the Triton kernels over rows of logits share.

One program sweeps one row of float32 raw logits and writes its gradient over the row's own memory.
Here are the launch configuration of such a kernel, the place of 16-bit gradients, the rounding to
16 bits, and whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, for tests on a
CPU; triton decides it once, when it is imported). Importing this file imports triton: do so only
where that backend has been chosen, as triton is there on Linux only.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run in Python, on the CPU
_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class RowConfig:
    """Launch configuration of a kernel with one program per row."""

    block: int = 2048  # columns per tile
    num_warps: int = 8
    max_registers: int | None = None  # per thread; None: ptxas decides
    stages: int = 3  # tiles in flight: the loads of the next ones hide behind this one's sums


ROW_CONFIG_INTERPRETED = RowConfig(block=512)
# Where a running maximum starts: finite, so that a tile of nothing but -inf leaves no NaN.
LOWEST = tl.constexpr(-1e30)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on x's GPU, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in ``dtype``, to nearest even. The interpreter truncates to bfloat16: round the bits."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def gradient_place(zs: Tensor, dtype: torch.dtype) -> Tensor:
    """Where G goes: over the student's logits, 16-bit ones into the upper half of each row."""
    if dtype == torch.float32:
        return zs
    pitch, vocab = zs.stride(0), zs.shape[1]
    halves = zs.as_strided((zs.shape[0], pitch), (pitch, 1)).view(dtype)
    return halves[:, pitch : pitch + vocab]
