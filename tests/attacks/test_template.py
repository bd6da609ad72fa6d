"""Template: every variant's ids, written out by hand; what does not apply is left out."""

from __future__ import annotations

from typing import Any

import pytest
from attacks.targets import tiny_target
from data.chat_tokenizers import CHAT, DROPS_SYSTEM, NO_SYSTEM, PLAIN, chat_tokenizer, words

from es2fast.attacks.base import Target
from es2fast.attacks.registry import make_attack
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError

STRICT = (  # user and assistant in turn only, as Llama 2 or Gemma have it
    NO_SYSTEM
    + "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles') }}{% endif %}"
    + CHAT
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<sys> kind <end> {% endif %}" + CHAT
PROMPT = Prompt.of("w1 w2")


def target_of(template: str = CHAT, **data: Any) -> Target:
    target = tiny_target()
    target.formatter = Formatter(chat_tokenizer(template), DataConfig(max_length=32, **data))
    target.harmful = [PROMPT]
    return target


def rendered(target: Target, prompt: Prompt = PROMPT, **settings: Any) -> dict[str, str]:
    """Variant -> what is asked, as text with special tokens."""
    attack = make_attack({"name": "template", **settings})
    attack.prepare(target)
    tokenizer = target.formatter.tokenizer
    return {
        row.parameters["variant"]: words(tokenizer, row.ids)
        for row in attack.rows(target.formatter, prompt)
    }


COMMON = {
    "as_system": "<s> <sys> w1 w2 <end> <bot>",
    "no_generation": "<s> <user> w1 w2 <end> </s>",
    "open_turn": "<s> <user> w1 w2",
    "raw": "<s> w1 w2",
}


def test_variants_without_a_system_prompt() -> None:
    assert rendered(target_of()) == COMMON | {
        "empty_system": "<s> <sys> <end> <user> w1 w2 <end> <bot>",
        "as_assistant": "<s> <bot> w1 w2 <end> tail <bot>",
    }


def test_variants_with_a_system_prompt() -> None:
    assert rendered(target_of(system_prompt="be kind")) == COMMON | {
        "no_system": "<s> <user> w1 w2 <end> <bot>",
        "empty_system": "<s> <sys> <end> <user> w1 w2 <end> <bot>",
        "as_assistant": "<s> <sys> be kind <end> <bot> w1 w2 <end> tail <bot>",
        "no_generation": "<s> <sys> be kind <end> <user> w1 w2 <end> </s>",
        "open_turn": "<s> <sys> be kind <end> <user> w1 w2",
    }


def test_a_built_in_system_prompt_is_emptied() -> None:
    found = rendered(target_of(DEFAULT_SYSTEM), variants=["no_system", "empty_system"])
    assert found == {"empty_system": "<s> <sys> <end> <user> w1 w2 <end> <bot>"}


def test_a_strict_template_has_fewer_variants() -> None:
    assert set(rendered(target_of(STRICT))) == {"no_generation", "open_turn", "raw"}
    folded = rendered(target_of(DROPS_SYSTEM, system_prompt="be kind"), variants=["no_system"])
    assert folded == {"no_system": "<s> <user> w1 w2 <end> <bot>"}


def test_a_template_without_generation_prompt_has_no_such_variant() -> None:
    assert "no_generation" not in rendered(
        target_of(PLAIN.replace("if add_gen", "if 1 or add_gen"))
    )


def test_conversations_go_without_what_cannot_be_rendered() -> None:
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3")]
    prompt = Prompt(tuple({"role": role, "content": text} for role, text in turns))
    no_role_twice = (
        "{% for m in messages %}{% if loop.previtem and loop.previtem['role'] == m['role'] %}"
        "{{ raise_exception('roles') }}{% endif %}{% endfor %}"
    ) + CHAT
    assert "as_assistant" in rendered(target_of(no_role_twice))
    found = rendered(target_of(no_role_twice), prompt)
    assert "as_assistant" not in found
    assert found["raw"] == "<s> w1 w2 w3"
    assert found["open_turn"] == "<s> <user> w1 <end> <bot> w2 <end> tail <user> w3"
    alone = rendered(target_of(no_role_twice), prompt, variants=["as_assistant"])
    assert alone == {"ordinary": "<s> <user> w1 <end> <bot> w2 <end> tail <user> w3 <end> <bot>"}


def test_long_prompts_stay_within_max_length() -> None:
    prompt = Prompt.of(" ".join(["w3"] * 50))
    for text in rendered(target_of(), prompt).values():
        assert len(text.split()) <= 32
    assert rendered(target_of(), prompt)["as_assistant"].endswith("w3 <bot>")


def test_no_variant_at_all_is_said() -> None:
    with pytest.raises(UserError, match=r"template\.variants: none of no_system differs"):
        rendered(target_of(), variants=["no_system"])


def test_each_variant_is_answered() -> None:
    target = tiny_target()
    attack = make_attack("template")
    attack.prepare(target)
    found = attack.answers(target, target.harmful)
    names = attack.summary()["template_variants"]
    assert len(names) > 1
    for prompt, answers in zip(target.harmful, found):
        assert [answer.parameters["variant"] for answer in answers] == names
        for row, answer in zip(attack.rows(target.formatter, prompt), answers):
            assert target.generate_rows([row.ids]) == [answer.text]
