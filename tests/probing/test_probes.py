"""Probes and the choice of layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from es2fast.attacks.states.scav import Scav, ScavSettings
from es2fast.errors import UserError
from es2fast.probing.probes import (
    SAMPLE,
    LayerProbe,
    choose_layers,
    fisher_ratio,
    fit_probe,
    mean_distance,
    probe_table,
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


def test_probe_is_deterministic():
    first, second = (fit_probe(*groups(1.0), seed=5) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and first.bias == second.bias


def test_probe_needs_two_rows():
    a, b = groups(1.0)
    with pytest.raises(UserError, match="1 prompts; at least 2"):
        fit_probe(a[:1], b)
    assert fit_probe(a[:2], b[:2]).weight.shape == (8,)


def test_table():
    a, b = groups(4.0, n=20)
    table = probe_table({3: a, 1: a * 2}, {3: b, 1: b * 2})
    assert [row.layer for row in table] == [1, 3]
    assert table[1].distance == pytest.approx(float(torch.cdist(a, b).mean()), rel=1e-5)
    assert table[0].distance == pytest.approx(2 * table[1].distance, rel=1e-5)
    assert table[0].norm == pytest.approx(2 * table[1].norm, rel=1e-5)
    for field in ("accuracy", "fisher", "silhouette", "relative_push"):  # free of the unit
        assert getattr(table[0], field) == pytest.approx(getattr(table[1], field), rel=1e-4)


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


def test_relative_push_is_what_scav_pushes_on_the_held_out_prompts():
    a, b = groups(2.0, n=50)
    attack = Scav(ScavSettings(p0=1e-3))
    attack.fit({0: a}, {0: b})
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    held_out = a[order[35:]]
    push = attack.push(0, held_out)
    wanted = (push.norm(dim=-1) / held_out.norm(dim=-1)).mean()
    (row,) = probe_table({0: a}, {0: b}, p0=1e-3)
    assert row.relative_push == pytest.approx(float(wanted), rel=1e-5)
    logits = attack.probes[0].logit(held_out + push)
    torch.testing.assert_close(torch.sigmoid(logits), torch.full((15,), 1e-3), rtol=1e-3, atol=0)


def test_large_groups_are_sampled_the_same_way_every_time():
    a, b = groups(0.5, n=SAMPLE + 500)
    first, second = (probe_table({0: a}, {0: b})[0] for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    assert first.silhouette == pytest.approx(silhouette(a, b), abs=0.01)
    assert first.distance == pytest.approx(float(mean_distance(a, b)), rel=0.01)
    assert first.fisher == fisher_ratio(a, b)


def rows(*accuracies: float) -> list[LayerProbe]:
    return [LayerProbe(i, accuracy, *[1.0] * 6) for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        ((0.6, 0.8, 0.96, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), [2, 5]),
        ((1.0,) * 8, [0, 4]),
        ((0.5,) * 6 + (0.96, 1.0), [6, 7]),  # first after the second: moved apart
        ((0.5,) * 7 + (0.96,), [6, 7]),
        ((0.5, 0.7, 0.9, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5), [2, 5]),  # none passes: the best
        ((0.9, 1.0), [0, 1]),
        ((1.0,), [0]),
    ],
)
def test_choice(accuracies, expected):
    layers, reason = choose_layers(rows(*accuracies))
    assert layers == expected
    assert "block" in reason and "0.95" in reason
