"""What keeps a run from breaking the model: KL budget, early stop, collapse monitor, good weights.

All of them see the same numbers on every rank (sums over ranks, see `engine.train_step`), so all
ranks decide alike and stop together.

KL budget. log lambda += rate * (e + GAIN * (e - e')), e = log(KL / (0.9 budget)) of the smoothed
KL and e' that of the step before. The proportional part answers a rising KL at once, where the
integral part alone overshoots for as long as the optimizer's momentum takes to turn.
Falling is four times slower than rising, since KL = 0 at the start says nothing about the weight
that is needed later.

lambda alone cannot hold every budget: a model that is far away when the KL shows comes back slowly,
and a large learning rate has a KL of its own. So the KL of the final weights is measured, and where
it is over the budget by 10 % the whole update is scaled down until it is not (`meet_budget`).

Good weights. Numbers of step s describe the weights before its update. So a copy is taken before
the step and becomes the good one only after the step has measured it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from es2fast.config import Config
from es2fast.errors import UserError

TOLERANCE = 1.1  # times the budget: where scaling the update begins
AT_REST = 0.01  # of d0: what is left of a bounded loss when its target counts as met


class DualAscent:
    """lambda, fixed or adaptive, so that a user states what capability may be lost
    (`kl.budget`, nats per token) instead of a weight."""

    AIM = 0.9  # of the budget: what is aimed at, since the KL varies from batch to batch
    GAIN = 4.0  # proportional over integral part
    MEMORY = 0.8  # of the smoothed KL
    FALL = 0.25  # falling over rising rate

    def __init__(self, config: Config):
        self._kl = config.kl
        self.weight = config.kl.weight if config.kl.budget is None else max(config.kl.weight, 1e-3)
        self._smooth: float | None = None
        self._error: float | None = None

    def update(self, kl: float) -> None:
        """After a step whose global KL was `kl` nats per token."""
        if self._kl.budget is None:
            return
        old = kl if self._smooth is None else self._smooth
        self._smooth = self.MEMORY * old + (1 - self.MEMORY) * kl
        ratio = self._smooth / (self.AIM * self._kl.budget)
        error = min(max(math.log(max(ratio, 1e-9)), -1.0), 2.0)
        change = error - (error if self._error is None else self._error)
        self._error = error
        step = self._kl.budget_lr * (error + self.GAIN * change)
        step = step if step > 0 else self.FALL * step
        self.weight = min(max(self.weight * math.exp(step), 1e-3), self._kl.max_weight)


class EarlyStop:
    """A bounded loss is (almost) at rest on every layer for five steps in a row."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._met = 0

    def reached(self, row: dict[str, Any], layers: Sequence[int]) -> bool:
        met = all(row[f"sep/{layer}"] <= AT_REST for layer in layers)
        self._met = self._met + 1 if met else 0
        return self._enabled and self._met >= 5


class CollapseMonitor:
    """Says when a run is past saving.

    A loss that is not finite counts at once. A KL above `max_kl`, a gradient norm that is not
    finite, or one above `max_grad_growth` times the largest of the first ten steps, count when they
    last for `patience` steps. There is no separate watch on the entropy of the next-token
    distribution: one that collapses is far from the base model's, which is what the KL measures.
    """

    FIRST = 10

    def __init__(self, config: Config):
        self._guard = config.safeguards
        self._steps = 0
        self._in_a_row = 0
        self._largest = 0.0

    def sane(self, row: dict[str, Any]) -> bool:
        """These numbers are those of weights worth keeping."""
        return self._complaint(row) is None

    def verdict(self, row: dict[str, Any]) -> str | None:
        """After each step: why the run has to stop, or None."""
        self._steps += 1
        complaint = self._complaint(row)
        if complaint is None and self._steps <= self.FIRST:
            self._largest = max(self._largest, row["grad_norm"])
        self._in_a_row = 0 if complaint is None else self._in_a_row + 1
        if complaint is None:
            return None
        if not math.isfinite(row["loss"]):
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
        if not math.isfinite(norm):
            return f"the gradient norm was {norm}"
        limit = guard.max_grad_growth
        if limit is not None and self._steps > self.FIRST and norm > limit * self._largest > 0:
            return (
                f"the gradient norm was {norm:.3g}, over safeguards.max_grad_growth={limit:g} "
                f"times that of the first steps ({self._largest:.3g})"
            )
        return None


