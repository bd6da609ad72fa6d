"""What the loop decides step by step."""

from __future__ import annotations

from typing import Any

import pytest

from es2fast.config import parse_config
from es2fast.training.loop import margin_at


def margins(separation: dict[str, Any], steps: int = 10) -> list[float | None]:
    config = parse_config(
        {"model": {"name": "m"}, "separation": separation, "train": {"steps": steps}}
    )
    return [margin_at(config, step) for step in range(1, steps + 1)]


def test_the_margin_grows_from_the_base_distance_to_its_full_size() -> None:
    found = margins({"margin": 4.0, "ramp": 0.5})
    assert found == pytest.approx([1.6, 2.2, 2.8, 3.4, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    assert margins({"margin": 0.3, "ramp": 0.5})[4:] == [0.3] * 6  # to the last digit
    assert margins({"margin": 3.0}) == [3.0] * 10
    assert margins({"loss": "l2"}) == [None] * 10
