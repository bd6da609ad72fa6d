"""Optimizer steps that were left out because their gradients were no finite numbers.

DeepSpeed leaves them out under ZeRO 1 to 3, `engine._keep_norm` at stage 0, so such numbers never
reach weights or optimizer. What remains is to count them and to say which rows they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from es2fast.distributed.runtime import Runtime

MOST_NAMED = 4


class SkippedSteps:
    """A run's skipped steps, the same on every rank.

    Args:
        runtime: the ranks.
        names: of the rows of a step (from 0) on this rank, per micro-batch, harmful ones first.
    """

    def __init__(self, runtime: Runtime, names: Callable[[int], list[list[str]]]):
        self._runtime, self._names = runtime, names
        self.count = 0
        self.rows: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        self.count = state["count"]

    def add(self, step: int, finite: list[Tensor]) -> None:
        """Step `step`, from 0, was left out; call on every rank.

        Args:
            step: from 0.
            finite: per micro-batch (n + m,) booleans, the row's states are finite.
        """
        own = [
            name
            for names, fine in zip(self._names(step), finite)
            for name, good in zip(names, fine.tolist())
            if not good
        ]
        self.count += 1
        self.rows = [name for some in self._runtime.gather_objects(own) for name in some]

    def words(self) -> str:
        """Whose states were no finite numbers in the last such step."""
        if not self.rows:
            return "no row's states at the separated blocks stand out"
        named = ", ".join(self.rows[:MOST_NAMED])
        more = f" and {len(self.rows) - MOST_NAMED} more" if len(self.rows) > MOST_NAMED else ""
        return f"not finite were the states of {named}{more}"
