"""The copy of good weights."""

from __future__ import annotations

import torch
from torch import nn

from es2fast.training.weights import GoodWeights, TrainableWeights


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
