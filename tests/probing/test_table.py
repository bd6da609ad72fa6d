"""The row of figures of every block."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from es2fast.attacks.states.scav import Scav, ScavSettings
from es2fast.probing.crossval import held_out
from es2fast.probing.probes import fisher_ratio, mean_distance, silhouette
from es2fast.probing.table import SAMPLE, probe_table


def groups(shift: float, n: int, hidden: int = 8):
    noise = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, hidden, generator=noise) for _ in range(2))
    a[:, 0] += shift
    b[:, 0] -= shift
    return a, b


def test_rows_are_in_order_and_free_of_the_unit_where_they_should_be():
    a, b = groups(4.0, n=20)
    table = [one.row for one in probe_table({3: a, 1: a * 2}, {3: b, 1: b * 2})]
    assert [row.layer for row in table] == [1, 3]
    assert table[1].distance == pytest.approx(float(torch.cdist(a, b).mean()), rel=1e-5)
    for field in ("distance", "norm", "margin"):
        assert getattr(table[0], field) == pytest.approx(2 * getattr(table[1], field), rel=1e-4)
    for field in ("accuracy", "fisher", "silhouette", "relative_push", "push_interval"):
        assert getattr(table[0], field) == pytest.approx(getattr(table[1], field), rel=1e-4)


def test_means_lie_in_their_intervals_and_the_gap_is_that_of_the_means():
    a, b = groups(0.5, n=80)
    (found,) = probe_table({0: a}, {0: b})
    row = found.row
    for value, ends in ((row.accuracy, row.accuracy_interval), (row.margin, row.margin_interval),
                        (row.relative_push, row.push_interval)):  # fmt: skip
        assert ends[0] < value < ends[1]
    assert row.accuracy < 1 and row.accuracy == found.held_out.correct.mean()
    torch.testing.assert_close(found.gap, b.mean(0) - a.mean(0))


def test_the_push_is_about_what_scav_pushes():
    """The attack fits one probe on 70 %, the table five on 80 %."""
    a, b = groups(2.0, n=200)
    attack = Scav(ScavSettings(p0=1e-3))
    attack.fit({0: a}, {0: b})
    wanted = (attack.push(0, a).norm(dim=-1) / a.norm(dim=-1)).mean()
    pushes = held_out(a, b, p0=1e-3).pushes
    assert float(pushes.mean()) == pytest.approx(float(wanted), rel=0.05)
    (one,) = probe_table({0: a}, {0: b}, p0=1e-3)
    assert one.row.relative_push == float(pushes.mean())


def test_large_groups_are_sampled_the_same_way_every_time():
    a, b = groups(0.5, n=SAMPLE + 500)
    first, second = (probe_table({0: a}, {0: b})[0].row for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    assert first.silhouette == pytest.approx(silhouette(a, b), abs=0.01)
    assert first.distance == pytest.approx(float(mean_distance(a, b)), rel=0.01)
    assert first.fisher == fisher_ratio(a, b)
