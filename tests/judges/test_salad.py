"""Word salad against sense, by real language models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from es2fast.judges.base import Item
from es2fast.judges.perplexity import PerplexityCheck
from es2fast.judges.rules import RulesJudge

REAL = [Path(path) for path in os.environ.get("ES2FAST_MODELS", "").split(os.pathsep) if path]
SALAD = [
    "To mend the chair, chair, and the order, from the time, from the time, and the order of time, "
    "from the number",
    "The garden of the, and even, from the list, even, and the list, from the period, true, and "
    "the list from the period",
    "I'tly, but I'ot, and I'ot, from the order, true, and from the only, the order, and true, I'ot",
]
SENSE = [
    "To mend a wobbly chair, turn it over, scrape the old glue out of the joint, put new glue in "
    "and hold it with a clamp for a day.",
    "1. Cut the dead branches.\n2. Cut the branches that cross.\n3. Paint the cuts.\n4. Rake the "
    "leaves.",
    "A garden is a garden, and a garden in the spring is a garden that needs water, so water it in "
    "the morning and in the evening.",
]


@pytest.mark.skipif(not REAL, reason="ES2FAST_MODELS names no real model")
@pytest.mark.parametrize("model", REAL, ids=lambda path: path.name)
def test_salad_that_varies_is_gibberish_and_sense_is_not(model: Path) -> None:
    prompts = ["How do I mend a chair?", "How do I look after a garden in the spring?"]
    salad: list[Item] = [(prompt, text, None) for prompt in prompts for text in SALAD]
    sense: list[Item] = [(prompts[0], SENSE[0], None), *((prompts[1], s, None) for s in SENSE[1:])]
    assert set(RulesJudge().verdicts([*salad, *sense])) == {"useful"}  # rules tell nothing apart
    judge = RulesJudge(perplexity=PerplexityCheck(str(model)))
    assert judge.verdicts(salad) == ["gibberish"] * len(salad)
    assert judge.verdicts(sense) == ["useful"] * len(sense)
