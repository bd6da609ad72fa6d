"""`kl.budget`: what capability may be lost, in nats per token, in place of a weight.

log lambda += rate * (e + GAIN * (e - e')), e = log(KL / (0.9 budget)) of the smoothed KL and e'
that of the step before. The proportional part answers a rising KL at once, where the integral part
alone overshoots for as long as the optimizer's momentum takes to turn. Falling is four times slower
than rising, since KL = 0 at the start says nothing about the weight that is needed later.

lambda alone cannot hold every budget: a model that is far away when the KL shows comes back slowly,
and a large learning rate has a KL of its own. So the KL of the final weights is measured, and where
it is over the budget by 10 % the whole update is scaled down until it is not (`scale_update`).

The KL is that of all ranks together, so every rank decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from es2fast.config import Config
from es2fast.training.weights import TrainableWeights

TOLERANCE = 1.1  # times the budget: where scaling the update begins
SMALLEST = 1 / 64  # share of the update below which scaling ends


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

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {"weight": self.weight, "smooth": self._smooth, "error": self._error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        self.weight, self._smooth, self._error = state["weight"], state["smooth"], state["error"]

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


def scale_update(
    weights: TrainableWeights,
    start: Sequence[Tensor],
    kl: float,
    measure: Callable[[], float],
    *,
    scale: float = 1.0,
    budget: float | None = None,
) -> tuple[float, float]:
    """Keeps a share t of the whole update: start + t (end - start).

    The KL grows about as t^2 and the separation as t, so much of the KL goes for a little of what
    was learnt. For a budget it is the last resort, where lambda came too late or the learning rate
    is too noisy; a run that is far over its budget loses most.

    Args:
        weights: of the trained model.
        start: their copy from before the training.
        kl: of the model as it is, nats per token.
        measure: the KL of the weights as they then are, the same on every rank.
        scale: t to begin with (Wortsman et al. 2022, arXiv 2109.01903: alpha).
        budget: nats per token; t falls further while the KL is more than 10 % above, down to about
            `SMALLEST`: below, it is rounding that differs and not the weights.

    Returns:
        (t, KL).
    """
    end = weights.copy()

    def at(t: float) -> float:
        weights.write_between(start, end, t)
        return measure()

    t = scale
    if t < 1:
        kl = at(t)
    while budget is not None and kl > TOLERANCE * budget and t > SMALLEST:
        t *= math.sqrt(DualAscent.AIM * budget / kl)
        kl = at(t)
    return t, kl
