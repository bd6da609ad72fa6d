"""The attacks' arithmetic and their hooks, on blocks whose outputs are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from es2fast.attacks.base import Answer
from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.pushes import Pushes, PushSettings, total_of
from es2fast.attacks.states.scav import Scav, ScavSettings
from es2fast.modeling.taps import blocks, hidden_of, tapped
from es2fast.probing.probes import Probe

H = 6


class Block(nn.Module):
    """Adds a constant; returns a tensor or, as older transformers releases do, a tuple."""

    def __init__(self, amount: float, as_tuple: bool) -> None:
        super().__init__()
        self.amount, self.as_tuple = amount, as_tuple

    def forward(self, hidden: Tensor) -> Any:
        out = hidden + self.amount
        return (out, "cache") if self.as_tuple else out


class Model(nn.Module):
    """Two blocks under the names the library looks for."""

    base_model_prefix = "model"

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Block(0.1, as_tuple), Block(0.2, as_tuple)])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.model.layers:
            hidden = hidden_of(block(hidden))
        return hidden


@pytest.fixture
def groups() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Separable states of two layers, 40 per group."""
    noise = torch.Generator().manual_seed(0)
    shift = torch.tensor([2.0, -1.0, 0.5, 0, 0, 0])
    harmful = {i: torch.randn(40, H, generator=noise) * 0.3 + shift * (i + 1) for i in (0, 1)}
    harmless = {i: torch.randn(40, H, generator=noise) * 0.3 - shift * (i + 1) for i in (0, 1)}
    return harmful, harmless


def hook_count(model: nn.Module) -> int:
    return sum(len(block._forward_hooks) for block in blocks(model))


@pytest.mark.parametrize("as_tuple", [False, True])
def test_scav_lands_on_p0_at_every_layer_and_only_at_the_last_position(groups, as_tuple):
    model, attack = Model(as_tuple), Scav(ScavSettings(p0=1e-3))
    attack.fit(*groups)
    x = groups[0][0][:5, None].repeat(1, 3, 1)
    clean = model(x)
    with attack.applied(model) as pushes, tapped(model, [0, 1], lambda h: h) as kept:
        out = model(x)
    for layer in (0, 1):
        p = torch.sigmoid(attack.probes[layer].logit(kept[layer][:, -1]).double())
        assert (p <= 1e-3 * (1 + 1e-3)).all()
    p = torch.sigmoid(attack.probes[0].logit(kept[0][:, -1]).double())
    torch.testing.assert_close(p, torch.full_like(p, 1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(out[:, :-1], clean[:, :-1], rtol=0, atol=0)
    assert not torch.equal(out[:, -1], clean[:, -1])
    assert pushes.count >= 5
    assert hook_count(model) == 0


def test_scav_push_is_the_formula():
    attack = Scav(ScavSettings(p0=1e-4))
    weight = torch.tensor([3.0, 4.0, 0, 0, 0, 0])
    attack.probes = {0: Probe(weight, bias=0.5, accuracy=1.0, margin=1.0)}
    e = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    eps = (math.log(1e-4 / (1 - 1e-4)) - 0.5 - 11.0) / 5.0
    torch.testing.assert_close(attack.push(0, e), eps * weight[None] / 5.0)


def test_scav_leaves_states_below_p0_alone(groups):
    attack = Scav(ScavSettings(p0=1e-4))
    attack.probes = {0: Probe(torch.ones(H), bias=0.0, accuracy=1.0, margin=1.0)}
    model, x = Model(), torch.full((2, 3, H), -10.0)
    with attack.applied(model) as pushes:
        assert torch.equal(model(x), Model()(x))
    assert pushes.count == 0 and pushes.relative_push == 0.0


def test_scav_skips_layers_whose_probe_is_not_better_than_p1(groups):
    attack = Scav(ScavSettings(p1=0.9))
    attack.probes = {
        0: Probe(torch.ones(H), bias=0.0, accuracy=0.9, margin=1.0),
        1: Probe(torch.ones(H), bias=0.0, accuracy=0.91, margin=1.0),
    }
    assert attack.layers() == [1]


def test_relative_push_is_the_mean_ratio_over_pushed_rows():
    attack = MeanDifference()
    attack.shift = {0: torch.full((H,), 2.0)}
    model = Model()
    model.model.layers[0].amount = 0.0
    with attack.applied(model) as pushes:
        model(torch.stack([torch.full((2, H), 1.0), torch.full((2, H), 4.0)]))
    assert pushes.count == 2
    assert pushes.relative_push == pytest.approx((2.0 + 0.5) / 2)
    assert pushes.mean == pytest.approx(2.0 * math.sqrt(H))


def test_mean_difference_moves_one_mean_onto_the_other(groups):
    attack = MeanDifference()
    attack.at = [1]
    attack.fit(*groups)
    assert attack.layers() == [1]
    moved = groups[0][1] + attack.push(1, groups[0][1])
    torch.testing.assert_close(moved.mean(0), groups[1][1].mean(0))


@pytest.mark.parametrize("steps, changed", [("all", True), ("prompt", False)])
def test_decoding_steps_are_pushed_only_when_asked_for(groups, steps, changed):
    attack = MeanDifference(PushSettings(steps=steps))
    attack.fit(*groups)
    model, token = Model(), torch.zeros(2, 1, H)
    clean = model(token)
    with attack.applied(model):
        assert torch.equal(model(token), clean) is not changed
        assert not torch.equal(model(torch.zeros(2, 4, H))[:, -1], clean[:, -1])


def test_hooks_are_gone_after_an_exception(groups):
    attack, model = Scav(), Model()
    attack.fit(*groups)
    with pytest.raises(RuntimeError, match="stop"), attack.applied(model):
        assert hook_count(model) == 2
        raise RuntimeError("stop")
    assert hook_count(model) == 0


def test_pushes_of_several_batches_add_up():
    answers = [
        Answer("a", info={"pushes": {"count": 2, "total": 3.0, "relative": 1.0}}),
        Answer("b"),
        Answer("c", info={"pushes": {"count": 1, "total": 3.0, "relative": 2.0}}),
    ]
    assert total_of(answers) == Pushes(3, 6.0, 3.0)
    assert total_of(answers).relative_push == 1.0
