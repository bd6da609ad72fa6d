"""The choice of layers, and whether it knows how sure it is."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from es2fast.config import LayersConfig, parse_config
from es2fast.errors import UserError
from es2fast.probing.choice import choose_layers
from es2fast.probing.crossval import HeldOut
from es2fast.probing.table import LayerProbe, Probed, probe_table

N = 80  # prompts per group


def states(shifts: list[float], scale: list[float] | None = None, hidden: int = 12):
    """Layer -> states of the two groups, noise of their own at every block; `scale` of what is the
    same for both groups, and so of the norm."""
    harmful, harmless = {}, {}
    for layer, shift in enumerate(shifts):
        noise = torch.Generator().manual_seed(layer)
        a, b = (torch.randn(N, hidden, generator=noise) for _ in range(2))
        a[:, 0] += shift
        b[:, 0] -= shift
        for group in (a, b):
            group[:, 1] += (scale or [0.0] * len(shifts))[layer]
        harmful[layer], harmless[layer] = a, b
    return harmful, harmless


def shares(reason: str) -> list[float]:
    """How often the first and the second block were chosen, 0..1."""
    return [int(found) / 100 for found in re.findall(r"chosen in (\d+)%", reason)]


def made(accuracy: list[float], push: list[float] | None = None) -> list[Probed]:
    """Blocks with so many prompts right, the same ones as far as they go, and such pushes."""
    found = []
    for layer, rate in enumerate(accuracy):
        margins = torch.ones(2 * N, dtype=torch.float64)
        margins[: round((1 - rate) * 2 * N)] = -1.0
        pushes = torch.full((N,), (push or [1.0] * len(accuracy))[layer], dtype=torch.float64)
        row = LayerProbe(layer, rate, *[1.0] * 6, (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))
        found.append(Probed(row, HeldOut(margins, margins, pushes), torch.zeros(2)))
    return found


def test_blocks_that_are_equally_separable_are_not_told_apart():
    layers, reason = choose_layers(probe_table(*states([1.0] * 12)))
    assert len(layers) == 2 and reason.count("unsure, others choose block") == 2
    assert max(shares(reason)) < 0.8
    near = int(re.search(r"(\d+) of 12 blocks", reason)[1])
    assert near >= 9


@pytest.mark.parametrize("best", [0, 3, 5])
def test_one_that_is_clearly_best_is_chosen_and_surely(best: int):
    shifts = [0.2] * 12
    shifts[best] = 4.5
    layers, reason = choose_layers(probe_table(*states(shifts)))
    assert layers[0] == best and f"block {best} (accuracy 1.000 [0.9" in reason
    assert shares(reason)[0] >= 0.95 and "1 of 12 blocks" in reason


def test_of_equally_accurate_blocks_the_one_that_costs_the_attacker_most():
    """A common component makes the states long, and the same push cheap in proportion."""
    scale = [20.0] * 12
    scale[4] = scale[9] = 0.0
    layers, reason = choose_layers(probe_table(*states([4.5] * 12, scale)))
    assert layers == [4, 9] and min(shares(reason)) >= 0.95


def test_the_effect_on_the_refusal_decides_between_equal_costs():
    noise = torch.Generator().manual_seed(0)
    effects = torch.rand(12, 20, dtype=torch.float64, generator=noise)
    effects[2] += 2.0
    effects[8] += 1.0
    layers, reason = choose_layers(made([1.0] * 12), effects)
    assert layers == [2, 8] and min(shares(reason)) >= 0.95
    layers, reason = choose_layers(made([1.0] * 12, [1.0] * 3 + [2.0] * 9), -effects)
    assert layers[0] == 3 and "so that is left out" in reason


@pytest.mark.parametrize(
    "accuracy, push, expected",
    [
        # the first in the lower half, the second above it, the topmost tenth left out
        ([1.0] * 10, [float(i) for i in range(10)], [4, 8]),
        ([1.0] * 10, [10.0 - i for i in range(10)], [0, 2]),
        ([1.0] * 24, [float(i) for i in range(24)], [11, 20]),
        # nothing in the lower half is good: the first comes later, the second still above it
        ([0.5] * 6 + [0.96, 1.0], None, [6, 7]),
        ([0.5] * 7 + [0.96], None, [0, 2]),  # the last block stands in no range
        # an inaccurate block is no candidate whatever it costs
        ([1.0, 0.6] + [1.0] * 6, [1.0, 9.0, *[1.0] * 6], [0, 2]),
        ([0.9, 1.0], None, [0, 1]),
        ([1.0], None, [0]),
    ],
)
def test_where_the_two_blocks_lie(
    accuracy: list[float], push: list[float] | None, expected: list[int]
):
    layers, reason = choose_layers(made(accuracy, push))
    assert layers == expected and f"block {expected[0]} (" in reason


def paired(only_best: int, only_other: int) -> list[Probed]:
    """Two blocks, and how many prompts only one of them has right."""
    margins = torch.ones(2, 2 * N, dtype=torch.float64)
    margins[0, :only_other] = -1
    margins[1, N : N + only_best] = -1
    return [
        Probed(one.row, HeldOut(own, own, one.held_out.pushes), one.gap)
        for one, own in zip(made([1.0, 1.0], [1.0, 5.0]), margins)
    ]


@pytest.mark.parametrize("only_best, only_other, near", [(8, 8, 2), (9, 6, 2), (20, 0, 1)])
def test_significance_is_that_of_the_paired_difference(only_best: int, only_other: int, near: int):
    """20 prompts that only one block has right are no chance (McNemar p 2e-6); 9 and 6 may be."""
    _, reason = choose_layers(paired(only_best, only_other), None, LayersConfig(resamples=2000))
    assert f"{near} of 2 blocks" in reason


def test_other_ranges():
    push = [float(i) for i in range(10)]
    settings = LayersConfig(first=0.3, gap=0.4, last=0.8)
    assert choose_layers(made([1.0] * 10, push), None, settings)[0] == [2, 7]


def test_settings_of_earlier_versions():
    saved = {"accuracy": 0.95, "depth": 0.6, "prompts": 64}
    config = parse_config({"model": {"name": "m"}, "layer_choice": saved})
    assert config.layer_choice == LayersConfig(prompts=64)
    with pytest.raises(UserError, match=r"layer_choice: depth=0\.5 is not read any more"):
        parse_config({"model": {"name": "m"}, "layer_choice": {"depth": 0.5}})


def test_the_choice_is_the_same_again():
    table = probe_table(*states([1.0] * 6))
    effects: Tensor = torch.ones(6, 4, dtype=torch.float64)
    assert choose_layers(table, effects) == choose_layers(table, effects)
