"""ES2 written out in plain torch, fp64, one row at a time: no padding, no batching, no hooks.

The oracle for the engine's losses and gradients; it shares no code with es2fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def state_after_block(model: Any, ids: list[int], layer: int) -> Tensor:
    """(T, H) output of a decoder block, read by transformers' own option."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = core.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[layer + 1][0]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(separation, KL in nats per token, total) of one global micro-batch."""
    separation = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        a = [state_after_block(student, ids, layer)[-1] for ids in harmful]
        b = [state_after_block(student, ids, layer)[-1] for ids, _ in harmless]
        pairs = [F.relu(margin * d0 - (x - y).norm()) / d0 for x in a for y in b]
        separation = separation + torch.stack(pairs).mean()
    terms = []
    for prompt, response in harmless:
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            t = teacher(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        s = student(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        p, q = (t, s) if direction == "forward" else (s, t)
        terms.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(terms).mean()
    return separation, kl, separation + kl_weight * kl
