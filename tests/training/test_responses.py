"""The base model's answers: each that of its own prompt, whatever it was batched with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, write_prompts

from es2fast.config import parse_config
from es2fast.data import Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.generate import generate
from es2fast.modeling.load import load_causal_lm
from es2fast.training import responses
from es2fast.training.plan import make_plan
from es2fast.training.responses import base_answers

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
