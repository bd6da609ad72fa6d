"""The refusal anchor's texts, openings and tokens; the model that refuses is a real one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ANSWER, REFUSAL, save_refusing, save_tiny, tokenizer, write_prompts
from torch import nn

from es2fast.config import Config, parse_config
from es2fast.data import Formatter, Prompt, collate
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.judges.rules import is_refusal
from es2fast.modeling.load import load_causal_lm
from es2fast.training.feed import Feed
from es2fast.training.plan import Plan, make_plan
from es2fast.training.prepare import own_refusals, prepare
from es2fast.training.refusals import (
    AnchorTexts,
    RefusalAnchor,
    RefusalTokens,
    anchor_line,
    anchor_texts,
    first_refusal,
    refusal_counts,
)

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")
PROMPTS = [Prompt.of(f"{verb} the {thing}") for verb in ("break", "steal") for thing in
           ("car", "house", "tree")]  # fmt: skip


def config(refusal: dict[str, Any], **rest: Any) -> Config:
    return parse_config({"model": {"name": "m"}, "refusal": {"weight": 1.0} | refusal} | rest)


# The model's own words


def plan_of(tmp_path: Path, model: Path, **refusal: Any) -> Plan:
    sources = write_prompts(tmp_path / "data")
    text = "".join(json.dumps({"prompt": p.text}) + "\n" for p in PROMPTS)
    Path(sources["harmful"]).write_text(text)
    raw: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": sources | {"cache_dir": str(tmp_path / "cache"), "response_batch_size": 4},
        "refusal": {"weight": 1.0} | refusal,
        "train": {"device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    return make_plan(parse_config(raw))


def test_own_refusals_are_kept_and_lent_and_written_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, save_refusing(tmp_path / "model"))
    assert plan.groups.harmful == PROMPTS
    model = load_causal_lm(plan.config.model, "fp32").eval()
    texts = own_refusals(plan, model, ALONE)
    assert texts == AnchorTexts([REFUSAL] * 6, [None] * 3 + [ANSWER] * 3)
    lines = (tmp_path / "cache/responses.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert own_refusals(plan, nn.Identity(), ALONE) == texts  # which could not generate
    assert len((tmp_path / "cache/responses.jsonl").read_text().splitlines()) == 6


def test_a_model_that_refuses_nothing_learns_the_fallback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path, save_tiny(tmp_path / "model"), fallback=["No .", "Not that ."])
    model = load_causal_lm(plan.config.model, "fp32").eval()
    texts = own_refusals(plan, model, ALONE)
    assert texts is not None and texts.borrowed and len(texts.refusals) == 6
    assert set(texts.refusals) <= {"No .", "Not that ."} and any(texts.answers)
    printed = capsys.readouterr().out
    assert "refuses none of the 6 harmful prompts" in printed and "'No .'" in printed
    none = plan_of(tmp_path, tmp_path / "model", fallback=[])
    with pytest.raises(UserError, match=r"refuses none of the 6 .* refusal\.fallback"):
        own_refusals(none, model, ALONE)


def test_a_fallback_is_not_taken_for_what_the_model_starts_a_refusal_with(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    plans = [plan_of(tmp_path, folder, fallback=[text]) for text in ("please .", "draw .")]
    first, second = (prepare(plan, ALONE)[0] for plan in plans)
    assert first.table == second.table and first.reason == second.reason


def test_the_fallback_is_refusals_and_stays_unused_where_the_model_refuses() -> None:
    assert all(is_refusal(text) for text in config({}).refusal.fallback)
    texts = anchor_texts(config({}), PROMPTS[:2], ["I cannot do that.", "Sure, here"])
    assert texts is not None and not texts.borrowed
    assert texts.refusals == ["I cannot do that."] * 2


def test_without_an_anchor_nothing_is_asked_and_no_column_added(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, save_tiny(tmp_path / "model"), weight=0.0)
    assert own_refusals(plan, nn.Identity(), ALONE) is None
    batch = Feed(plan, plan.groups.harmless, 0)(0)[0]
    assert batch.refusal_weights is None
    assert (batch.prompt_last[: batch.num_harmful] == batch.input_ids.shape[1] - 1).all()
    assert RefusalTokens.of(batch) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't help with that. Here is why: it is", "I'm sorry, but I can't help "
         "with that."),
        (" That is a hard one. I cannot help. Try v1.5 of it. ", "That is a hard one. I cannot "
         "help."),
        ("I cannot help with version 1.5 of", "I cannot help with version 1.5 of"),
        ("I cannot help\n\n1. First", "I cannot help"),
    ],
)  # fmt: skip
def test_an_answer_is_cut_behind_the_sentence_that_refuses(answer: str, expected: str) -> None:
    assert first_refusal(answer) == expected


# Other sources


def test_several_refusals_are_drawn_by_seed_and_row() -> None:
    answers = ["I cannot do A.", "Sure, here", "I will not do B.", *["Sure, here"] * 9, " "]
    prompts = [Prompt.of(str(i)) for i in range(len(answers))]
    texts = anchor_texts(config({}), prompts, answers)
    assert texts is not None
    assert texts.refusals[0] == answers[0] and texts.refusals[2] == answers[2]
    assert set(texts.refusals[3:]) == {answers[0], answers[2]}
    assert texts.answers == [None, "Sure, here", None, *["Sure, here"] * 9, None]
    assert anchor_texts(config({}), prompts, answers) == texts
    other = anchor_texts(config({}, train={"seed": 7}), prompts, answers)
    assert other is not None and other.refusals != texts.refusals


def test_a_list_is_drawn_from_and_a_column_is_read() -> None:
    section = {"source": "list", "texts": ["No.", "Not that."]}
    texts = anchor_texts(config(section), PROMPTS * 3)
    assert texts is not None and set(texts.refusals) == {"No.", "Not that."}
    column = {"source": "column"}
    rows = [Prompt.of("a", "I cannot."), Prompt.of("b", "Here is")]
    assert anchor_texts(config(column), rows) == AnchorTexts(["I cannot.", "Here is"], [None] * 2)
    assert "1 of 2 are refusals by the rules" in anchor_line(config(column), rows)
    with pytest.raises(UserError, match=r"refusal\.source: column.*prompt 3, 'c', has no response"):
        anchor_texts(config(column), [*rows, Prompt.of("c")])


def test_a_missing_column_is_named_before_anything_runs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with pytest.raises(UserError, match=r"prompt 1, 'break the car', has no response"):
        plan_of(tmp_path, model, source="column")
    plan = plan_of(tmp_path, model, prefill={"probability": 0.5})
    line = "refusal anchor: weight 1, 24 tokens, decay 0.9, the base model's own refusals"
    assert (
        f"{line}, written before training; 50% after up to 8 tokens of an opening" in plan.lines()
    )


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"refusal": {"source": "list"}}, "texts is empty with source=list"),
        ({"refusal": {"texts": ["No."]}}, "source='auto', which does not read it"),
        ({"refusal": {"source": "list", "texts": [" "]}}, "texts holds a blank text"),
        ({"refusal": {"prefill": {"probability": 0.1, "texts": []}}}, "prefill.texts is empty"),
        ({"separation": {"weight": 0.0}}, "separation.weight: 0 without a refusal anchor"),
        (
            {
                "separation": {"weight": 0.0},
                "refusal": {"weight": 1},
                "train": {"early_stop": True},
            },
            "train.early_stop: separation.weight=0",
        ),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config({"model": {"name": "m"}} | raw)


# Rows


LONG = Prompt.of("break the car the tree")  # 8 ids, the shortest max_length


def anchor(max_length: int = 40, prompts: list[Prompt] = PROMPTS, **refusal: Any) -> RefusalAnchor:
    section = {"source": "list", "texts": ["here is some text ."], "tokens": 3} | refusal
    run = config(section, data={"max_length": max_length})
    texts = AnchorTexts(["here is some text ."] * 6, [None] * 3 + ["the car the road"] * 3)
    return RefusalAnchor(run, Formatter(tokenizer(), run.data), prompts, texts)


def words_of(ids: list[int]) -> str:
    return " ".join(tokenizer().convert_ids_to_tokens(ids))


def test_openings_are_drawn_by_seed_step_and_row() -> None:
    deep = {"probability": 0.5, "tokens": 3, "texts": ["sure please draw a tree", "a house"]}
    one, again = anchor(prefill=deep), anchor(prefill=deep)
    rows = {(s, r): one.row(s, r) for s in range(40) for r in range(6)}
    order = list(rows)
    random.Random(0).shuffle(order)
    assert {key: again.row(*key) for key in order} == rows  # whatever was asked before
    assert all(words_of(row.refusal) == "here is some" for row in rows.values())
    opened = [words_of(row.opening) for row in rows.values() if row.opening]
    assert 0.4 < len(opened) / len(rows) < 0.6
    texts = {words_of(row.opening) for (_, r), row in rows.items() if row.opening and r < 3}
    assert texts == {"sure", "sure please", "sure please draw", "a", "a house"}
    own = {words_of(row.opening) for (_, r), row in rows.items() if row.opening and r >= 3}
    assert own == {"the", "the car", "the car the"}
    shared = anchor(prefill=deep | {"own_answers": False})
    assert {words_of(shared.row(s, 4).opening) for s in range(40)} == texts | {""}


def test_some_openings_are_a_word_of_a_harmless_response() -> None:
    deep = {"probability": 1.0, "tokens": 3, "texts": ["sure please draw a tree"], "words": 0.4}
    harmless = [Prompt.of("x", "here is some text ."), Prompt.of("y", None), Prompt.of("z", " ")]
    section = config({"source": "list", "texts": ["no"], "prefill": deep}, data={"max_length": 40})
    texts = AnchorTexts(["no"] * 6, [None] * 3 + ["the car the road"] * 3)
    formatter = Formatter(tokenizer(), section.data)
    made = RefusalAnchor(section, formatter, PROMPTS, texts, harmless)
    drawn = [words_of(made.row(s, r).opening) for s in range(60) for r in range(6)]
    words = [text for text in drawn if text.split()[0] not in ("sure", "the")]
    assert 0.3 < len(words) / len(drawn) < 0.5
    # one word each; the tokenizer does not know those that begin as a sentence does
    assert set(words) == {"here", "is", "some", "text", ".", "<unk>"}
    other = RefusalAnchor(section, formatter, PROMPTS, texts)  # no response to take one from
    assert {words_of(other.row(s, 0).opening).split()[0] for s in range(40)} == {"sure"}


@pytest.mark.parametrize(
    ("room", "opening", "refusal"), [(0, 0, 0), (2, 0, 2), (3, 0, 3), (4, 1, 3)]
)
def test_what_follows_a_prompt_stays_within_max_length(
    room: int, opening: int, refusal: int
) -> None:
    made = anchor(
        8 + room, [LONG], prefill={"probability": 1.0, "tokens": 3, "texts": ["sure please draw"]}
    )
    row = made.row(0, 0)
    assert (len(row.opening), len(row.refusal)) == (opening, refusal)


def test_columns_of_a_batch_and_the_tokens_learned() -> None:
    made = anchor(prefill={"probability": 1.0, "tokens": 1, "texts": ["sure please"]}, decay=0.5)
    harmless = [Prompt.of("please draw a tree .", "sure here is some text .")]
    rows = [made.row(0, 0), made.row(0, 1)]
    batch = collate(made._formatter, PROMPTS[:2], harmless, "all", rows, made.decay)
    assert [words_of(row.tolist()) for row in batch.input_ids[:2]] == [
        f"<pad> <pad> <pad> <pad> <pad> <s> <user> break the {thing} <bot> sure here is some"
        for thing in ("car", "house")
    ]
    assert batch.prompt_last[:2].tolist() == [10, 10]
    assert batch.refusal_weights is not None
    expected = [0.0] * 11 + [1.0, 0.5, 0.25, 0.0]
    assert batch.refusal_weights.tolist() == [expected, expected]
    assert batch.num_tokens == int(batch.attention_mask.sum()) == 20 + 15
    found = RefusalTokens.of(batch)
    assert found is not None
    assert found.index.tolist() == [11, 12, 13, 26, 27, 28]
    assert words_of(found.task.targets.tolist()) == "here is some here is some here"
    assert found.task.counted.tolist() == [1, 0, 0] * 2 + [2]
    assert found.task.token_weights.tolist() == [1.0, 0.5, 0.25] * 2 + [0.0]
    assert found.watch.tolist() == [int(batch.prompt_last[2])]


def test_a_harmless_row_that_begins_as_a_refusal_does_is_not_watched() -> None:
    made = anchor()
    opening = words_of(made.row(0, 0).refusal[:1])
    harmless = [
        Prompt.of("please draw a tree .", "sure here is some text ."),
        Prompt.of("draw a house .", f"{opening} is some text ."),
    ]
    rows = [made.row(0, 0)]
    batch = collate(made._formatter, PROMPTS[:1], harmless, "all", rows, made.decay)
    found = RefusalTokens.of(batch)
    assert found is not None
    width = batch.input_ids.shape[1]
    begins = [batch.input_ids[1 + r, batch.prompt_last[1 + r] + 1].item() for r in (0, 1)]
    refusal = made.row(0, 0).refusal[0]
    expected = [r * width + int(batch.prompt_last[1 + r]) for r in (0, 1) if begins[r] != refusal]
    assert found.watch.tolist() == expected and refusal in begins
    assert refusal_counts(batch)[2] == len(expected) == 1
