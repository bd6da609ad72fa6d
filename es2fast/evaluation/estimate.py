"""How long an evaluation will take at most, said in one line before it starts.

    seconds = sum over models and attacks of   answers x seconds per answer + passes x per pass
                                               + answers of trials x seconds per such

All three are what each attack says it needs (`Attack.cost`) for the prompts that the log has no
answers to; seconds are measured on the first model that is loaded, on a few short answers,
and taken to be those of the others. It is an upper bound in that an answer may end before
`max_new_tokens`, and trials may be in the log already; loading and judging are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from es2fast.attacks.base import TRIAL_TOKENS, Attack, Cost, Target
from es2fast.errors import UserError
from es2fast.modeling.generate import generate_rows
from es2fast.modeling.states import last_token_states
from es2fast.progress import tqdm

TOKENS = 5  # of the answers that are timed
CPU_PROMPTS = 8  # of them on a CPU, where more at a time gain little


class Missing(NamedTuple):
    """What the log lacks of one model: per attack the number of prompts; harmless prompts; and the
    passes over prompts that its geometry takes."""

    attacks: Sequence[tuple[Attack, int]]
    harmless: int
    passes: int

    @property
    def anything(self) -> bool:
        """There is an answer to be generated."""
        return self.harmless > 0 or any(count for _, count in self.attacks)


class Speed(NamedTuple):
    """Seconds per prompt of a whole answer, a pass over the prompt alone, and a trial's answer."""

    answer: float
    prompt: float
    trial: float


def announcement(
    missing: Sequence[Missing], *, prompts: int, ranks: int = 1
) -> Callable[[Target], None]:
    """To be called with every model that is loaded; speaks once, and not where nothing is missing.

    Args:
        missing: of every model.
        prompts: n, held out, for the factors of the attacks.
        ranks: that share the work.
    """
    waiting = any(part.anything for part in missing)

    def loaded(target: Target) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            tqdm.write(line(missing, prompts, target, measured(target), ranks))

    return loaded


def measured(target: Target) -> Speed:
    """The speed of a model, from `TOKENS` tokens of answers to one batch of training prompts."""
    return target.fitted(lambda: _measured(target))


def _measured(target: Target) -> Speed:
    size = target.batch_size if target.device.type == "cuda" else CPU_PROMPTS
    rows = [target.formatter.prompt_ids(p) for p in target.harmful[: min(size, target.batch_size)]]
    deepest = [target.depth - 1]
    last_token_states(target.model, [target.formatter.pad(rows)], deepest)  # the first is slow
    started = time.perf_counter()
    last_token_states(target.model, [target.formatter.pad(rows)], deepest)
    read = time.perf_counter()
    generate_rows(
        target.model,
        target.formatter,
        rows,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        device=target.device,
    )
    prompt, whole = (read - started), time.perf_counter() - read
    step = max(whole - prompt, 0.0) / (TOKENS - 1)
    whole, trial = (
        (prompt + step * (tokens - 1)) / len(rows)
        for tokens in (target.max_new_tokens, min(target.max_new_tokens, TRIAL_TOKENS))
    )
    return Speed(whole, prompt / len(rows), trial)


def seconds(missing: Sequence[Missing], target: Target, speed: Speed) -> float:
    """The sum of the module's formula."""
    parts = [part for part in missing if part.anything]
    costs = [_cost(a, target, count) for part in parts for a, count in part.attacks if count]
    costs += [Cost(part.harmless, part.passes) for part in parts]
    return sum(
        cost.answers * speed.answer + cost.passes * speed.prompt + cost.trials * speed.trial
        for cost in costs
    )


def line(
    missing: Sequence[Missing], prompts: int, target: Target, speed: Speed, ranks: int = 1
) -> str:
    """What is printed."""
    attacks = {a.label: a for part in missing for a, count in part.attacks if count}
    costs = {name: _cost(a, target, prompts) for name, a in attacks.items()}
    factors = {
        name: (cost.answers + cost.trials * speed.trial / speed.answer) / prompts
        for name, cost in costs.items()
    }
    more = ", ".join(f"{name} {factor:.3g}x" for name, factor in factors.items() if factor > 1.05)
    models = sum(part.anything for part in missing)
    took = _duration(seconds(missing, target, speed) / ranks)
    return (
        f"about {took}{f' on {ranks} ranks' if ranks > 1 else ''}: {_count(models, 'model')} x "
        f"{_count(len(attacks), 'attack')}{f' ({more})' if more else ''}, n = {prompts}, "
        f"{target.max_new_tokens} tokens (upper bound: answers may end early)"
    )


def _cost(attack: Attack, target: Target, prompts: int) -> Cost:
    try:
        return attack.cost(target, prompts)
    except UserError:  # it will be said when the attack is prepared
        return Cost(0)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(took: float) -> str:
    if took < 90:
        return f"{max(took, 1):.0f} s"
    return f"{took / 60:.0f} min" if took < 90 * 60 else f"{took / 3600:.1f} h"
