"""A head's bias as the kernels take it: -inf, of a token that is never said, as a number."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

NEVER = 128.0  # e^-128 is 0 in float32 beside others, and in float64 a number


def finite_bias(
    bias: Tensor | None,  # (V,)
    gain: float,
    vocab: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor | None:  # (vocab,)
    """The bias of the real tokens, with -inf ``NEVER`` logits below the lowest of the others (below
    0 where there is no other), so that two sides' difference is a number.

    Args:
        gain: what a bias is multiplied by in the softmax.
        vocab: number of real tokens.
        group: ranks that each hold a part of the bias, and all call this.
    """
    if bias is None:
        return None
    bias = bias[:vocab]
    never = bias == -torch.inf
    lowest = torch.where(never, torch.inf, bias).amin()
    if group is not None:
        parts = [torch.empty_like(lowest) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, lowest, group=group)
        lowest = torch.stack(parts).amin()
    lowest = torch.where(lowest == torch.inf, 0.0, lowest) - NEVER / gain
    return torch.where(never, lowest.clamp(min=torch.finfo(bias.dtype).min), bias)
