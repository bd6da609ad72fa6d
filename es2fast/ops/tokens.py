"""What the fused losses over tokens share: checks, packing of the valid tokens, reduction.

Tokens of weight zero are left out before any GEMM (:func:`pack`); the others' losses are combined
as "mean" ``sum(w_i l_i) / sum(w_i)`` (0 when all weights are 0), "sum" or "none", the (N,) values
``w_i l_i`` (:func:`row_scale`, :func:`reduce_rows`). Gradients are made in the forward pass already
scaled by the row's factor, and only multiplied by ``grad_output`` afterwards.
"""

import contextlib

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GPU_CHUNK = 1024  # fills the SMs of a big GPU in dX
GPU_CHUNK_TRAINABLE = 2048  # fewer passes over the float32 dW
CPU_CHUNK = 256


# --- checks ---------------------------------------------------------------------------------------


def refuse(condition: bool, message: str) -> None:
    """ValueError with ``message`` when ``condition`` holds."""
    if condition:
        raise ValueError(message)


def check_matrix(name: str, tensor: Tensor) -> None:
    """Two dimensions and a floating dtype that the ops know."""
    refuse(
        tensor.dim() != 2,
        f"{name} has shape {tuple(tensor.shape)}: expected two dimensions; flatten batch and "
        "sequence into tokens first",
    )
    refuse(tensor.dtype not in DTYPES, f"{name} has dtype {tensor.dtype}: expected one of {DTYPES}")


def check_bias(side: str, weight: Tensor, bias: Tensor | None) -> None:
    """One entry per row of the head."""
    refuse(
        bias is not None and tuple(bias.shape) != (weight.shape[0],),
        f"{side}bias has shape {None if bias is None else tuple(bias.shape)}: expected "
        f"({weight.shape[0]},), one entry per row of {side}weight",
    )


def check_head(
    side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, half_head: bool = False
) -> None:
    """Shapes and dtypes of one side; ``half_head``: bf16 states may meet an fp16 head."""
    check_matrix(f"{side}hidden", hidden)
    check_matrix(f"{side}weight", weight)
    refuse(
        hidden.shape[1] != weight.shape[1],
        f"{side}hidden is {hidden.shape[1]} wide and {side}weight {weight.shape[1]}: a head of "
        "another width needs its own teacher_weight; a sharded (ZeRO-3) one must be gathered first",
    )
    refuse(
        hidden.dtype != weight.dtype
        and not (half_head and (hidden.dtype, weight.dtype) == (torch.bfloat16, torch.float16)),
        f"{side}hidden is {hidden.dtype} and {side}weight {weight.dtype}: cast one of them, for "
        f"instance {side}hidden.to({weight.dtype})",
    )
    for name, other in ((f"{side}weight", weight), (f"{side}bias", bias)):
        refuse(
            other is not None and other.device != hidden.device,
            f"{name} is on {None if other is None else other.device} and {side}hidden on "
            f"{hidden.device}: move one of them",
        )
    check_bias(side, weight, bias)


def check_tokens(token_weights: Tensor | None, max_valid_tokens: int | None, n: int) -> None:
    """One constant weight per token, and a bound on their number only with them."""
    if token_weights is None:
        refuse(
            max_valid_tokens is not None,
            f"max_valid_tokens={max_valid_tokens} without token_weights: pass both or neither",
        )
        return
    refuse(
        tuple(token_weights.shape) != (n,),
        f"token_weights has shape {tuple(token_weights.shape)}: expected ({n},), one per token",
    )
    refuse(
        token_weights.requires_grad,
        "token_weights requires grad: weights are constants; pass token_weights.detach(), or "
        "reduction='none' and weigh the result",
    )
    refuse(
        token_weights.is_complex(), f"token_weights has dtype {token_weights.dtype}: expected float"
    )


def vocabulary(weight: Tensor, teacher_weight: Tensor | None, vocab_size: int | None) -> int:
    """The number of real tokens, within both heads."""
    sizes = [w.shape[0] for w in (weight, teacher_weight) if w is not None]
    refuse(
        vocab_size is None and min(sizes) != max(sizes),
        f"weight has {sizes[0]} rows and teacher_weight {sizes[-1]}: name the real tokens' "
        "number as vocab_size (rows beyond it are padding)",
    )
    vocab = sizes[0] if vocab_size is None else vocab_size
    refuse(
        not 1 <= vocab <= min(sizes),
        f"vocab_size={vocab}: expected 1 to {min(sizes)}, the rows of the smaller head",
    )
    return vocab


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
        return index.to(device, non_blocking=True), kept.to(device, dtype, non_blocking=True)
    weights = token_weights.to(device, dtype, non_blocking=True)
    if max_valid >= hidden.shape[0]:
        return None, weights
    index = torch.argsort((weights == 0).to(torch.uint8), stable=True)[:max_valid]
    overflow = (weights != 0).sum() > index.shape[0]
    kept = weights.index_select(0, index)
    return index, torch.where(overflow, float("nan"), kept)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast would round a float32 head's GEMMs to 16 bits: the inputs' dtype decides here."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def default_chunk(hidden: Tensor, need_dw: bool) -> int:
    """Rows of logits that exist at once when the caller does not say."""
    if hidden.device.type != "cuda":
        return CPU_CHUNK
    return GPU_CHUNK_TRAINABLE if need_dw else GPU_CHUNK


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
