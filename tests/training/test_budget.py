"""Adaptive lambda, and the update that is scaled down to the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from es2fast.config import parse_config
from es2fast.training.budget import SMALLEST, DualAscent, scale_update
from es2fast.training.weights import TrainableWeights


def dual(**kl: Any) -> DualAscent:
    return DualAscent(parse_config({"model": {"name": "m"}, "kl": kl}))


def test_without_a_budget_lambda_stays() -> None:
    fixed = dual(weight=7.0)
    fixed.update(100.0)
    assert fixed.weight == 7.0


@pytest.mark.parametrize("start", [0.01, 500.0])
def test_lambda_settles_where_the_kl_meets_what_is_aimed_at(start: float) -> None:
    """A model whose KL is 1 / lambda: 0.9 of the budget of 0.05 is met at lambda = 22.2."""
    adaptive = dual(weight=start, budget=0.05)
    for _ in range(400):
        adaptive.update(1.0 / adaptive.weight)
    assert adaptive.weight == pytest.approx(1 / 0.045, rel=0.02)


def test_lambda_stays_within_its_bounds() -> None:
    adaptive = dual(weight=1.0, budget=0.01, max_weight=50.0)
    for _ in range(100):
        adaptive.update(10.0)
    assert adaptive.weight == 50.0
    for _ in range(1000):
        adaptive.update(0.0)
    assert adaptive.weight == pytest.approx(1e-3)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_an_update_is_scaled_down_to_the_budget(power: float) -> None:
    model = nn.Linear(3, 2, bias=False)
    weights = TrainableWeights(model)
    start = weights.copy()
    with torch.no_grad():
        model.weight.add_(1.0)

    def measure() -> float:
        """Grows as a power of the distance from the start: 1 at the end of the training."""
        return float((model.weight.detach() - start[0]).mean() ** power)

    assert scale_update(weights, start, 1.0, measure, budget=0.95) == (1.0, 1.0)
    scale, kl = scale_update(weights, start, 1.0, measure, budget=0.05)
    assert 0.005 < kl <= 0.055 and kl == pytest.approx(measure())
    torch.testing.assert_close(model.weight - start[0], torch.full((2, 3), scale))


def test_a_budget_below_rounding_ends_the_scaling() -> None:
    model = nn.Linear(3, 2, bias=False)
    weights = TrainableWeights(model)
    start = weights.copy()
    with torch.no_grad():
        model.weight.add_(1.0)
    scale, kl = scale_update(weights, start, 1.0, lambda: 3e-4, budget=2e-4)
    assert 0 < scale <= SMALLEST and kl == 3e-4


@pytest.mark.parametrize("budget", [None, 0.3])
def test_a_share_of_the_update_is_kept(budget: float | None) -> None:
    """Half of it; less where that does not meet the budget."""
    model = nn.Linear(3, 2, bias=False)
    weights = TrainableWeights(model)
    start = weights.copy()
    with torch.no_grad():
        model.weight.add_(1.0)

    def measure() -> float:
        return float((model.weight.detach() - start[0]).mean())

    scale, kl = scale_update(weights, start, 1.0, measure, scale=0.5, budget=budget)
    assert scale == 0.5 if budget is None else scale < 0.5
    assert kl == pytest.approx(scale)
    torch.testing.assert_close(model.weight - start[0], torch.full((2, 3), scale))
