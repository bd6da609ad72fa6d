"""What the fused losses over tokens share: packing of the valid tokens, reduction.

Tokens of weight zero are left out before any GEMM (:func:`pack`,
:class:`PackedTokens`); the others' losses are combined
as "mean" ``sum(w_i l_i) / sum(w_i)`` (0 when all weights are 0), "sum" or "none", the (N,) values
``w_i l_i`` (:func:`row_scale`, :func:`reduce_rows`). Gradients are made in the forward pass already
scaled by the row's factor, and only multiplied by ``grad_output`` afterwards.
"""

import contextlib

import torch
from torch import Tensor

from es2fast.transfer import to_device

REDUCTIONS = ("mean", "sum", "none")
GPU_CHUNK = 1024  # at least: fewer rows would not fill the SMs of a big GPU in dX
GPU_CHUNK_TRAINABLE = 2048  # at least: fewer passes over the float32 dW
CPU_CHUNK = 256  # at least
CPU_CHUNK_ROWS = 32  # per thread: 2048 rows at 64, which dX's tiles then fill
DX_TILE = (128, 256)  # rows and columns of dX that one SM makes at a time in cuBLAS's GEMM


# --- packing --------------------------------------------------------------------------------------


def pack(
    hidden: Tensor, token_weights: Tensor | None, max_valid: int | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """(indices of the rows that count, or None for all; their weights on hidden's device)."""
    device = hidden.device
    if token_weights is None:
        return None, torch.ones(hidden.shape[0], dtype=dtype, device=device)
    if max_valid is None:
        index = token_weights.nonzero().squeeze(1)  # on the CPU: no synchronization
        kept = token_weights.index_select(0, index)
        return to_device(index, device), to_device(kept, device).to(dtype)
    weights = to_device(token_weights, device).to(dtype).contiguous()  # kernels count rows by 1
    if max_valid >= hidden.shape[0]:
        return None, weights
    # one row at least, which says that a bound of 0 was too small
    index = torch.argsort((weights == 0).to(torch.uint8), stable=True)[: max(max_valid, 1)]
    overflow = (weights != 0).sum() > max_valid
    kept = weights.index_select(0, index)
    return index, torch.where(overflow, float("nan"), kept)


class PackedTokens:
    """Tokens of which ``index`` count, each with the factor ``scale``; every problem is one."""

    hidden: Tensor  # (N, H)
    index: Tensor | None  # (M,) rows that count; None: all
    scale: Tensor  # (M,) factor of each row's gradient, in the accumulation dtype

    @property
    def rows(self) -> int:
        return self.scale.shape[0]

    @property
    def accum_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def saved_dtype(self) -> torch.dtype:
        """What dX is kept in until backward."""
        return saved_dtype(self.hidden)

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the packed tokens of ``tensor``, contiguous."""
        if self.index is None:
            return tensor[start:stop].contiguous()
        return tensor.index_select(0, self.index[start:stop])

    def empty_dx(self) -> Tensor:
        """(N, H) for dX; zero where a token does not count."""
        make = torch.empty if self.index is None else torch.zeros
        return make(self.hidden.shape, dtype=self.saved_dtype, device=self.hidden.device)

    def put(self, dx: Tensor, start: int, stop: int, rows: Tensor) -> None:
        """Write the packed rows ``start:stop`` of dX."""
        if self.index is None:
            dx[start:stop] = rows
        else:
            dx.index_copy_(0, self.index[start:stop], rows.to(dx.dtype))


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast would round a float32 head's GEMMs to 16 bits: the inputs' dtype decides here."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has none
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def default_chunk(hidden: Tensor, need_dw: bool) -> int:
    """Rows of logits that exist at once when the caller does not say."""
    if hidden.device.type != "cuda":
        return cpu_chunk(torch.get_num_threads())
    least = GPU_CHUNK_TRAINABLE if need_dw else GPU_CHUNK
    return full_wave_chunk(hidden.shape[1], sm_count(hidden.device), least)


def cpu_chunk(threads: int) -> int:
    """Rows that give every thread tiles of dX: 256 up to 8 threads, 2048 at 64."""
    return max(CPU_CHUNK, CPU_CHUNK_ROWS * threads)


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a GPU, the allocator's own reserve included; else None."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def is_short_of_memory(logit_bytes: int, device: torch.device) -> bool:
    """Whether buffers of logits would take more than half of what is free."""
    free = free_bytes(device)
    return free is not None and 2 * logit_bytes > free


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def full_wave_chunk(width: int, sms: int, least: int) -> int:
    """Rows of which dX's tiles fill whole waves of the SMs, from ``least`` to twice that.

    ``width`` is H. The bound costs narrow models some of the SMs (H=1024 on 132 SMs: half) and
    keeps the buffers from growing as H shrinks.
    """
    rows, columns = DX_TILE
    across = -(-width // columns)
    waves = -(-least * across // (rows * sms))
    while (chunk := rows * (waves * sms // across)) < least:
        waves += 1
    return min(chunk, 2 * least)


def saved_dtype(like: Tensor) -> torch.dtype:
    """What a gradient is kept in until backward; float16 would underflow before loss scaling."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


# --- reduction ------------------------------------------------------------------------------------


def row_scale(weights: Tensor, reduction: str) -> Tensor:
    """Factor of each packed row in the loss."""
    if reduction != "mean":
        return weights
    total = weights.sum()
    return torch.where(total == 0, 0.0, weights / total)


def reduce_rows(rows: Tensor, reduction: str, index: Tensor | None, n: int) -> Tensor:
    """Scaled losses of the packed rows -> the loss, () or, for "none", (N,)."""
    if reduction != "none":
        return rows.sum()
    return rows if index is None else rows.new_zeros(n).index_copy_(0, index, rows)


def scale_gradient(made: Tensor, factor: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """A gradient made in forward times ``grad_output``; out of place: backward may run again."""
    column = factor[:, None] if reduction == "none" else factor
    return (made * column).to(dtype)
