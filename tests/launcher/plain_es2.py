"""ES2 written out in plain torch, fp64, one row at a time: no padding, no batching, no hooks.

The oracle for the engine's losses and gradients; it shares no code with es2fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def state_after_block(model: Any, ids: list[int], layer: int, space: str = "residual") -> Tensor:
    """(T, H) output of a decoder block, read by transformers' own option, and as the next block's
    RMSNorm hands it on."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = core.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    state = out.hidden_states[layer + 1][0]
    if space == "residual":
        return state
    norm = core.model.layers[layer + 1].input_layernorm
    scale = (state.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return state * scale * norm.weight


def norm_penalty(states: list[Tensor], low: float, high: float) -> Tensor:
    """Mean squared excess of the norms over a band, both in the units of the states."""
    norms = torch.stack([state.norm() for state in states])
    return (F.relu(low - norms) + F.relu(norms - high)).square().mean()


def es2_loss(
    student: Any,
    teacher: Any,
    harmful: list[list[int]],  # prompt ids
    harmless: list[tuple[list[int], list[int]]],  # prompt ids, response ids
    *,
    layers: list[int],
    d0: float,
    margin: float,
    kl_weight: float,
    direction: str = "forward",
    space: str = "residual",
    norm0: float = 1.0,
    band: tuple[float, float] | None = None,
    band_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(separation, KL in nats per token, total) of one global micro-batch."""
    separation = torch.zeros((), dtype=torch.float64)
    penalty = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        a = [state_after_block(student, ids, layer, space)[-1] for ids in harmful]
        b = [state_after_block(student, ids, layer, space)[-1] for ids, _ in harmless]
        pairs = [F.relu(margin * d0 - (x - y).norm()) / d0 for x in a for y in b]
        separation = separation + torch.stack(pairs).mean()
        if band is not None:
            excess = norm_penalty([*a, *b], band[0] * norm0, band[1] * norm0)
            penalty = penalty + band_weight * excess / norm0**2
    terms = []
    for prompt, response in harmless:
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            t = teacher(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        s = student(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        p, q = (t, s) if direction == "forward" else (s, t)
        terms.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(terms).mean()
    return separation, kl, separation + penalty + kl_weight * kl