class TrainableWeights:
    """Copies the trainable weights to the CPU and back.

    Under ZeRO-3 each rank copies its own partitions in the training precision, so that all ranks
    together hold one copy. Below stage 3 rank 0 copies the whole weights: it is rank 0 that writes
    them. Writing back changes what the model computes with, not the optimizer's fp32 weights.

    Args:
        model: its parameters that require gradients are meant, partitioned or whole.
    """

    def __init__(self, model: nn.Module):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._partitioned = any(hasattr(p, "ds_tensor") for p in self._parameters)

    def copy(self) -> list[Tensor]:
        """One tensor per parameter; an empty list on a rank that keeps none."""
        if not self._partitioned and dist.is_initialized() and dist.get_rank() != 0:
            return []
        return [_local(p).detach().to("cpu", copy=True) for p in self._parameters]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Puts what `copy` returned back on every rank; call on every rank."""
        for i, parameter in enumerate(self._parameters):
            if self._partitioned:
                parameter.partition()  # type: ignore[attr-defined]  # drops a gathered, other value
            if values:
                _local(parameter).copy_(values[i])
            if not self._partitioned and dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(parameter.data, src=0)


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its ZeRO-3 partition, or all of it.

    Raises:
        UserError: the partition lies on a disk.
    """
    local = getattr(parameter, "ds_tensor", None)
    if local is None:
        return parameter.data
    if getattr(local, "final_location", None) == "nvme":
        raise UserError(
            "safeguards.keep_every: weights that are offloaded to a disk cannot be copied; "
            "set safeguards.keep_every=0 and kl.budget=null"
        )
    return local.data


@dataclass
class _Copy:
    """Trainable weights after `step` optimizer steps; kl of the batch that measured them."""

    step: int
    values: list[Tensor]
    kl: float = 0.0


class GoodWeights:
    """The last trainable weights that were measured to be sane.

    Args:
        weights: of the model.
        every: steps between two copies; 0 keeps none.
    """

    def __init__(self, weights: TrainableWeights, every: int):
        self._weights = weights
        self._every = every
        self._pending: _Copy | None = None
        self.copy: _Copy | None = None

    def before_step(self, step: int) -> None:
        """Copies the weights, when it is time, before optimizer step `step` (from 1)."""
        if self._every and (step - 1) % self._every == 0:
            self._pending = _Copy(step - 1, self._weights.copy())

    def measured(self, sane: bool, kl: float) -> None:
        """After that step: its numbers were sane, or not."""
        if self._pending is not None and sane:
            self._pending.kl = kl
            self.copy = self._pending
        self._pending = None

    def restore(self) -> None:
        """Puts the good weights into the model; call on every rank."""
        assert self.copy is not None
        self._weights.write(self.copy.values)


def meet_budget(
    weights: TrainableWeights,
    start: Sequence[Tensor],
    kl: float,
    budget: float,
    measure: Callable[[], float],
) -> tuple[float, float]:
    """Scales the whole update, start + t (end - start), down to a KL within the budget.

    The last resort where lambda came too late or the learning rate is too noisy for the budget.
    The KL grows about as t^2 and the separation as t, so a run that is a little over its budget
    loses little of it; one that is far over loses most.

    Args:
        weights: of the trained model.
        start: their copy from before the training.
        kl: of the model as it is, nats per token.
        measure: the KL of the weights as they then are, the same on every rank.

    Returns:
        (t, KL); (1, kl) when the KL is not more than 10 % over the budget.
    """
    t, end = 1.0, weights.copy()
    while kl > TOLERANCE * budget:
        t *= math.sqrt(DualAscent.AIM * budget / kl)
        weights.write([a + t * (b - a) for a, b in zip(start, end)])
        kl = measure()
    return t, kl
