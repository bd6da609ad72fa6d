"""Probes and the choice of layers."""

from __future__ import annotations

import pytest
import torch

from es2fast.errors import UserError
from es2fast.modeling.layers import (
    LayerProbe,
    choose_layers,
    fit_probe,
    mean_distance,
    probe_table,
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
    torch.testing.assert_close(mean_distance(a, b), torch.cdist(a, b).mean())


def rows(*accuracies: float) -> list[LayerProbe]:
    return [LayerProbe(i, accuracy, 1.0, 1.0, 1.0) for i, accuracy in enumerate(accuracies)]


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
