"""Cross-validated probes against scikit-learn's own cross-validation, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from es2fast.errors import UserError
from es2fast.probing.crossval import accuracy_interval, draws, held_out, interval


class Scale(TransformerMixin, BaseEstimator):
    """Divides by the root-mean-square norm around the training rows' mean."""

    def fit(self, x, y=None):
        self.scale_ = np.sqrt(((x - x.mean(0)) ** 2).sum() / len(x))
        return self

    def transform(self, x):
        return x / self.scale_


def groups(n: int, m: int, hidden: int = 6, shift: float = 0.7):
    noise = torch.Generator().manual_seed(1)
    a, b = (torch.randn(count, hidden, generator=noise) * 3 + 5 for count in (n, m))
    a[:, 0] += 3 * shift
    return a, b


@pytest.mark.parametrize("n, m, folds", [(60, 60, 5), (23, 41, 4), (3, 50, 5), (2, 2, 5)])
def test_every_prompt_is_tested_once_as_scikit_learn_does_it(n, m, folds):
    a, b = groups(n, m)
    found = held_out(a, b, folds=folds, seed=4)
    x = torch.cat([a, b]).double().numpy()
    y = np.array([1] * n + [0] * m)
    probe = make_pipeline(Scale(), LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000))
    cv = StratifiedKFold(min(folds, n, m), shuffle=True, random_state=4)
    wanted = cross_val_predict(probe, x, y, cv=cv, method="decision_function")
    np.testing.assert_allclose(found.logits.numpy(), wanted, atol=0.02)
    sure = np.abs(wanted) > 0.02
    right = (wanted > 0) == (y == 1)
    assert ((found.correct.numpy() == 1) == right)[sure].all()
    assert found.logits.shape == (n + m,) and found.pushes.shape == (n,)


def test_margins_and_pushes_are_those_of_the_fold_s_own_probe():
    """One prompt of a fold at a time: moved by its push it is at p0 for the probe of that fold."""
    a, b = groups(20, 30, shift=1.5)
    found = held_out(a, b, folds=5, seed=0, p0=1e-3)
    x, y = torch.cat([a, b]).double().numpy(), np.array([1] * 20 + [0] * 30)
    cv = StratifiedKFold(5, shuffle=True, random_state=0)
    for train, test in cv.split(x, y):
        probe = make_pipeline(Scale(), LogisticRegression(tol=1e-10, max_iter=10_000))
        probe.fit(x[train], y[train])
        weight = probe[1].coef_[0] / probe[0].scale_
        for i in test:
            logit = probe.decision_function(x[[i]])[0]
            signed = logit if y[i] else -logit
            assert found.margins[i].item() == pytest.approx(
                signed / np.linalg.norm(weight), abs=0.05
            )
            if y[i]:
                length = found.pushes[i].item() * np.linalg.norm(x[i])
                moved = x[i] - length * weight / np.linalg.norm(weight)
                after = probe.decision_function(moved[None])[0]
                assert after == pytest.approx(math.log(1e-3 / (1 - 1e-3)), abs=0.05)


def test_too_few_prompts():
    a, b = groups(4, 4)
    with pytest.raises(UserError, match="1 prompts; at least 2"):
        held_out(a[:1], b)


def test_draws_resample_within_each_group_and_are_the_same_again():
    weights = draws((5, 8), 300, seed=2)
    counts = weights * 13
    torch.testing.assert_close(counts, counts.round())
    assert (counts[:, :5].sum(1).round() == 5).all() and (counts[:, 5:].sum(1).round() == 8).all()
    assert torch.equal(weights, draws((5, 8), 300, seed=2))
    assert not torch.equal(weights, draws((5, 8), 300, seed=3))


def test_an_interval_of_a_share_stays_within_zero_and_one():
    ends = []
    for n, m in [(25, 40), (12, 12), (33, 17), (48, 21), (7, 90)]:
        correct = torch.ones(n + m)
        correct[0] = 0.0
        weights = draws((n, m))
        ends.append(float((weights @ correct.double()).max()))
        low, high = accuracy_interval(correct, weights)
        assert 0 <= low <= high <= 1
    assert max(ends) > 1  # what has to be cut: sums of rounded weights


def test_intervals_agree_with_the_normal_approximation_where_that_holds():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = interval(values, draws((400,), 2000))
    half = 1.96 * values.std(correction=0).item() / math.sqrt(400)
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_all_right_is_not_certain():
    wilson = binomtest(20, 20).proportion_ci(method="wilson")
    found = accuracy_interval(torch.ones(20), draws((10, 10)))
    assert found == (pytest.approx(wilson.low), 1.0)
    one_wrong = torch.ones(20, dtype=torch.float64)
    one_wrong[3] = 0
    low, high = accuracy_interval(one_wrong, draws((10, 10), 2000))
    assert low == pytest.approx(0.85) and high == 1.0
