"""Adaptive lambda and early stop, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from es2fast.config import parse_config
from es2fast.engine import DualAscent, _EarlyStop


def dual(**kl: Any) -> DualAscent:
    return DualAscent(parse_config({"model": {"name": "m"}, "kl": kl}))


def test_without_a_budget_lambda_stays() -> None:
    fixed = dual(weight=7.0)
    fixed.update(100.0)
    assert fixed.weight == 7.0


@pytest.mark.parametrize("start", [0.01, 500.0])
def test_lambda_settles_where_the_kl_meets_the_budget(start: float) -> None:
    """A model whose KL is 1 / lambda: the budget of 0.05 is met at lambda = 20."""
    adaptive = dual(weight=start, budget=0.05)
    for _ in range(400):
        adaptive.update(1.0 / adaptive.weight)
    assert adaptive.weight == pytest.approx(20.0, rel=0.02)


def test_lambda_stays_within_its_bounds() -> None:
    adaptive = dual(weight=1.0, budget=0.01, max_weight=50.0)
    for _ in range(100):
        adaptive.update(10.0)
    assert adaptive.weight == 50.0
    for _ in range(500):
        adaptive.update(0.0)
    assert adaptive.weight == pytest.approx(1e-3)


def test_early_stop_wants_every_layer_at_rest_five_times_in_a_row() -> None:
    stop = _EarlyStop(enabled=True)
    rest, busy = {"sep/1": 0.0, "sep/2": 0.01}, {"sep/1": 0.0, "sep/2": 0.02}
    assert not any(stop.reached(rest, [1, 2]) for _ in range(4))
    assert not stop.reached(busy, [1, 2])
    assert [stop.reached(rest, [1, 2]) for _ in range(5)] == [False] * 4 + [True]
    assert not any(_EarlyStop(enabled=False).reached(rest, [1]) for _ in range(9))
