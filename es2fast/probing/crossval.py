"""Cross-validated probes, and how sure their figures are: every prompt is tested once.

The prompts of each group are dealt into k folds (stratified, shuffled, seeded); the probe of a fold
is fitted on the other k - 1 and tested on it. What is kept is one logit, one distance to the
boundary and, of harmful prompts, one push per prompt, so many prompts at many blocks stay small.

Intervals are percentiles of a bootstrap over prompts (Efron and Tibshirani 1993), drawn within each
group: the figures are means over prompts, so a resample is a weighted mean and nothing is refitted.
It leaves out that other prompts would also have given other probes. All blocks are read with the
same draws, so that they can be compared prompt by prompt. Where all prompts are right (or none is),
resamples cannot differ; the interval is Wilson's then, so that 20 of 20 does not pass for certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from es2fast.errors import UserError
from es2fast.probing.probes import fit_logistic

FOLDS = 5
RESAMPLES = 200
ENDS = (0.025, 0.975)  # of a 95 % interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class HeldOut:
    """Of every prompt once, by the probe that did not see it; n harmful prompts first, then m.

    logits: (n + m,) fp64, log-odds of being harmful; margins: (n + m,) fp64, distance to the
    boundary, right side positive, in units of the states; pushes: (n,) fp64, |eps|/|h| that SCAV
    needs, 0 where it needs none.
    """

    logits: Tensor
    margins: Tensor
    pushes: Tensor

    @property
    def correct(self) -> Tensor:
        """(n + m,) fp64: 1 where the prompt is on its side, else 0."""
        return (self.margins > 0).double()


def held_out(
    harmful: Tensor,  # (n, H)
    harmless: Tensor,  # (m, H)
    *,
    folds: int = FOLDS,
    strength: float = 1.0,
    seed: int = 0,
    p0: float = 1e-4,
) -> HeldOut:
    """Cross-validated logits of the states of one block.

    Args:
        harmful, harmless: states, label 1 and 0.
        folds: k; at most the size of the smaller group are made.
        strength: as in `probes.fit_probe`.
        seed: of the deal.
        p0: probability of being harmful at which SCAV aims.

    Raises:
        UserError: a group with fewer than two rows.
    """
    from sklearn.model_selection import StratifiedKFold

    n, m = len(harmful), len(harmless)
    if min(n, m) < 2:
        raise UserError(f"probe: a group has {min(n, m)} prompts; at least 2 are needed")
    rows = torch.cat([harmful, harmless]).detach().cpu()
    labels = torch.cat([torch.ones(n), torch.zeros(m)])
    logits, margins = torch.empty(2, n + m, dtype=torch.float64)
    pushes = torch.zeros(n + m, dtype=torch.float64)
    target = math.log(p0) - math.log1p(-p0)
    dealt = StratifiedKFold(min(folds, n, m), shuffle=True, random_state=seed)
    for train, test in dealt.split(labels, labels):
        train, test = torch.from_numpy(train), torch.from_numpy(test)
        weight, bias = fit_logistic(rows[train].double(), labels[train], strength)
        length = weight.norm().clamp_min(1e-12)
        tested = rows[test].double()
        logits[test] = found = tested @ weight + bias
        margins[test] = torch.where(labels[test] > 0, found, -found) / length
        size = tested.norm(dim=-1).clamp_min(1e-12)
        pushes[test] = ((found - target).clamp_min(0.0) / length) / size
    return HeldOut(logits, margins, pushes[:n].clone())


def draws(sizes: Sequence[int], times: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Resamples of groups of prompts, as weights of the mean over all of them.

    Args:
        sizes: prompts per group, in the order in which they stand.
        times: R.
        seed: the same seed and sizes give the same draws.

    Returns:
        (R, sum of sizes) fp64, rows add up to 1.
    """
    noise = np.random.default_rng(seed)
    counts = [noise.multinomial(n, np.full(n, 1 / n), times) for n in sizes]
    return torch.from_numpy(np.concatenate(counts, axis=1)).double() / sum(sizes)


def interval(values: Tensor, weights: Tensor) -> Interval:
    """95 % percentile interval of a mean over prompts: values (N,), weights (R, N) of `draws`."""
    ends = torch.quantile(weights @ values.double(), torch.tensor(ENDS, dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def accuracy_interval(correct: Tensor, weights: Tensor) -> Interval:
    """As `interval`, of a share: correct (N,) of 0 and 1; Wilson's where all are the same."""
    from scipy.stats import binomtest

    right, n = int(correct.sum()), len(correct)
    if 0 < right < n:
        low, high = interval(correct, weights)
        return max(low, 0.0), min(high, 1.0)  # weights add up to 1 but for rounding
    found = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
