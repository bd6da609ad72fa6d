"""When a run ends before its last step: its target is met, or the model is breaking.

Both see the same numbers on every rank (sums over ranks, see `step.train_step`), so all ranks
decide alike and stop together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from es2fast.config import Config

AT_REST = 0.01  # of d0: what is left of a bounded loss when its target counts as met
MOST_REFUSALS = "safeguards.max_harmless_refusals"
REFUSED = 0.99  # share of the refusals' first tokens that are predicted


class EarlyStop:
    """A bounded loss is (almost) at rest on every layer for five steps in a row, and a refusal
    anchor's first tokens are the likeliest."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._met = 0

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {"met": self._met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        self._met = state["met"]

    def reached(self, row: dict[str, Any], layers: Sequence[int], full: bool = True) -> bool:
        """After each step; full: its margin was the whole one, see `separation.ramp`."""
        met = full and all(row[f"sep/{layer}"] <= AT_REST for layer in layers)
        met = met and row.get("refusal_top1", 1.0) >= REFUSED
        self._met = self._met + 1 if met else 0
        return self._enabled and self._met >= 5


class Spikes:
    """Flags losses that stand out: above the median of the last 20 by six times what their scaled
    median absolute deviation estimates as one standard deviation. With simulated attacks clean and
    attacked steps are compared among themselves."""

    WINDOW = 20

    def __init__(self) -> None:
        self._losses: dict[str, list[float]] = {"clean": [], "attacked": []}

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {name: list(values) for name, values in self._losses.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        self._losses = {name: list(values) for name, values in state.items()}

    def flag(self, row: dict[str, Any]) -> bool:
        """After each step; one without a finite loss is a spike."""
        loss = row["loss"]
        if not math.isfinite(loss):
            return True
        past = self._losses["attacked" if row.get("attacked") else "clean"]
        spike = False
        if len(past) == self.WINDOW:
            middle = median(past)
            spread = 1.4826 * median(abs(value - middle) for value in past)
            spike = loss > middle + 6.0 * max(spread, 1e-3 * abs(middle))
            del past[0]
        past.append(loss)
        return spike


class CollapseMonitor:
    """Says when a run is past saving.

    A loss that is not finite counts at once, unless its step was left out and changed nothing. Such
    steps, a KL above `max_kl`, a gradient norm that is not finite, or one above `max_grad_growth`
    times the largest of the first ten steps, count when they last for `patience` steps. There is no
    separate watch on the entropy of the next-token distribution: one that collapses is far from the
    base model's, which is what the KL measures. Refusals of harmless prompts, which only a refusal
    anchor teaches, count as a running mean.

    Args:
        world_size: ranks whose rows a step's share of refusals is over.
    """

    FIRST = 10
    _KEPT = ("_steps", "_in_a_row", "_largest", "_refusals")
    MEMORY = 50.0  # harmless rows that the running mean of their refusals goes back

    def __init__(self, config: Config, world_size: int = 1):
        self._guard = config.safeguards
        self._steps = 0
        self._in_a_row = 0
        self._largest = 0.0
        train = config.train
        self._rows = train.micro_batch_size * train.gradient_accumulation * world_size
        self._refusals: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        for name in self._KEPT:
            setattr(self, name, state[name])

    def sane(self, row: dict[str, Any]) -> bool:
        """These numbers are those of weights worth keeping; asked after `verdict`, which has the
        step's refusals in the running mean."""
        return self._complaint(row) is None

    def verdict(self, row: dict[str, Any]) -> str | None:
        """After each step: why the run has to stop, or None."""
        self._steps += 1
        if (share := row.get("harmless_refusal")) is not None:
            old = 0.0 if self._refusals is None else self._refusals
            self._refusals = old + min(self._rows / self.MEMORY, 1.0) * (share - old)
        complaint = self._complaint(row)
        if complaint is None and self._steps <= self.FIRST:
            self._largest = max(self._largest, row["grad_norm"])
        self._in_a_row = 0 if complaint is None else self._in_a_row + 1
        if complaint is None:
            return None
        if not math.isfinite(row["loss"]) and not row.get("skipped"):
            return complaint
        if self._in_a_row < self._guard.patience:
            return None
        return f"{complaint}, for {self._in_a_row} steps"

    def final(self, kl: float) -> str | None:
        """After the last update: why its weights, with this KL, must not be kept, or None."""
        limit = self._guard.max_kl
        if math.isfinite(kl) and (limit is None or kl <= limit):
            return None
        return f"the KL of the final weights is {kl:.3g} nats per token"

    def _complaint(self, row: dict[str, Any]) -> str | None:
        guard, kl, norm = self._guard, row["kl"], row["grad_norm"]
        if not math.isfinite(row["loss"]):
            return f"the loss was {row['loss']}"
        if guard.max_kl is not None and kl > guard.max_kl:
            return f"the KL was {kl:.3g} nats per token, above safeguards.max_kl={guard.max_kl:g}"
        most = guard.max_harmless_refusals
        if most is not None and self._refusals is not None and self._refusals > most:
            return (
                f"{self._refusals:.0%} of the harmless prompts were about to be refused, above "
                f"{MOST_REFUSALS}={most:g}"
            )
        if not math.isfinite(norm):
            return f"the gradient norm was {norm}"
        limit = guard.max_grad_growth
        if limit is not None and self._steps > self.FIRST and norm > limit * self._largest > 0:
            return (
                f"the gradient norm was {norm:.3g}, over safeguards.max_grad_growth={limit:g} "
                f"times that of the first steps ({self._largest:.3g})"
            )
        return None


def remedy(trouble: str) -> str:
    """What to change where the monitor said `trouble`."""
    if MOST_REFUSALS in trouble:
        return "Add prompts to data.borderline, lower refusal.weight or raise kl.weight"
    return "Lower train.lr, raise kl.weight, set kl.budget or use separation.loss=hinge"
