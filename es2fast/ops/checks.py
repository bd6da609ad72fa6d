"""What the ops refuse: each check is a ValueError that names the argument and the alternative."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


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


def check_scale(logit_scale: float) -> None:
    """Of logits, which it may not turn round or make equal."""
    refuse(not logit_scale > 0, f"logit_scale={logit_scale}: expected a positive number")


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
        max_valid_tokens is not None and max_valid_tokens < 0,
        f"max_valid_tokens={max_valid_tokens}: expected a number of tokens, or None",
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
