"""What is known of every block: a row of figures, and the per-prompt numbers behind them.

Separation is to raise the push, relative to the state's norm, with which SCAV would make a harmful
state look harmless; so the push stands beside accuracy, margin, Fisher ratio and silhouette. Memory
per block beyond its row: three numbers per prompt and the difference of the groups' means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.probing.crossval import (
    FOLDS,
    RESAMPLES,
    HeldOut,
    Interval,
    accuracy_interval,
    draws,
    held_out,
    interval,
)
from es2fast.probing.probes import fisher_ratio, mean_distance, silhouette
from es2fast.progress import tqdm

SAMPLE = 1000  # prompts per group for what is computed over pairs, always the same ones


@dataclass(frozen=True)
class LayerProbe:
    """One row of the table behind `layers: auto`; intervals are 95 %, over prompts."""

    layer: int
    accuracy: float  # of the cross-validated probe, 0..1
    margin: float  # mean distance to its boundary, right side positive, in units of the states
    distance: float  # mean harmful-harmless distance
    norm: float  # mean state norm over both groups
    fisher: float  # between-group over within-group variance, see `fisher_ratio`
    silhouette: float  # mean over prompts of (b - a) / max(a, b), -1..1, see `silhouette`
    relative_push: float  # mean |eps|/|h| that SCAV needs, over harmful prompts
    accuracy_interval: Interval
    margin_interval: Interval
    push_interval: Interval
    effect: float | None = (
        None  # nats of refusal that a push by the groups' gap takes, see `causal`
    )
    effect_interval: Interval | None = None


@dataclass(frozen=True)
class Probed:
    """A block's row, what was found for each prompt; gap: mean harmless - mean harmful, (H,)."""

    row: LayerProbe
    held_out: HeldOut
    gap: Tensor


def probe_table(
    harmful: dict[int, Tensor],
    harmless: dict[int, Tensor],
    *,
    folds: int = FOLDS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    p0: float = 1e-4,
    progress: bool = False,
) -> list[Probed]:
    """One entry per layer, ascending.

    Args:
        harmful, harmless: layer -> (n, H) last-prompt-token states.
        folds, seed: of the cross-validation.
        resamples: behind every interval.
        p0: probability of being harmful at which SCAV aims.
        progress: show a bar, one step per layer.

    Raises:
        UserError: a group with fewer than two rows.
    """
    layers = tqdm(sorted(harmful), "probes", unit="block", disable=not progress)
    weights: Tensor | None = None
    found = []
    for layer in layers:
        a, b = harmful[layer].float(), harmless[layer].float()
        tested = held_out(a, b, folds=folds, seed=seed, p0=p0)
        if weights is None:
            weights = draws((len(a), len(b)), resamples, seed)
        gap = b.mean(0) - a.mean(0)
        found.append(Probed(_row(layer, a, b, tested, weights), tested, gap))
    return found


def _row(layer: int, a: Tensor, b: Tensor, tested: HeldOut, weights: Tensor) -> LayerProbe:
    """Of one layer: a (n, H), b (m, H) fp32; weights (R, n + m)."""
    some_a, some_b = _sample(a), _sample(b)
    of_harmful = weights[:, : len(a)] * ((len(a) + len(b)) / len(a))
    return LayerProbe(
        layer=layer,
        accuracy=float(tested.correct.mean()),
        margin=float(tested.margins.mean()),
        distance=float(mean_distance(some_a, some_b)),
        norm=float(torch.cat([a.norm(dim=-1), b.norm(dim=-1)]).mean()),
        fisher=fisher_ratio(a, b),
        silhouette=silhouette(some_a, some_b),
        relative_push=float(tested.pushes.mean()),
        accuracy_interval=accuracy_interval(tested.correct, weights),
        margin_interval=interval(tested.margins, weights),
        push_interval=interval(tested.pushes, of_harmful),
    )


def _sample(group: Tensor) -> Tensor:
    """At most `SAMPLE` rows of (n, H), evenly spread and always the same."""
    if len(group) <= SAMPLE:
        return group
    return group[torch.linspace(0, len(group) - 1, SAMPLE, device=group.device).round().long()]
