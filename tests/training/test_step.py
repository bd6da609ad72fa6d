"""Nothing that the host does stands between two optimizer steps, and no step is another for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from training.step_worker import CASES, ran


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ran(tmp_path_factory.mktemp("step"), CASES, "cpu", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_made_ready_during_the_one_before_is_the_same(
    runs: dict[str, Any], case: str
) -> None:
    alone, ahead = runs[case]
    assert ahead["numbers"] == alone["numbers"] and ahead["weights"] == alone["weights"]
    assert len({json.dumps(numbers) for numbers in ahead["numbers"]}) == len(ahead["numbers"])
    assert any(ahead["attacked"]) == ("robust" in str(CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_one_small_all_reduce(runs: dict[str, Any], case: str) -> None:
    alone, ahead = runs[case]
    assert alone["sums"] == [2, 2, 2, 2] and ahead["sums"] == [2, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_nothing_but_the_gradients_norm(runs: dict[str, Any], case: str) -> None:
    waits = runs[case][1]["waits"]
    if case == "padded":  # transformers looks whether a mask hides anything
        assert waits
        waits = [line for line in waits if "transformers/masking_utils.py" not in line]
    assert waits == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_given_up_changes_no_weight(runs: dict[str, Any], case: str) -> None:
    for run in runs[case]:
        assert run["given_up"] == run["weights"]
