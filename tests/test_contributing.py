"""The examples of CONTRIBUTING.md run, in order, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import VERBS, tiny_model, tokenizer

from es2fast.attacks.base import Attack
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.judges.base import Judge

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples define, after all of them have run."""
    prompts = [Prompt.of(f"{verb} the car .") for verb in VERBS]
    found: dict[str, Any] = {
        "model": tiny_model("llama"),
        "formatter": Formatter(tokenizer(), DataConfig()),
        "harmful": prompts[4:],
        "harmless": prompts[:4],
    }
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 5
    for example in examples:
        exec(compile(example, str(PAGE), "exec", dont_inherit=True), found)
    return found


def test_the_attack(names: dict[str, Any]) -> None:
    attack = names["attack"]
    assert isinstance(attack, Attack)
    assert [row["word"] for row in attack.summary()["trials"]] == ["please", "now"]
    assert [len(answers) for answers in names["answers"]] == [1, 1]


def test_the_judge(names: dict[str, Any]) -> None:
    judge = names["LengthJudge"]()
    assert isinstance(judge, Judge)
    assert judge.verdicts([("q", "no", None), ("q", "x" * 99, None)]) == ["refused", "useful"]


def test_named_files_exist() -> None:
    """Paths in backticks, relative to the root or to the package."""
    text = PAGE.read_text()
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|inl|md))`", text):
        places = [PAGE.parent / name, PAGE.parent / "es2fast" / name]
        assert any(place.exists() for place in places), name
