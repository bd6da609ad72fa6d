"""Prefill: which ids are asked, and what counts as the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attacks.targets import TEXTS, prompts, state_of, tiny_target

from es2fast.attacks.base import Target
from es2fast.attacks.prompts.prefill import TEXT
from es2fast.attacks.registry import make_attack
from es2fast.errors import UserError

ASKED = prompts(*TEXTS)


def continuation(target: Target, ids: list[int], count: int) -> list[int]:
    """Greedy ids after `ids`, step by step, without padding or cache."""
    row = list(ids)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(target.model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] in target.formatter.stop_token_ids:
                break
    return row[len(ids) :]


def test_rows_are_the_prompt_and_the_first_k_ids_of_the_text() -> None:
    target = tiny_target()
    attack = make_attack(
        {"name": "prefill", "text": "sure here is {prompt} .", "tokens": [3, 0, 6]}
    )
    words = target.formatter.tokenizer
    for prompt in ASKED:
        whole = words(f"sure here is {prompt.text} .", add_special_tokens=False)["input_ids"]
        ids = target.formatter.prompt_ids(prompt)
        rows = attack.rows(target, prompt)
        lengths = [0, 3, min(6, len(whole))]
        assert [row.ids for row in rows] == [[*ids, *whole[:k]] for k in lengths]
        assert [row.parameters for row in rows] == [{"tokens": k} for k in (0, 3, 6)]


def test_a_text_that_is_too_short_is_used_whole_and_once() -> None:
    attack = make_attack({"name": "prefill", "text": "sure here is"})
    rows = attack.rows(tiny_target(), ASKED[0])
    assert [row.parameters["tokens"] for row in rows] == [0, 5]
    assert rows[1].info == {"prefill": "sure here is"}


def test_the_default_text_has_as_many_tokens_as_are_asked_for() -> None:
    assert len(TEXT.split()) > 40
    rows = make_attack("prefill").rows(tiny_target(), ASKED[0])
    assert [row.parameters["tokens"] for row in rows] == [0, 5, 10, 20, 40]


@pytest.mark.parametrize("answer", ["continuation", "whole"])
def test_answers_are_what_the_model_writes_on(answer: str) -> None:
    target = tiny_target(batch_size=3)
    settings: dict[str, Any] = {"text": "sure here is some text .", "tokens": [0, 2, 5]}
    attack = make_attack({"name": "prefill", "answer": answer, **settings})
    attack.prepare(target)
    found = attack.answers(target, ASKED)
    words = target.formatter.tokenizer
    prefill = words(settings["text"], add_special_tokens=False)["input_ids"]
    for prompt, answers in zip(ASKED, found):
        ids = target.formatter.prompt_ids(prompt)
        assert len(answers) == 3
        for k, one in zip((0, 2, 5), answers):
            written = continuation(target, [*ids, *prefill[:k]], target.max_new_tokens)
            shown = [*(prefill[:k] if answer == "whole" else []), *written]
            assert one.text == words.decode(shown, skip_special_tokens=True)
            assert one.parameters == {"tokens": k}
            assert one.info == ({"prefill": words.decode(prefill[:k])} if k else {})
    assert state_of(target.model) == state_of(tiny_target().model)


@pytest.mark.parametrize("tokens", [[-1, 5], [5, 5], []])
def test_lengths_are_checked(tokens: list[int]) -> None:
    with pytest.raises(UserError, match=r"prefill\.tokens"):
        make_attack({"name": "prefill", "tokens": tokens})
