"""Buffers of logits, which a CPU keeps from one call to the next.

A chunk of logits is the largest block of a training step, and malloc takes every block of more than
32 MB from the kernel, which clears it, and returns it when it is freed: some 310 MB a step with
V = 151936 and 256 tokens. A GPU's caching allocator needs no help.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch
from torch import Tensor

MOST = 1 << 30  # bytes of a buffer that is kept
LINE = 128  # logit rows start at multiples of this many elements, so that odd V stay aligned


def logit_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty (rows, vocab) buffer whose row stride is vocab rounded up to a multiple of LINE."""
    return torch.empty(rows, _pitch(vocab), dtype=dtype, device=device)[:, :vocab]


def _pitch(vocab: int) -> int:
    return -(-vocab // LINE) * LINE


class _Kept(threading.local):
    """What calls of this thread have left behind, one-dimensional buffers of bytes."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []


_kept = _Kept()


def forget() -> None:
    """Frees what is kept for this thread's next call."""
    _kept.buffers.clear()


class Scratch:
    """The buffers of one call, as a context: at its end they are kept for this thread's next one,
    so no view of them may outlive it. As many stay as a call has had at once, none above MOST."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _kept.buffers += [one for one in self._held if len(one) <= MOST and type(one) is Tensor]
        self._held = []

    def logit_rows(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The function of this name; on a CPU the buffer holds anything."""
        if device.type != "cpu":
            return logit_rows(rows, vocab, dtype, device)
        pitch = _pitch(vocab)
        size = rows * pitch * dtype.itemsize
        flat = _taken(size)
        self._held.append(flat)
        return flat[:size].view(dtype).view(rows, pitch)[:, :vocab]


def _taken(size: int) -> Tensor:
    """The smallest kept buffer of `size` bytes or more; else a new one, for which one that is too
    small is given up."""
    kept = _kept.buffers
    kept.sort(key=len)
    for i, buffer in enumerate(kept):
        if len(buffer) >= size:
            return kept.pop(i)
    if size <= MOST:
        del kept[:1]
    with torch.inference_mode(False):  # or no later call could write into it
        return torch.empty(size, dtype=torch.uint8)
