"""An attacker's choice by trying: what works best on a few training prompts is taken.

Every choice is tried on the same prompts, and the trials stand in the report as the curve of the
search. Most useful answers win; ties go to the smaller change of the states, then to the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from es2fast.attacks.base import Answer, Target
from es2fast.data import Prompt

T = TypeVar("T")
TRIALS = 16  # training prompts on which an attacker compares choices
CANDIDATES = 8  # choices it tries at most

Parameters = dict[str, Any]


def spread(items: Sequence[T], most: int = CANDIDATES, last: bool = True) -> list[T]:
    """At most `most` evenly spread items; the last of all (`last`) or the first is among them
    where the distances allow it."""
    stride = max(1, math.ceil(len(items) / most))
    return list(items[stride - 1 :: stride] if last else items[::stride])


def choose(
    target: Target,
    label: str,
    choices: Sequence[Parameters],
    attempt: Callable[[Parameters, Sequence[Prompt]], list[Answer]],
    size: Callable[[Sequence[Answer]], float],
) -> tuple[Parameters | None, list[Parameters]]:
    """The best of several choices, and the trials that say so.

    Args:
        target: the model under attack and its training prompts.
        label: the attack's.
        choices: parameters to try, in order.
        attempt: one answer per prompt with one choice.
        size: relative change of the states behind some answers; settles ties.

    Returns:
        the best parameters (None without choices); per choice its parameters, `useful` (0..1) and
        `relative_push`.
    """
    prompts = target.harmful[:TRIALS]
    best: tuple[float, float] | None = None
    chosen: Parameters | None = None
    trials: list[Parameters] = []
    for parameters in target.progress(choices, f"{label}, choice", "trial"):
        trial = target.trial(label, parameters, prompts, partial(attempt, parameters, prompts))
        push = size(trial.answers)
        trials.append(trial.parameters | {"useful": trial.useful, "relative_push": push})
        if best is None or (trial.useful, -push) > best:
            best, chosen = (trial.useful, -push), parameters
    return chosen, trials
