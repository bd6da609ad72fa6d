"""`layers: auto`: which two blocks are separated, and how sure that is.

1. Candidates are the blocks whose cross-validated accuracy is not significantly below the best: the
   95 % interval of the paired difference, over resamples of the prompts, holds 0. On a real chat
   model probes reach 0.90 to 0.95 at every block, so that accuracy alone decides nothing.
2. Among them the block with the highest value is taken. The value is the attacker's cost, the push
   relative to the state's norm that SCAV needs there; where it was measured, times the effect of
   the groups' gap on the refusal (`causal`): a block is worth separating when reaching the other
   group from it is expensive, and when the model uses it to decide.
3. The first block lies in the lower part of the model (`layer_choice.first`), the second at least
   `gap` of the depth above it and not in the topmost blocks (`last`), which are left to read the
   separated state. The second's candidates are those of its own range. arXiv 2603.20206 separates
   two intermediate blocks; why not two neighbours: attackers of a real 0.5B model picked blocks at
   60 to 90 % of its depth, where a separation at a third and at half of it had faded to 1.3 d0.

The same choice is then made from every resample of the prompts, and the reason says how often it
comes out. Resampling does not refit the probes, so the shares are on the sure side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from es2fast.config import LayersConfig
from es2fast.probing.crossval import ENDS, draws
from es2fast.probing.table import LayerProbe, Probed

Z = 1.959964  # of a 95 % interval
SURE = 0.8  # share of the resamples from which on a choice is not called unsure


def choose_layers(
    probed: Sequence[Probed],
    effects: Tensor | None = None,
    settings: LayersConfig | None = None,
    *,
    seed: int = 0,
) -> tuple[list[int], str]:
    """The two blocks to separate, ascending (one for a model of one block), and why, in words.

    Args:
        probed: as `table.probe_table` returns it, for every block of the model in order.
        effects: (blocks, k) fp64, of `causal.refusal_effects`; None: not measured.
        settings: of the choice; default: their defaults.
        seed: of the resamples.
    """
    settings = settings or LayersConfig()
    sizes = _sizes(probed)
    weights = draws(sizes, settings.resamples, seed)
    correct = torch.stack([one.held_out.correct for one in probed], 1)
    pushes = torch.stack([one.held_out.pushes for one in probed], 1)
    accuracy, value = weights @ correct, weights[:, : sizes[0]] @ pushes
    found = pushes.mean(0)
    if effects is not None and bool((effects.mean(1) > 0).any()):
        drawn = draws((effects.shape[1],), settings.resamples, seed) @ effects.T
        value, found = value * drawn.clamp_min(0.0), found * effects.mean(1).clamp_min(0.0)
    below = partial(_below, accuracy.numpy())
    chosen = _pick(correct.mean(0).numpy(), found.numpy(), below, settings)
    resampled = [
        _pick(own.numpy(), cost.numpy(), partial(_below_once, correct.numpy(), w.numpy()), settings)
        for own, cost, w in zip(accuracy, value, weights)
    ]
    near = int((~below(int(correct.mean(0).argmax()))).sum())
    return chosen, _reason([one.row for one in probed], chosen, resampled, near, effects)


def _sizes(probed: Sequence[Probed]) -> tuple[int, int]:
    """Harmful and harmless prompts."""
    first = probed[0].held_out
    return len(first.pushes), len(first.logits) - len(first.pushes)


def _below(accuracy: np.ndarray, best: int) -> np.ndarray:
    """Which blocks are significantly below block `best`: (L,) bool, by the resampled accuracies
    (R, L), whose paired differences have a 95 % interval above 0."""
    return np.quantile(accuracy[:, [best]] - accuracy, ENDS[0], axis=0) > 1e-9


def _below_once(correct: np.ndarray, weights: np.ndarray, best: int) -> np.ndarray:
    """The same within one resample, where the normal approximation stands for resamples of it.

    The difference d of two shares on the same prompts has the variance (s - d^2) / N, with s the
    share of prompts that one of the two has right and the other wrong.

    Args:
        correct: (N, L) of 0 and 1; weights: (N,).
    """
    split = correct[:, [best]] - correct
    d, s = weights @ split, weights @ np.abs(split)
    return d > Z * np.sqrt(np.maximum(s - d**2, 0.0) / len(weights)) + 1e-9


def _pick(
    accuracy: np.ndarray,
    value: np.ndarray,
    below: Callable[[int], np.ndarray],
    settings: LayersConfig,
) -> list[int]:
    """The choice from (L,) accuracies and values; `below(i)`: the blocks clearly worse than i."""
    depth = len(accuracy)

    def near(pool: Sequence[int]) -> list[int]:
        worse = below(max(pool, key=lambda i: accuracy[i]))
        return [i for i in pool if not worse[i]]

    def most(pool: Sequence[int]) -> int:
        return max(pool, key=lambda i: value[i])

    top = max(int(settings.last * depth), 1)  # blocks from here on are left alone
    candidates = near(range(top))
    lower = [i for i in candidates if i < max(int(settings.first * depth), 1)]
    first = most(lower or candidates)
    gap = max(round(settings.gap * depth), 1)
    above = range(first + gap, top) or range(first + 1, depth)
    if above:
        return [first, most(near(above))]
    return [first - 1, first] if first else [first]


def _reason(
    rows: Sequence[LayerProbe],
    chosen: Sequence[int],
    resampled: Sequence[list[int]],
    near: int,
    effects: Tensor | None,
) -> str:
    """The choice in words; `resampled`: what the resamples choose."""
    parts = []
    for place, layer in enumerate(chosen):
        share, words = _how_sure([pick[place] for pick in resampled], layer)
        row = rows[layer]
        low, high = row.accuracy_interval
        about = f"accuracy {row.accuracy:.3f} [{low:.3f}, {high:.3f}]"
        if place == 0:
            about += f"; {near} of {len(rows)} blocks are not significantly below the best"
        about += f"; push {row.relative_push:.2f} of |h|"
        if row.effect is not None:
            about += f", takes {row.effect:.2f} nats of refusal"
        times = f"{share:.0%} of {len(resampled)} resamples"
        parts.append(f"block {layer} ({about}), chosen in {times}{words}")
    if effects is not None and not bool((effects.mean(1) > 0).any()):
        parts.append("no push along the gap makes this model refuse less, so that is left out")
    return "; ".join(parts)


def _how_sure(found: Sequence[int], layer: int) -> tuple[float, str]:
    """Share of the resamples that chose `layer`, and what else they chose when it is low."""
    counts = Counter(found)
    share = counts.pop(layer, 0) / len(found)
    if share >= SURE or not counts:
        return share, ""
    others = ", ".join(f"{other} ({n / len(found):.0%})" for other, n in counts.most_common(3))
    return share, f" - unsure, others choose block {others}"
