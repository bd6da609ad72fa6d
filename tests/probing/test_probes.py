"""Probes, distances and ratios."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from es2fast.errors import UserError
from es2fast.probing.probes import (
    fisher_ratio,
    fit_logistic,
    fit_probe,
    mean_distance,
    silhouette,
)


def groups(shift: float, n: int = 60, hidden: int = 8, scale: float = 1.0):
    noise = torch.Generator().manual_seed(3)
    direction = torch.zeros(hidden)
    direction[0] = shift
    a = torch.randn(n, hidden, generator=noise) + direction
    b = torch.randn(n, hidden, generator=noise) - direction
    return a * scale, b * scale


def test_probe_finds_the_direction_and_labels_harmful_as_one():
    a, b = groups(4.0)
    probe = fit_probe(a, b)
    assert probe.accuracy == 1.0
    assert probe.weight.shape == (8,) and probe.weight.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(probe.weight, torch.eye(8)[0], dim=0) > 0.9
    assert (probe.logit(a) > 0).all() and (probe.logit(b) < 0).all()
    assert probe.margin == pytest.approx(4.0, rel=0.15)


def test_probe_of_inseparable_groups_is_near_chance():
    assert fit_probe(*groups(0.0, n=200)).accuracy < 0.65


def test_probe_does_not_depend_on_the_scale_or_origin_of_the_states():
    plain = fit_probe(*groups(1.0))
    scaled = fit_probe(*(g * 1e3 + 7e3 for g in groups(1.0)))
    torch.testing.assert_close(scaled.weight * 1e3, plain.weight, rtol=1e-3, atol=1e-4)
    assert scaled.accuracy == plain.accuracy
    assert scaled.margin == pytest.approx(plain.margin * 1e3, rel=1e-3)


def test_probe_of_raw_states_is_scikit_learn_s():
    """The published SCAV fits LogisticRegression() on states as they are."""
    from sklearn.linear_model import LogisticRegression

    gen = torch.Generator().manual_seed(0)
    rows = 7 * torch.randn(60, 8, generator=gen, dtype=torch.float64) + 3
    labels = (rows[:, 0] + 4 * torch.randn(60, generator=gen) > 3).double()
    plain = LogisticRegression(tol=1e-8, max_iter=10_000).fit(rows.numpy(), labels.numpy())
    weight, bias = fit_logistic(rows.clone(), labels, scaled=False)
    exact = torch.from_numpy(plain.coef_[0])
    assert (weight - exact).norm() < 2e-3 * exact.norm()  # solved to 1e-4, the exact one to 1e-8
    assert bias == pytest.approx(plain.intercept_[0], rel=2e-3)
    shorter = fit_logistic(rows.clone(), labels)[0]
    assert weight.norm() > 2 * shorter.norm()  # a steeper probe, so a shorter push


def test_probe_is_deterministic():
    first, second = (fit_probe(*groups(1.0), seed=5) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and first.bias == second.bias


def test_probe_needs_two_rows():
    a, b = groups(1.0)
    with pytest.raises(UserError, match="1 prompts; at least 2"):
        fit_probe(a[:1], b)
    assert fit_probe(a[:2], b[:2]).weight.shape == (8,)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("n, m", [(1, 1), (7, 300), (300, 5)])
def test_mean_distance(n, m, offset):
    noise = torch.Generator().manual_seed(n)
    a, b = (torch.randn(count, 5, generator=noise) + offset for count in (n, m))
    wanted = np.mean([[np.linalg.norm(x - y) for y in b.double().numpy()]
                      for x in a.double().numpy()])  # fmt: skip
    assert float(mean_distance(a, b)) == pytest.approx(wanted, rel=1e-6)


def test_fisher_ratio_and_silhouette_by_their_definitions():
    a, b = (group.double() for group in groups(0.7, n=9))
    x = [np.array(group) for group in (a, b)]
    within = sum(np.trace(np.cov(group.T, bias=True)) for group in x)
    between = np.sum((x[0].mean(0) - x[1].mean(0)) ** 2)
    assert fisher_ratio(a, b) == pytest.approx(between / within, rel=1e-9)
    scores = []
    for own, other in (x, x[::-1]):
        for i, row in enumerate(own):
            inner = np.linalg.norm(np.delete(own, i, 0) - row, axis=1).mean()
            outer = np.linalg.norm(other - row, axis=1).mean()
            scores.append((outer - inner) / max(inner, outer))
    assert silhouette(a, b) == pytest.approx(np.mean(scores), rel=1e-9)
    assert fisher_ratio(a, a) == 0.0
