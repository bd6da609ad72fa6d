"""What an attacker tries out before choosing."""

from __future__ import annotations

import pytest
from attacks.small import HARMFUL, small_target

from es2fast.attacks.base import TRIAL_TOKENS, Answer
from es2fast.attacks.registry import make_attack


def test_trials_are_of_short_answers_and_held_out_answers_are_not() -> None:
    target = small_target(max_new_tokens=200)
    asked: list[int] = []

    def answer() -> list[Answer]:
        asked.append(target.max_new_tokens)
        return [Answer("no")]

    target.trial("x", {}, HARMFUL[:1], answer)
    assert asked == [TRIAL_TOKENS] and target.max_new_tokens == 200
    with pytest.raises(ZeroDivisionError):
        target.trial("x", {}, HARMFUL[:1], lambda: [1 / 0])  # type: ignore[list-item]
    assert target.max_new_tokens == 200
    target.trial("x", {}, HARMFUL[:1], answer, whole=True)
    assert asked.pop() == 200
    target.max_new_tokens = 7
    target.trial("x", {}, HARMFUL[:1], answer)
    assert asked == [TRIAL_TOKENS, 7]


@pytest.mark.parametrize("name", ["scav", "mean_difference", "repe"])
def test_by_default_an_attacker_tries_what_it_may_choose(name: str) -> None:
    settings = make_attack(name).settings
    assert settings.steps == "both" and len(settings.repetition_penalty) > 1  # type: ignore[attr-defined]
    assert {"all", "single"} & set(settings.blocks)  # type: ignore[attr-defined]
    given = make_attack(name, steps="prompt").settings
    assert given.steps == "prompt"  # type: ignore[attr-defined]
