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


def pair_value(
    x: Tensor, y: Tensor, loss: str, margin: float | None, scale: float, whiten: Tensor | None
) -> Tensor:
    """The loss of one pair; margin and scale in the units of the distance."""
    if loss == "cosine":
        assert margin is not None
        return F.relu(x @ y / (x.norm() * y.norm()) - margin)
    d = (x - y).norm() if whiten is None else (whiten @ (x - y)).norm()
    if loss == "log":
        return -(d / scale).log()
    if loss == "softplus":
        return (1 + ((margin - d) / scale).exp()).log()
    if loss == "squared":
        return -d.square() / scale**2 if margin is None else F.relu(margin**2 - d**2) / scale**2
    return -d / scale if margin is None else F.relu(margin - d) / scale


def group_loss(a: list[Tensor], b: list[Tensor], loss: str, **options: Any) -> Tensor:
    """The mean over all pairs, or the distance of the means."""
    if loss == "centroid":
        mean_a, mean_b = torch.stack(a).mean(0), torch.stack(b).mean(0)
        return pair_value(mean_a, mean_b, "hinge", **options)
    return torch.stack([pair_value(x, y, loss, **options) for x in a for y in b]).mean()


def refusal_loss(
    student: Any, prompt: list[int], opening: list[int], refusal: list[int], decay: float
) -> tuple[Tensor, float, bool]:
    """(weighted sum of the refusal's cross-entropies, sum of weights, the first is the likeliest)
    of one prompt."""
    ids = [*prompt, *opening, *refusal]
    logits = student(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    start = len(prompt) + len(opening)
    for i, token in enumerate(refusal):
        before = logits[start + i - 1]
        total = total + decay**i * (before.exp().sum().log() - before[token])
        weights += decay**i
    return total, weights, int(logits[start - 1].argmax()) == refusal[0]


def es2_loss(
    student: Any,
    teacher: Any,
    harmful: list[list[int]],  # prompt ids
    harmless: list[tuple[list[int], list[int]]],  # prompt ids, response ids
    *,
    layers: list[int],
    kl_weight: float,
    loss: str,
    margin: float | None,
    scale: float,
    whiten: Tensor | None = None,
    bank: dict[int, tuple[list[Tensor], list[Tensor]]] | None = None,
    direction: str = "forward",
    space: str = "residual",
    norm0: float = 1.0,
    band: tuple[float, float] | None = None,
    band_weight: float = 0.0,
    weight: float = 1.0,
    moves: str = "both",
) -> tuple[Tensor, Tensor, Tensor]:
    """(separation, KL in nats per token, what backward is called on) of one global micro-batch.

    bank: per layer, harmful and harmless states of earlier micro-batches, for gradients that are
    those of a x (b and bank) by a plus those of (a and bank) x b by b.
    """
    separation, penalty, extra = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    options: dict[str, Any] = {"margin": margin, "scale": scale, "whiten": whiten}
    for layer in layers:
        a = [state_after_block(student, ids, layer, space)[-1] for ids in harmful]
        b = [state_after_block(student, ids, layer, space)[-1] for ids, _ in harmless]
        if moves == "harmful":
            b = [x.detach() for x in b]
        if bank and bank[layer][0]:
            old_a, old_b = bank[layer]
            fixed_a, fixed_b = ([x.detach() for x in rows] for rows in (a, b))
            one = group_loss(a, fixed_b + old_b, loss, **options)
            two = group_loss(fixed_a + old_a, b, loss, **options)
            separation = separation + (one + two) / 2
            extra = extra + (one + two) / 2  # doubles the gradient
        else:
            separation = separation + group_loss(a, b, loss, **options)
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
    return separation, kl, weight * (separation + extra) + penalty + kl_weight * kl
