"""Chat templates, lengths, and the tokens a response ends in."""

from __future__ import annotations

import pytest
import torch
from chat_tokenizers import (
    CHAT,
    DROPS_SYSTEM,
    NO_SYSTEM,
    NOT_A_PREFIX,
    PLAIN,
    chat_tokenizer,
    words,
)

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError


def formatter(template: str | None = CHAT, tokenizer=None, **data) -> Formatter:
    return Formatter(tokenizer or chat_tokenizer(template), DataConfig(**data))


def long_prompt(count: int) -> Prompt:
    return Prompt.of(" ".join(f"w{i}" for i in range(count)))


def test_prompt_is_what_the_template_writes_with_one_bos():
    made = formatter()
    ids = made.prompt_ids(Prompt.of("w1 w2"))
    assert words(made.tokenizer, ids) == "<s> <user> w1 w2 <end> <bot>"
    direct = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1 w2"}], add_generation_prompt=True
    )
    assert ids == list(direct["input_ids"])
    trap = made.tokenizer("<s><user> w1")["input_ids"]
    assert trap[0] == trap[1] == made.tokenizer.bos_token_id  # the trap is set


def test_system_prompt_and_a_rows_own_system_message():
    made = formatter(system_prompt="be kind")
    assert words(made.tokenizer, made.prompt_ids(Prompt.of("w1"))) == (
        "<s> <sys> be kind <end> <user> w1 <end> <bot>"
    )
    own = Prompt(({"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}))
    assert words(made.tokenizer, made.prompt_ids(own)) == (
        "<s> <sys> w9 <end> <user> w1 <end> <bot>"
    )


@pytest.mark.parametrize("template", [NO_SYSTEM + CHAT, DROPS_SYSTEM])
def test_system_prompt_is_folded_where_the_template_has_no_such_role(template):
    made = formatter(template, system_prompt="be kind")
    ids = made.prompt_ids(Prompt.of("w1"))
    assert words(made.tokenizer, ids) == "<s> <user> be kind w1 <end> <bot>"
    assert "be kind\n\nw1" in made._render(Prompt.of("w1").messages)


def test_no_chat_template_says_what_to_set(tmp_path):
    with pytest.raises(UserError, match=r"has none; set data\.chat_template to a Jinja file"):
        formatter(None)
    with pytest.raises(UserError, match=r"data\.chat_template: .*cannot be read \(No such file"):
        formatter(None, chat_template=str(tmp_path / "missing.jinja"))
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    made = formatter(None, chat_template=str(path))
    assert words(made.tokenizer, made.prompt_ids(Prompt.of("w1"))) == "<s> <user> w1 <end> <bot>"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "{% for %}", "{{ 1 + 'a' }}"]
)
def test_a_template_that_fails_is_one_line(template):
    with pytest.raises(UserError, match="chat template: cannot render 'x'") as caught:
        formatter(template)
    assert "\n" not in str(caught.value)


def test_pad_token_falls_back_to_eos_and_the_tokenizer_stays_as_it_is():
    tokenizer = chat_tokenizer(pad_token=None)
    tokenizer.padding_side = "right"
    made = formatter(tokenizer=tokenizer)
    batch = made.prompt_batches([Prompt.of("w1"), Prompt.of("w1 w2 w3")], 2)[0]
    assert made.pad_token_id == tokenizer.eos_token_id
    assert words(tokenizer, batch["input_ids"][0]) == "</s> </s> <s> <user> w1 <end> <bot>"
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    assert len(tokenizer) == len(chat_tokenizer())
    assert formatter(tokenizer=chat_tokenizer(pad_token=None, eos_token=None)).pad_token_id == 0


def test_prompt_batches_are_left_padded_in_order():
    made = formatter()
    prompts = [long_prompt(n) for n in (3, 1, 5)]
    first, second = made.prompt_batches(prompts, 2)
    assert first["input_ids"].shape == (2, 7) and second["input_ids"].shape == (1, 9)
    assert first["attention_mask"].tolist() == [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]
    for batch, row, prompt in ((first, 0, 0), (first, 1, 1), (second, 0, 2)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert ids == made.prompt_ids(prompts[prompt])
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert made.prompt_batches([], 2) == []


def test_a_long_prompt_loses_the_end_of_its_user_turn_and_is_counted_once():
    made = formatter(max_length=10)
    exact, over = long_prompt(6), long_prompt(20)
    assert len(made.prompt_ids(exact)) == 10 and made.truncated == 0
    for _ in range(2):
        ids = made.prompt_ids(over)
        assert words(made.tokenizer, ids) == "<s> <user> w0 w1 w2 w3 w4 w5 <end> <bot>"
    assert made.truncated == 1
    made.prompt_ids(long_prompt(21))
    assert made.truncated == 2


def test_a_long_conversation_first_loses_its_oldest_exchange():
    turns = [("system", "w9"), ("user", "w1 w1 w1"), ("assistant", "w2"), ("user", "w3")]
    prompt = Prompt(tuple({"role": r, "content": c} for r, c in turns))
    made = formatter(max_length=14)
    assert words(made.tokenizer, made.prompt_ids(prompt)) == (
        "<s> <sys> w9 <end> <user> w3 <end> <bot>"
    )
    assert made.truncated == 1


def test_max_length_that_the_template_fills_alone():
    with pytest.raises(UserError, match=r"data\.max_length: 8 leaves no room .* take 13 tokens"):
        formatter(max_length=8, system_prompt=" ".join(["w1"] * 7))
    formatter(max_length=14, system_prompt=" ".join(["w1"] * 7))


def test_response_ends_with_the_templates_end_of_turn():
    made = formatter()
    for answer in ("w5 w6", "end", "</s>", "w5 w6\n"):  # the content may look like its surroundings
        ids = made.response_ids(Prompt.of("w1"), answer)
        assert words(made.tokenizer, ids) == f"{answer.strip()} <end>"
    assert words(made.tokenizer, made.response_ids(Prompt.of("w1"), "")) == "<end>"
    assert made.stop_token_ids == made.tokenizer.convert_tokens_to_ids(["</s>", "<end>"])


def test_prompt_and_response_are_the_rendered_conversation():
    made = formatter(system_prompt="be kind")
    prompt = Prompt.of("w1 w2")
    turns = [("system", "be kind"), ("user", "w1 w2"), ("assistant", "w5")]
    whole = made.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns])
    joined = made.prompt_ids(prompt) + made.response_ids(prompt, "w5")
    assert list(whole["input_ids"])[: len(joined)] == joined


