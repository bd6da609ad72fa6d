"""Weights of the layers."""

from __future__ import annotations

from typing import Any

import pytest

from es2fast.config import Config, parse_config
from es2fast.errors import UserError
from es2fast.training.objective import layer_weights


def config(layers: Any, weights: list[float] | None) -> Config:
    raw = {"model": {"name": "m"}, "layers": layers, "separation": {"weights": weights}}
    return parse_config(raw)


def test_weights_follow_the_order_in_which_layers_are_named() -> None:
    assert layer_weights(config([20, 10], [1.0, 3.0]), [10, 20]) == {20: 1.0, 10: 3.0}
    assert layer_weights(config("auto", [1.0, 3.0]), [10, 20]) == {10: 1.0, 20: 3.0}
    assert layer_weights(config([10, 20], None), [10, 20]) == {10: 1.0, 20: 1.0}


def test_chosen_layers_need_one_weight_each() -> None:
    with pytest.raises(UserError, match="3 weights for 2 layers"):
        layer_weights(config("auto", [1.0, 1.0, 1.0]), [10, 20])
