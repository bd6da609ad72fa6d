"""KL divergence between two language models from hidden states and LM heads (plain torch)."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = torch.nn.functional.linear(h, w, b).float() * logit_scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z / temperature

    with torch.no_grad():
        shared = teacher_weight is None
        t = logits(
            teacher_hidden,
            weight if teacher_weight is None else teacher_weight,
            bias if shared else teacher_bias,
        ).log_softmax(-1)
    s = logits(hidden, weight, bias).log_softmax(-1)
    p, q = (t, s) if direction == "forward" else (s, t)
    rows = (p.exp() * (p - q)).sum(-1)
    w = torch.ones_like(rows) if token_weights is None else token_weights
    return (rows * w).sum() if reduction == "sum" else (rows * w).sum() / w.sum()
