"""How an attacker chooses: it tries candidates on a few training prompts and keeps the best.

The best candidate is the one with the most useful answers. Where none has any, the smallest push
would be nearly the direct question: ties go to more partial refusals, then to where refusals begin
to give way (nearest to half of the answers refused), then to the smaller cost (for a push: how far
it moves the states), then to the earlier candidate. Every trial goes through
`Target.trial`, so the whole curve is known afterwards and a search that was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from es2fast.attacks.base import Answer, Target, Trial
from es2fast.data import Prompt

Parameters = Mapping[str, Any]  # JSON values


def trials_of(
    target: Target,
    name: str,
    candidates: Sequence[Parameters],
    prompts: Sequence[Prompt],
    answer: Callable[[Parameters], list[Answer]],
) -> list[Trial]:
    """One trial per candidate, in their order.

    Args:
        name: the attack's label.
        candidates: parameters to try; JSON values.
        prompts: training prompts.
        answer: one answer per prompt under these parameters; not called where a trial's answers
            are known already.
    """
    bar = target.progress(candidates, f"{name}, choice", "trial")
    return [
        target.trial(name, one, prompts, lambda one=one: answer(one))  # type: ignore[misc]
        for one in bar
    ]


def best(trials: Sequence[Trial], cost: Callable[[Trial], float] = lambda trial: 0.0) -> Trial:
    """The trial with the most useful answers; ties: see above."""
    if any(trial.useful for trial in trials):
        return min(trials, key=lambda trial: (-trial.useful, cost(trial)))

    def promise(trial: Trial) -> tuple[float, float, float]:
        refused = trial.rate("refused")
        return -trial.rate("partial"), -min(refused, 1 - refused), cost(trial)

    return min(trials, key=promise)
