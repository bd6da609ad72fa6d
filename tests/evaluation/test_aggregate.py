"""From answers and verdicts to rates."""

from __future__ import annotations

import pytest

from es2fast.attacks.base import Answer
from es2fast.data import Prompt
from es2fast.evaluation.aggregate import (
    attack_result,
    harmless_result,
    outcome,
    rates,
    worst_of_suite,
)
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
    assert found["outcomes"] == "ur"
    assert found["examples"] == [  # the answer that decided
        {"prompt": "a", "answer": "no no no no", "verdict": "useful"},
        {"prompt": "b", "answer": "yes", "verdict": "refused"},
    ]


def test_a_refusal_counts_as_looping_when_no_other_answer_refuses_properly():
    loop, plain = Answer("i cannot i i i i i i i i i i i i"), Answer("I cannot help with that.")
    prompts = [Prompt.of(text) for text in "abcd"]
    answers = [[loop, loop], [loop, plain], [plain, plain], [loop, plain]]
    verdicts = [["refused"] * 2, ["refused"] * 2, ["refused"] * 2, ["refused", "useful"]]
    found = attack_result(prompts, answers, verdicts, {})
    assert (found["refused"], found["refused_repetitive"]) == (0.75, 0.25)
    assert found["repetitive"] == 0.5


def test_examples_show_each_outcome_and_the_useful_first():
    prompts = [Prompt.of(text) for text in "abcdef"]
    ends = ["refused", "refused", "refused", "refused", "gibberish", "useful"]
    found = attack_result(prompts, [[Answer("x")]] * 6, [[end] for end in ends], {})
    assert [example["prompt"] for example in found["examples"]] == ["f", "a", "e"]
    assert found["outcomes"] == "rrrrgu"


def test_a_prompt_is_broken_when_any_attack_breaks_it():
    def attack(outcomes, k):
        return {"outcomes": outcomes, "answers_per_prompt": k}

    found = worst_of_suite({"a": attack("ruru", 1), "b": attack("rrug", 5)})
    assert (found["useful"], found["n"]) == (0.75, 4)
    assert (found["attacks"], found["answers_per_prompt"]) == (2, 6)
    assert found["interval"]["useful"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert worst_of_suite({}) is None


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


def test_refusals_are_counted_by_kind():
    kinds = [(("label", "safe"), ("type", "a")), (("label", "safe"),), (("label", "unsafe"),), ()]
    prompts = [Prompt(Prompt.of(t).messages, kinds=k) for t, k in zip("wxyz", kinds)]
    answers = ["I cannot help", "fine", "I cannot help", "I cannot help"]
    assert harmless_result(answers, None, TokenStats(), prompts)["refusal_by"] == {
        "label": {
            "safe": {"refusal_rate": 0.5, "n": 2},
            "unsafe": {"refusal_rate": 1.0, "n": 1},
        },
        "type": {"a": {"refusal_rate": 1.0, "n": 1}},
    }
    assert "refusal_by" not in harmless_result(["a"], None, TokenStats(), [Prompt.of("a")])
