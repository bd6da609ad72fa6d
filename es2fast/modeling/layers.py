"""Linear probes on last-prompt-token states, and the choice of the layers to separate.

A probe is the L2-regularised logistic regression P(harmful | e) = sigmoid(w . e + b). A random
70/30 split (stratified, fixed seed) gives the held-out accuracy; the weights returned are those
fitted on the 70 %, so that accuracy and weights describe the same probe. States are divided by one
scalar (their root-mean-square norm around the mean) for the fit, which is folded back into w: the
penalty then means the same at every layer and for every model, and unlike per-coordinate
standardisation it does not turn the probe away from the directions along which the states vary.

`layers: auto` takes the first block whose held-out accuracy reaches 0.95 and the block at 0.6 of
the depth. Why two, and why these: arXiv 2603.20206 separates two intermediate layers (one is too
weak, three make the model collapse); probes on 7B chat models pass 95 % from about a third of the
depth (SCAV, Xu et al., NeurIPS 2024); and blocks above are left to read the separated state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.errors import UserError
from es2fast.ops.reference import pairwise_distances


@dataclass(frozen=True)
class Probe:
    """P(harmful | e) = sigmoid(weight . e + bias), with its held-out figures."""

    weight: Tensor  # (H,) fp32
    bias: float
    accuracy: float  # on held-out states, 0..1
    margin: float  # mean held-out distance to the boundary, right side positive, in units of e

    def logit(self, states: Tensor) -> Tensor:
        """(n, H) -> (n,) log-odds of being harmful."""
        return states.float() @ self.weight.to(states.device) + self.bias


@dataclass(frozen=True)
class LayerProbe:
    """One row of the table behind `layers: auto`."""

    layer: int
    accuracy: float  # of the probe on held-out states, 0..1
    margin: float  # of the probe, in units of the states
    distance: float  # mean harmful-harmless distance
    norm: float  # mean state norm over both groups


def fit_probe(
    harmful: Tensor,  # (n, H)
    harmless: Tensor,  # (m, H)
    *,
    train_fraction: float = 0.7,
    strength: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Fits the probe on `train_fraction` of each group and measures it on the rest.

    Args:
        harmful, harmless: last-prompt-token states of one layer, label 1 and 0.
        strength: inverse of the L2 penalty (scikit-learn's C) on the rescaled states.
        seed: of the split.

    Raises:
        UserError: a group with fewer than two rows.
    """
    from sklearn.linear_model import LogisticRegression

    parts = [_halves(group, train_fraction, seed) for group in (harmful, harmless)]
    train, test = (torch.cat([part[i] for part in parts]).double() for i in (0, 1))
    train_y, test_y = (torch.cat([torch.ones(len(parts[0][i])), torch.zeros(len(parts[1][i]))])
                       for i in (0, 1))  # fmt: skip
    centre = train.mean(0)
    scale = (train - centre).square().sum(-1).mean().sqrt().clamp_min(1e-12)
    fit = LogisticRegression(C=strength, max_iter=1000)
    fit.fit(((train - centre) / scale).numpy(), train_y.numpy())
    weight = torch.from_numpy(fit.coef_[0]).double() / scale
    bias = float(fit.intercept_[0]) - float(weight @ centre)
    logits = test @ weight + bias
    signed = torch.where(test_y > 0, logits, -logits)
    return Probe(
        weight=weight.float(),
        bias=bias,
        accuracy=float((signed > 0).double().mean()),
        margin=float(signed.mean() / weight.norm().clamp_min(1e-12)),
    )


def _halves(group: Tensor, train_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """A seeded split of (n, H) with at least one row on each side."""
    count = len(group)
    if count < 2:
        raise UserError(f"probe: a group has {count} prompts; at least 2 are needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = min(max(round(train_fraction * count), 1), count - 1)
    group = group.detach().cpu()
    return group[order[:cut]], group[order[cut:]]


def probe_table(
    harmful: dict[int, Tensor], harmless: dict[int, Tensor], *, seed: int = 0
) -> list[LayerProbe]:
    """One row per layer, ascending.

    Args:
        harmful, harmless: layer -> (n, H) last-prompt-token states.
    """
    table = []
    for layer in sorted(harmful):
        a, b = harmful[layer].float(), harmless[layer].float()
        probe = fit_probe(a, b, seed=seed)
        norm = float(torch.cat([a, b]).norm(dim=-1).mean())
        table.append(
            LayerProbe(layer, probe.accuracy, probe.margin, float(mean_distance(a, b)), norm)
        )
    return table


def mean_distance(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Mean Euclidean distance over all cross-group pairs: (n, H), (m, H) -> scalar."""
    return torch.cat([pairwise_distances(row[None], harmless)[0] for row in harmful]).mean()


def choose_layers(
    table: Sequence[LayerProbe], *, accuracy: float = 0.95, depth: float = 0.6
) -> tuple[list[int], str]:
    """The two blocks to separate, ascending, and the reason in words.

    The first is the first block whose probe reaches `accuracy` (the most accurate one when none
    does), the second the block at `depth` of the model. Where both fall on one block, or the first
    comes later than the second, the pair is moved apart by a block.

    Args:
        table: as `probe_table` returns it, for every block of the model.
    """
    count = len(table)
    second = min(max(round(depth * count) - 1, 0), count - 1)
    passing = [row for row in table if row.accuracy >= accuracy]
    first_row = passing[0] if passing else max(table, key=lambda row: row.accuracy)
    first = first_row.layer
    verb = "is the first to reach" if passing else "comes closest to"
    reason = (
        f"block {first} {verb} probe accuracy {accuracy:g} ({first_row.accuracy:.3f}); "
        f"block {second} is at {depth:g} of {count} blocks"
    )
    if count > 1 and first >= second:
        moved = min(first + 1, count - 1)
        first, second = (moved - 1, moved)
        reason += f"; moved apart to {first} and {second}"
    return sorted({first, second}), reason
