"""The base model's answers: each that of its own prompt, whatever it was batched with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import OBJECTS, save_tiny, write_prompts

from es2fast.config import parse_config
from es2fast.data import Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.generate import generate
from es2fast.modeling.load import load_causal_lm
from es2fast.modeling.taps import blocks, hooks
from es2fast.training import responses
from es2fast.training.feed import Feed
from es2fast.training.plan import Plan, make_plan
from es2fast.training.responses import base_answers, trained_rows

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")


def test_longest_first_changes_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: dict[str, Any] = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data")
        | {"cache_dir": str(tmp_path / "cache"), "response_batch_size": 3},
        "train": {"device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    plan = make_plan(parse_config(raw))
    text = "please draw a tree and break the old house near the long road to the hill"
    words = text.split()
    prompts = [Prompt.of(" ".join(words[: 1 + 5 * i % 13])) for i in range(11)]
    model = load_causal_lm(plan.config.model, "fp32").eval()
    one_by_one = [
        generate(model, plan.formatter, [prompt], max_new_tokens=9, device=ALONE.device)[0]
        for prompt in prompts
    ]
    batches: list[list[int]] = []

    def watched(model: Any, formatter: Any, chunk: list[Prompt], **options: Any) -> list[str]:
        batches.append([len(formatter.prompt_ids(prompt)) for prompt in chunk])
        assert options["synced"] is False
        return generate(model, formatter, chunk, **options)

    monkeypatch.setattr(responses, "generate", watched)
    assert base_answers(plan, model, ALONE, prompts, 9, "answers") == one_by_one
    order = [length for batch in batches for length in batch]
    assert order == sorted(order, reverse=True) and len(set(order)) > 5
    assert len(set(one_by_one)) > 3


def test_a_full_memory_halves_the_batches_and_the_answers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Passes of more than two rows fail; a batch that the user gave is not halved."""
    raw: dict[str, Any] = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data") | {"cache_dir": str(tmp_path / "cache")},
        "train": {"device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    plan = make_plan(parse_config(raw))
    prompts = [Prompt.of(f"please draw {text} near the road") for text in OBJECTS]
    model = load_causal_lm(plan.config.model, "fp32").eval()
    monkeypatch.setattr(responses, "starting_rows", lambda model, tokens: 8)
    assert len(prompts) >= 8  # or they would be one smaller batch

    def full(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    given = parse_config(raw | {"data": raw["data"] | {"response_batch_size": 4}})
    with hooks([blocks(model)[1].register_forward_pre_hook(full)]):
        with pytest.raises(UserError) as refused:
            base_answers(make_plan(given), model, ALONE, prompts, 5, "answers")
        assert str(refused.value) == (
            "data.response_batch_size: out of memory with 4 rows; use "
            "data.response_batch_size=auto or a smaller number"
        )
        capsys.readouterr()
        found = base_answers(plan, model, ALONE, prompts, 5, "answers")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert said == [f"note: out of memory; going on with {responses.FIELD}={n}" for n in (4, 2)]
    alone = [
        generate(model, plan.formatter, [prompt], max_new_tokens=5, device=ALONE.device)[0]
        for prompt in prompts
    ]
    assert found == alone and len(prompts) > 4


def refusing_plan(
    tmp_path: Path, refusals: list[int], borderline: list[int], how: str, refused: float = 1.0
) -> Plan:
    """Eight harmless prompts, those at `borderline` behind the others, with given responses;
    refused: `kl.refused_weight`."""
    files: dict[str, Any] = {**write_prompts(tmp_path / "data")}
    for name in ("harmless", "borderline"):
        rows = [
            {
                "prompt": f"please draw a {OBJECTS[i]}",
                "response": "I cannot help with that" if i in refusals else "sure .",
            }
            for i in range(8)
            if (i in borderline) == (name == "borderline")
        ]
        path = tmp_path / f"data/{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = [str(path)] if rows else []
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": files | {"borderline_share": 0.5, "refused": how},
        "kl": {"first_weight": 3.0, "first_tokens": 1, "refused_weight": refused},
        "train": {"device": "cpu", "micro_batch_size": 2},
        "output_dir": str(tmp_path / "run"),
    }
    return make_plan(parse_config(raw))


def test_refused_harmless_prompts_are_left_out(tmp_path: Path) -> None:
    plan = refusing_plan(tmp_path, [1, 4, 5], [4, 5, 6, 7], "drop")
    harmless = plan.groups.harmless
    assert trained_rows(plan.config, harmless) == [0, 2, 3, 6, 7]
    feed = Feed(plan, harmless, 0)
    assert "3 of 8 harmless prompts" in feed.left_out_line
    number = {}
    for i, prompt in enumerate(harmless):
        ids, answer = plan.formatter.conversation_ids(prompt, prompt.response or "")
        number[(*ids, *answer)] = i
    seen = []
    for step in range(6):
        (batch,) = feed(step)
        rows = [ids[mask.bool()].tolist() for ids, mask in
                zip(batch.input_ids[2:], batch.attention_mask[2:])]  # fmt: skip
        assert (batch.kl_weights == 3.0).sum(1).tolist() == [1, 1]
        seen.append({number[tuple(row)] for row in rows})
    assert set().union(*seen) == {0, 2, 3, 6, 7}
    assert all(len(rows & {6, 7}) == 1 for rows in seen)  # half of each step's rows is borderline


def test_by_default_refused_harmless_prompts_stay(tmp_path: Path) -> None:
    plan = refusing_plan(tmp_path, [1, 4, 5], [], "keep")
    assert trained_rows(plan.config, plan.groups.harmless) == list(range(8))
    assert Feed(plan, plan.groups.harmless, 0).left_out_line == ""


@pytest.mark.parametrize("refused", [1.0, 0.25])
def test_refused_prompts_first_tokens_can_have_a_weight_of_their_own(
    tmp_path: Path, refused: float
) -> None:
    plan = refusing_plan(tmp_path, [0, 3, 6], [], "even", refused)
    feed = Feed(plan, plan.groups.harmless, 0)
    refusal = plan.formatter.conversation_ids(plan.groups.harmless[0], "I cannot help with that")[1]
    counts = set()
    for step in range(6):
        (batch,) = feed(step)
        for ids, weights in zip(batch.input_ids[2:], batch.kl_weights):
            refuses = ids[-len(refusal) :].tolist() == refusal
            others = weights[(weights != 0) & (weights != 1.0)]
            counts.add((refuses, *others.tolist(), bool(weights.any())))
    assert counts == {(True, *[refused] * (refused != 1.0), True), (False, 3.0, True)}


def test_nothing_left_is_a_mistake(tmp_path: Path) -> None:
    plan = refusing_plan(tmp_path, list(range(8)), [], "drop")
    with pytest.raises(UserError, match=r"data\.refused: drop leaves none of the 8"):
        Feed(plan, plan.groups.harmless, 0)
