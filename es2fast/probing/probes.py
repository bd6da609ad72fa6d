"""Linear probes on last-prompt-token states, and figures of how far apart the groups lie.

A probe is the L2-regularised logistic regression P(harmful | e) = sigmoid(w . e + b). States are
divided by one scalar (their root-mean-square norm around the mean) for the fit, which is folded
back into w: the penalty then means the same at every layer and for every model, and unlike
per-coordinate standardisation it does not turn the probe away from the directions along which the
states vary.

`fit_probe` is what an attacker uses: fitted on a random 70 % (stratified, fixed seed), with the
accuracy on the rest, so that accuracy and weights describe the same probe. What is reported about
blocks is cross-validated instead (`crossval`), so that every prompt counts.

A probe at 100 % says nothing about how far apart the groups are, so the Fisher ratio (between-group
over within-group variance) and the silhouette stand beside it. Both are free of the states' unit,
so blocks can be compared. Distances and silhouettes cost n m H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.errors import UserError


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


def fit_probe(
    harmful: Tensor,  # (n, H)
    harmless: Tensor,  # (m, H)
    *,
    train_fraction: float = 0.7,
    strength: float = 1.0,
    scaled: bool = True,
    seed: int = 0,
) -> Probe:
    """Fits the probe on `train_fraction` of each group and measures it on the rest.

    Args:
        harmful, harmless: last-prompt-token states of one layer, label 1 and 0.
        strength: inverse of the L2 penalty (scikit-learn's C) on the rescaled states.
        scaled: see `fit_logistic`.
        seed: of the split.

    Raises:
        UserError: a group with fewer than two rows.
    """
    parts = [_halves(group, train_fraction, seed) for group in (harmful, harmless)]
    train, test = (torch.cat([part[i] for part in parts]).double() for i in (0, 1))
    train_y, test_y = (torch.cat([torch.ones(len(parts[0][i])), torch.zeros(len(parts[1][i]))])
                       for i in (0, 1))  # fmt: skip
    weight, bias = fit_logistic(train, train_y, strength, scaled)
    logits = test @ weight + bias
    signed = torch.where(test_y > 0, logits, -logits)
    return Probe(
        weight=weight.float(),
        bias=bias,
        accuracy=float((signed > 0).double().mean()),
        margin=float(signed.mean() / weight.norm().clamp_min(1e-12)),
    )


def fit_logistic(
    rows: Tensor, labels: Tensor, strength: float = 1.0, scaled: bool = True
) -> tuple[Tensor, float]:
    """Weight (H,) fp64 and bias of the probe on all of these rows.

    Args:
        rows: (n, H) fp64 on the CPU; overwritten, as a copy of many wide states is large.
        labels: (n,), 1 harmful, 0 harmless; both must occur.
        strength: inverse of the L2 penalty (scikit-learn's C) on the rescaled states.
        scaled: False: `strength` is for the states as they are. The fit is the same one, computed
            on rescaled states, whose weights are `scale` times as large.
    """
    from sklearn.linear_model import LogisticRegression

    centre = rows.mean(0)
    rows -= centre
    scale = (rows.norm() / math.sqrt(len(rows))).clamp_min(1e-12)
    penalty = strength if scaled else strength * float(scale) ** 2
    fit = LogisticRegression(C=penalty, max_iter=1000)
    fit.fit(rows.div_(scale).numpy(), labels.numpy())
    weight = torch.from_numpy(fit.coef_[0]).double() / scale
    return weight, float(fit.intercept_[0]) - float(weight @ centre)


def _halves(group: Tensor, train_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """A seeded split of (n, H) with at least one row on each side."""
    count = len(group)
    if count < 2:
        raise UserError(f"probe: a group has {count} prompts; at least 2 are needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = min(max(round(train_fraction * count), 1), count - 1)
    group = group.detach().cpu()
    return group[order[:cut]], group[order[cut:]]


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
