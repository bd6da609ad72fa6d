"""Linear probes on last-prompt-token states, how far apart the groups lie, the choice of layers.

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

A probe at 100 % says nothing about how far apart the groups are, so three figures stand beside it:
the Fisher ratio (between-group over within-group variance), the silhouette, and the push, relative
to the state's norm, with which SCAV would make a harmful state look harmless; separation is to
raise the last. All three are free of the states' unit, so blocks can be compared. Distances and
silhouettes cost n m H and are taken on at most `SAMPLE` prompts per group, always the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from es2fast.errors import UserError

SAMPLE = 1000  # prompts per group for what is computed over pairs


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

    def steps_to(self, states: Tensor, probability: float) -> Tensor:
        """SCAV's eps: the signed length along weight/|weight| that makes P(e) = `probability`.

            eps = (logit(probability) - b - w . e) / |w|

        Args:
            states: (n, H).
            probability: wanted P(harmful | e + eps w/|w|), in (0, 1).

        Returns:
            (n,) fp32, in units of the states; negative where P(e) is higher now.
        """
        target = math.log(probability) - math.log1p(-probability)
        return (target - self.logit(states)) / self.weight.norm().to(states.device)


@dataclass(frozen=True)
class LayerProbe:
    """One row of the table behind `layers: auto`."""

    layer: int
    accuracy: float  # of the probe on held-out states, 0..1
    margin: float  # of the probe, in units of the states
    distance: float  # mean harmful-harmless distance
    norm: float  # mean state norm over both groups
    fisher: float  # between-group over within-group variance, see `fisher_ratio`
    silhouette: float  # mean over prompts of (b - a) / max(a, b), -1..1, see `silhouette`
    relative_push: float  # mean |eps|/|h| that SCAV needs, over held-out harmful prompts


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
    train -= centre  # in place: with 10 000 prompts of width 4096 a copy is half a gigabyte
    scale = (train.norm() / math.sqrt(len(train))).clamp_min(1e-12)
    fit = LogisticRegression(C=strength, max_iter=1000)
    fit.fit(train.div_(scale).numpy(), train_y.numpy())
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
    harmful: dict[int, Tensor],
    harmless: dict[int, Tensor],
    *,
    seed: int = 0,
    p0: float = 1e-4,
    progress: bool = False,
) -> list[LayerProbe]:
    """One row per layer, ascending.

    Args:
        harmful, harmless: layer -> (n, H) last-prompt-token states.
        seed: of the probes' split.
        p0: probability of being harmful at which SCAV aims.
        progress: show a bar, one step per layer.

    Raises:
        UserError: a group with fewer than two rows.
    """
    layers = tqdm(sorted(harmful), "probes", unit="block", disable=not progress)
    return [_layer_probe(i, harmful[i].float(), harmless[i].float(), seed, p0) for i in layers]


def _layer_probe(layer: int, a: Tensor, b: Tensor, seed: int, p0: float) -> LayerProbe:
    """The row of one layer: a (n, H), b (m, H) fp32."""
    probe = fit_probe(a, b, seed=seed)
    held_out = _halves(a, 0.7, seed)[1]
    push = probe.steps_to(held_out, p0).clamp_max(0.0).abs()
    some_a, some_b = _sample(a), _sample(b)
    return LayerProbe(
        layer=layer,
        accuracy=probe.accuracy,
        margin=probe.margin,
        distance=float(mean_distance(some_a, some_b)),
        norm=float(torch.cat([a.norm(dim=-1), b.norm(dim=-1)]).mean()),
        fisher=fisher_ratio(a, b),
        silhouette=silhouette(some_a, some_b),
        relative_push=float((push / held_out.norm(dim=-1).clamp_min(1e-12)).mean()),
    )


def _sample(group: Tensor) -> Tensor:
    """At most `SAMPLE` rows of (n, H), evenly spread and always the same."""
    if len(group) <= SAMPLE:
        return group
    return group[torch.linspace(0, len(group) - 1, SAMPLE, device=group.device).round().long()]


def mean_distance(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Mean Euclidean distance over all cross-group pairs: (n, H), (m, H) -> fp64 scalar.

    In fp64 after centring, so that `cdist` may use a matrix product whatever the common mean; 256
    rows at a time.
    """
    a, b = harmful.double(), harmless.double()
    centre = torch.cat([a, b]).mean(0)
    b = b - centre
    total = sum(torch.cdist(rows - centre, b).sum() for rows in a.split(256))
    return torch.as_tensor(total) / (len(a) * len(b))


def fisher_ratio(harmful: Tensor, harmless: Tensor) -> float:
    """Between-group over within-group variance, over all directions; 0 for equal means.

        |mean a - mean b|^2 / (tr cov a + tr cov b)

    Args:
        harmful, harmless: (n, H), (m, H); covariances are those of the sample (divided by n).
    """
    means, within = [], 0.0
    for group in (harmful, harmless):
        mean = group.double().mean(0)
        means.append(mean)
        within += sum(float((rows - mean).square().sum()) for rows in group.split(1024)) / len(
            group
        )
    between = float((means[0] - means[1]).square().sum())
    return between / max(within, 1e-30)


def silhouette(harmful: Tensor, harmless: Tensor) -> float:
    """Mean silhouette of the two groups (Rousseeuw 1987), by scikit-learn.

    Per state (b - a) / max(a, b): a its mean distance to the rest of its own group, b to the other
    group. 1: two tight clumps far apart; 0: one cloud.

    Args:
        harmful, harmless: (n, H), (m, H), at least two rows together more than the two groups.
    """
    from sklearn.metrics import silhouette_score

    rows = torch.cat([harmful, harmless]).double().cpu()
    labels = [1] * len(harmful) + [0] * len(harmless)
    return float(silhouette_score((rows - rows.mean(0)).numpy(), labels))


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
