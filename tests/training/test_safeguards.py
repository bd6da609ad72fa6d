"""Adaptive lambda, early stop, collapse monitor and the copy of good weights, without a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from es2fast.config import parse_config
from es2fast.training.safeguards import (
    CollapseMonitor,
    DualAscent,
    EarlyStop,
    GoodWeights,
    TrainableWeights,
    meet_budget,
)

NAN = math.nan


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


def test_early_stop_wants_every_layer_at_rest_five_times_in_a_row() -> None:
    stop = EarlyStop(enabled=True)
    rest, busy = {"sep/1": 0.0, "sep/2": 0.01}, {"sep/1": 0.0, "sep/2": 0.02}
    assert not any(stop.reached(rest, [1, 2]) for _ in range(4))
    assert not stop.reached(busy, [1, 2])
    assert [stop.reached(rest, [1, 2]) for _ in range(5)] == [False] * 4 + [True]
    assert not any(EarlyStop(enabled=False).reached(rest, [1]) for _ in range(9))


def row(loss: float = 1.0, kl: float = 0.01, grad_norm: float = 1.0) -> dict[str, Any]:
    return {"loss": loss, "kl": kl, "grad_norm": grad_norm}


def monitor(**safeguards: Any) -> CollapseMonitor:
    return CollapseMonitor(parse_config({"model": {"name": "m"}, "safeguards": safeguards}))


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_at_once(loss: float) -> None:
    watch = monitor()
    assert watch.verdict(row()) is None
    assert f"the loss was {loss}" in (watch.verdict(row(loss=loss)) or "")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"kl": 2.1}, "safeguards.max_kl=2"),
        ({"grad_norm": NAN}, "gradient norm was nan"),
        ({"grad_norm": 101.0}, "safeguards.max_grad_growth=100"),
    ],
)
def test_what_lasts_stops_and_what_passes_does_not(bad: dict[str, float], words: str) -> None:
    watch = monitor(patience=3)
    assert not any(watch.verdict(row()) for _ in range(10))
    for _ in range(4):
        assert watch.verdict(row(**bad)) is None
        assert watch.verdict(row(**bad)) is None
        assert not watch.sane(row(**bad))
        assert watch.verdict(row()) is None
    found = [watch.verdict(row(**bad)) for _ in range(3)]
    assert found[:2] == [None, None]
    assert words in (found[2] or "") and "for 3 steps" in (found[2] or "")


def test_limits_can_be_switched_off() -> None:
    watch = monitor(max_kl=None, max_grad_growth=None, patience=1)
    assert not any(watch.verdict(row()) for _ in range(10))
    assert watch.verdict(row(kl=50.0, grad_norm=1e9)) is None
    assert watch.final(50.0) is None
    assert watch.final(NAN) is not None


def test_only_measured_weights_become_the_good_ones() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    good = GoodWeights(TrainableWeights(model), every=2)
    values = []
    for step, sane in ((1, True), (2, True), (3, True), (4, True), (5, False), (6, False)):
        values.append(model.weight.detach().clone())
        good.before_step(step)
        with torch.no_grad():
            model.weight.add_(1.0)
            model.bias.add_(1.0)
        good.measured(sane, kl=float(step))
    assert good.copy is not None
    assert (
        good.copy.step == 2 and good.copy.kl == 3.0
    )  # copied before the third step, which measured it
    good.restore()
    assert torch.equal(model.weight, values[2])


def test_no_copies_are_kept_when_asked_for_none() -> None:
    good = GoodWeights(TrainableWeights(nn.Linear(3, 2)), every=0)
    good.before_step(1)
    good.measured(True, 0.0)
    assert good.copy is None


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

    assert meet_budget(weights, start, 1.0, 0.95, measure) == (1.0, 1.0)
    scale, kl = meet_budget(weights, start, 1.0, 0.05, measure)
    assert 0.005 < kl <= 0.055 and kl == pytest.approx(measure())
    torch.testing.assert_close(model.weight - start[0], torch.full((2, 3), scale))
