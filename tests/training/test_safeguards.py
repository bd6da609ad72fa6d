"""Early stop and collapse monitor."""

from __future__ import annotations

import math
from typing import Any

import pytest

from es2fast.config import parse_config
from es2fast.training.safeguards import CollapseMonitor, EarlyStop, remedy

NAN = math.nan


def test_early_stop_wants_every_layer_at_rest_five_times_in_a_row() -> None:
    stop = EarlyStop(enabled=True)
    rest, busy = {"sep/1": 0.0, "sep/2": 0.01}, {"sep/1": 0.0, "sep/2": 0.02}
    assert not any(stop.reached(rest, [1, 2]) for _ in range(4))
    assert not stop.reached(busy, [1, 2])
    assert [stop.reached(rest, [1, 2]) for _ in range(5)] == [False] * 4 + [True]
    assert not any(EarlyStop(enabled=False).reached(rest, [1]) for _ in range(9))


def test_early_stop_waits_for_the_whole_margin() -> None:
    stop = EarlyStop(enabled=True)
    assert not any(stop.reached({"sep/1": 0.0}, [1], full=False) for _ in range(9))
    assert [stop.reached({"sep/1": 0.0}, [1]) for _ in range(5)] == [False] * 4 + [True]


def test_early_stop_waits_for_the_refusals() -> None:
    stop = EarlyStop(enabled=True)
    assert not any(stop.reached({"sep/1": 0.0, "refusal_top1": 0.9}, [1]) for _ in range(9))
    found = [stop.reached({"sep/1": 0.0, "refusal_top1": 1.0}, [1]) for _ in range(5)]
    assert found == [False] * 4 + [True]


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


def test_refusals_of_harmless_prompts_stop_when_they_last() -> None:
    watch = monitor(max_harmless_refusals=0.3, patience=3)
    assert watch.verdict(row() | {"harmless_refusal": 1.0}) is None  # a single bad batch
    found = [watch.verdict(row() | {"harmless_refusal": 0.0}) for _ in range(20)]
    assert not any(found)
    words = [watch.verdict(row() | {"harmless_refusal": 0.75}) for _ in range(20)]
    assert words[0] is None and "safeguards.max_harmless_refusals=0.3" in (words[-1] or "")
    assert "data.borderline" in remedy(words[-1] or "")
    assert "data.borderline" not in remedy("the KL was 3")
    free = monitor(max_harmless_refusals=None)
    assert not any(free.verdict(row() | {"harmless_refusal": 1.0}) for _ in range(50))


def test_the_mean_of_the_refusals_weighs_all_ranks_rows_and_this_step() -> None:
    config = parse_config({"model": {"name": "m"}, "train": {"micro_batch_size": 5},
                           "safeguards": {"max_harmless_refusals": 0.3}})  # fmt: skip
    bad = row() | {"harmless_refusal": 1.0}
    for ranks, steps in ((1, 4), (2, 2), (4, 1)):  # 1 - 0.9^4 = 0.34; 1 - 0.8^2 = 0.36; 0.4
        watch, sane = CollapseMonitor(config, ranks), []
        for _ in range(steps):
            watch.verdict(bad)
            sane.append(watch.sane(bad))
        assert sane == [True] * (steps - 1) + [False]
