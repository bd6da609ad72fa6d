"""Ranks that were started with different runs say so, all with the same line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, write_prompts
from torch import multiprocessing

from training import agreement_ranks


def node(folder: Path, **train: Any) -> Path:
    """A node's working folder: model, prompts and run.yaml, which names them by relative paths."""
    save_tiny(folder / "model")
    write_prompts(folder / "data")
    raw = {
        "model": {"name": "model", "dtype": "fp32"},
        "data": {name: f"data/{name}.jsonl" for name in ("harmful", "harmless")},
        "layers": [1, 2],
        "train": {"device": "cpu", "micro_batch_size": 2} | train,
        "deepspeed": "zero2",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder


def test_what_the_ranks_disagree_on_is_named(tmp_path: Path) -> None:
    plain = node(tmp_path / "plain")
    node(tmp_path / "rate", lr=1e-3)
    for name in ("prompts", "weights"):
        shutil.copytree(plain, tmp_path / name)
    rows = [{"prompt": f"{verb} the car"} for verb in ("steal", "break")]
    file = tmp_path / "prompts/data/harmful.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = load_file(tmp_path / "weights/model/model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, tmp_path / "weights/model/model.safetensors", metadata={"format": "pt"})
    cases = [
        ["plain", "plain", "plain"],
        ["plain", "plain", "rate"],
        ["plain", "prompts", "plain"],
        ["weights", "plain", "plain"],
    ]
    multiprocessing.spawn(agreement_ranks.worker, (cases, str(tmp_path)), nprocs=3)
    said = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(3)]
    assert said[0] == said[1] == said[2]
    agreed, rate, prompts, model = said[0]
    assert agreed == "agreed"
    assert "disagree on the configuration: train.lr (5e-05 or 0.001)" in rate
    assert "ranks 0, 1 have " in rate and "rank 2 has " in rate and "same key=value" in rate
    assert "disagree on the data: ranks 0, 2 have " in prompts and "same prompt files" in prompts
    assert "disagree on the base model: rank 0 has " in model and "same model.name" in model
