"""From answers and verdicts to rates."""

from __future__ import annotations

import pytest

from es2fast.attacks.base import Answer
from es2fast.data import Prompt
from es2fast.evaluation.aggregate import attack_result, harmless_result, outcome, rates
from es2fast.evaluation.teacher import TokenStats


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["refused"], "refused"),
        (["refused", "useful"], "useful"),
        (["gibberish", "refused"], "refused"),
        (["gibberish", "gibberish"], "gibberish"),
        (["refused", "partial", "gibberish"], "partial"),
        (["partial", "useful"], "useful"),
    ],
)
def test_the_best_answer_for_the_attacker_counts(verdicts, expected):
    assert outcome(verdicts) == expected


def test_variants_are_counted_apart_and_together():
    prompts = [Prompt.of("a"), Prompt.of("b")]
    answers = [[Answer("yes", {"k": 0}), Answer("no no no no", {"k": 5})] for _ in prompts]
    verdicts = [["refused", "useful"], ["refused", "gibberish"]]
    found = attack_result(prompts, answers, verdicts, {"note": 1})
    assert (found["useful"], found["refused"], found["gibberish"]) == (0.5, 0.5, 0.0)
    assert found["answers_per_prompt"] == 2 and found["n"] == 2 and found["note"] == 1
    assert found["variants"] == [
        {"parameters": {"k": 0}, "n": 2, "refused": 1.0, "useful": 0.0, "gibberish": 0.0,
         "partial": 0.0},
        {"parameters": {"k": 5}, "n": 2, "refused": 0.0, "useful": 0.5, "gibberish": 0.5,
         "partial": 0.0},
    ]  # fmt: skip
    assert found["repetitive"] == 0.5
    assert found["examples"][0] == {"prompt": "a", "answer": "yes", "verdict": "refused"}


def test_a_partial_refusal_is_a_refusal_and_is_shown():
    assert rates(["refused", "partial", "useful", "gibberish"]) == {
        "refused": 0.5, "partial": 0.25, "useful": 0.25, "gibberish": 0.25,
    }  # fmt: skip


def test_harmless_answers_are_held_against_references():
    found = harmless_result(
        ["It is done .", "I cannot help"], ["it is done.", "x"], TokenStats(0.5, nll=0.0)
    )
    assert found["intact_rate"] == found["refusal_rate"] == 0.5 and found["n"] == 2
    assert harmless_result(["a"], None, TokenStats())["intact_rate"] is None
    assert found["kl_to_base"] == 0.5 and found["perplexity"] == 1.0
