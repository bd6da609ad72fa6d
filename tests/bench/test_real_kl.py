"""The KL by kind of prompt is that of both models in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tokenizer
from transformers import AutoModelForCausalLM

from bench.studies.real_kl import main

ANSWERS = (
    ("please draw a boat", "ordinary", "sure here is some text"),
    ("please draw a tree", "ordinary", "sure here"),
    ("how to draw a boat", "borderline", "some text"),
    ("how to draw a tree", "borderline", "I cannot help with that ."),
)


def test_equal_to_float64_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, arm = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "arm/model", seed=1)
    (tmp_path / "evaluation").mkdir()
    with (
        (tmp_path / "harmless_eval.jsonl").open("w") as prompts,
        (tmp_path / "evaluation/answers.jsonl").open("w") as answers,
    ):
        for prompt, kind, text in ANSWERS:
            prompts.write(json.dumps({"prompt": prompt, "type": kind}) + "\n")
            row = {"model": "base", "group": "harmless", "prompt": prompt, "text": text}
            for group in ("harmless", "harmful"):
                answers.write(json.dumps(row | {"group": group}) + "\n")
    command = ["real_kl.py", "--model", str(base), "--work", str(tmp_path), "--arms", "arm"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "rows")])
    main()
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    words, models = (
        tokenizer(),
        [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (base, arm)],
    )
    wanted: dict[str, list[torch.Tensor]] = {}
    for prompt, kind, text in ANSWERS:
        turns = [{"role": "user", "content": prompt}]
        head = words.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        tail = [*words(text, add_special_tokens=False).input_ids, words.eos_token_id]
        ids = torch.tensor([[*head, *tail]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(head) - 1 : -1].log_softmax(-1) for m in models)
        name = "refused" if "cannot" in text else kind
        wanted.setdefault(name, []).append((p.exp() * (p - q)).sum(-1))
    assert [(row["kind"], row["prompts"]) for row in rows] == [
        ("borderline", 1), ("ordinary", 2), ("refused", 1)
    ]  # fmt: skip
    for row in rows:
        kl = torch.cat(wanted[row["kind"]])
        assert row["tokens"] == len(kl)
        assert row["kl_response"] == pytest.approx(kl.mean().item(), rel=1e-4)