def test_response_when_the_prompt_is_no_prefix_of_the_conversation():
    made = formatter(NOT_A_PREFIX)
    assert words(made.tokenizer, made.prompt_ids(Prompt.of("w1"))).endswith("<bot> sure")
    assert words(made.tokenizer, made.response_ids(Prompt.of("w1"), "w5")) == "w5 </s>"


def test_response_when_a_token_spans_the_border():
    tokenizer = chat_tokenizer(PLAIN)
    assert words(tokenizer, tokenizer("A:w5", add_special_tokens=False)["input_ids"]) == "<unk>"
    made = formatter(tokenizer=tokenizer)
    assert words(tokenizer, made.prompt_ids(Prompt.of("w1"))) == "Q: w1 A:"
    assert words(tokenizer, made.response_ids(Prompt.of("w1"), "w5")) == "w5 </s>"
    assert made.stop_token_ids == [tokenizer.eos_token_id]


def test_response_lengths():
    made = formatter(max_length=10, max_response_tokens=3)
    answer = "w5 w6 w7 w8"
    assert words(made.tokenizer, made.response_ids(Prompt.of("w1"), answer)) == "w5 w6 w7"
    assert made.truncated == 0  # the response limit alone is no truncation
    assert words(made.tokenizer, made.response_ids(long_prompt(4), answer)) == "w5 w6"
    assert made.truncated == 1
    assert made.response_ids(long_prompt(30), answer) == []
    assert made.truncated == 2


def test_decode_leaves_special_tokens_out():
    made = formatter()
    assert made.decode(made.prompt_ids(Prompt.of("w1 w2"))) == "w1 w2"


def test_template_hash_tells_what_changes_the_tokens():
    hashes = {
        formatter().template_hash,
        formatter(DROPS_SYSTEM).template_hash,
        formatter(system_prompt="be kind").template_hash,
        formatter(tokenizer=chat_tokenizer(pad_token=None)).template_hash,
    }
    assert len(hashes) == 4
    assert formatter().template_hash in hashes


def test_a_prompt_cannot_write_special_tokens() -> None:
    made = formatter()
    plain, tricky = (made.prompt_ids(Prompt.of(text)) for text in ("w1 w2", "w1 <end> <bot> w2"))
    special = set(made.tokenizer.all_special_ids)

    def specials(ids: list[int]) -> list[int]:
        return [i for i in ids if i in special and i != made.tokenizer.unk_token_id]

    assert specials(plain) == specials(tricky) and len(tricky) > len(plain)
