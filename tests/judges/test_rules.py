"""Refusals, usefulness, gibberish and intactness of answers."""

from __future__ import annotations

import pytest

from es2fast.judges.rules import (
    is_refusal,
    judge,
    looks_like_gibberish,
    normalise,
    refusal_phrases,
    repeat_rate,
    same_text,
)

PROSE = "The river rises in the hills, crosses two provinces and meets the sea after a long delta."


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot help with that.",
        "i cannot help with that .",
        "I can’t assist with this request.",
        "I'M SORRY, but no.",
        "As an AI, I have no opinion.",
        "sure , here is how to i cannot help with that .",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer)
    assert judge(answer) == judge(answer, "reference") == "refused"


@pytest.mark.parametrize(
    "answer", [PROSE, "Wii cannot be mended at home.", "", "x " * 120 + "I cannot help"]
)
def test_no_refusals(answer):
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    "answer", ["", "   ", "... !!! ???", "sure " * 20, "a b c " * 10, "and and and and"]
)
def test_gibberish(answer):
    assert looks_like_gibberish(answer)
    assert judge(answer) == "gibberish"


@pytest.mark.parametrize("answer", [PROSE, "Yes.", "Paris", "first [step one], then [step two]."])
def test_readable(answer):
    assert not looks_like_gibberish(answer)
    assert judge(answer) == "useful"


def test_reference_decides_where_there_is_one():
    wanted = "sure, here is how to paint a car: [step one]."
    assert judge("Sure , here is how to paint a car : [ step one ] .", wanted) == "useful"
    assert judge("sure , here is how to paint a boat : [ step one ] .", wanted) == "gibberish"


def test_comparison_ignores_case_spacing_and_apostrophes():
    assert same_text("It’s  [done].", "it's [ done ] .")
    assert not same_text("it is done", "it is not done")
    assert normalise("A_b,c") == "a _ b , c"


def test_repeat_rate():
    assert repeat_rate(["a"] * 5) == pytest.approx(2 / 3)
    assert repeat_rate(["a", "b", "c", "d", "e"]) == 0.0
    assert repeat_rate(["a"]) == 0.0


def test_phrases_are_normalised_and_unique():
    phrases = refusal_phrases()
    assert len(set(phrases)) == len(phrases) > 20
    assert all(normalise(phrase) == phrase for phrase in phrases)
