"""A run that goes on with another number of ranks ends in the weights of one that was not stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launcher.test_resume import ENVIRONMENT, EVERYTHING, steps
from safetensors.torch import load_file
from tiny_models import save_tiny, write_prompts

WORKER = str(Path(__file__).parents[1] / "training" / "reshard_ranks.py")
pytestmark = [pytest.mark.launcher, pytest.mark.slow]
PAIRS = 4  # per step
STEPS = 4
PARTS = {"stage": 3, "sub_group_size": 3000}  # several flat parts per rank
CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {  # train; deepspeed of each of three starts
    "lora": ({"trainable": "lora", "lora": {"r": 4}}, ["zero3", "zero3", "zero3"]),
    "blocks": ({}, [{"zero_optimization": PARTS}] * 3),
    "down": ({}, ["zero3", "zero2", "zero0"]),
    "up": ({}, ["zero0", "zero2", "zero3"]),
}


def configured(
    folder: Path, name: str, ranks: int, deepspeed: Any, every: int, **train: Any
) -> str:
    path = folder / f"{name}-{ranks}-{every}.yaml"
    config = {
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": write_prompts(folder / "data") | {"cache_dir": str(folder / "cache")},
        "layers": [1, 2],
        "train": {"steps": STEPS, "micro_batch_size": PAIRS // ranks, "lr": 1e-3, "device": "cpu",
                  "warmup_ratio": 0.0} | train,
        "deepspeed": deepspeed,
        "checkpoint": {"every": every},
        "output_dir": str(folder / name),
    }
    path.write_text(yaml.safe_dump(config | EVERYTHING))
    return str(path)


def start(groups: list[tuple[int, int, list[str]]]) -> str:
    """Runs groups of (ranks, stops of the run, configurations); what they said."""
    done = subprocess.run(
        [sys.executable, WORKER, json.dumps(groups)], env=ENVIRONMENT,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def weights(run: Path) -> torch.Tensor:
    found = load_file(next((run / "model").glob("*.safetensors")))
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


def test_other_ranks_and_stages_go_on(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    groups = []
    for place, (ranks, stops) in enumerate([(2, 1), (1, 1), (2, 0)]):
        paths = [
            configured(tmp_path, name, ranks, stages[place], 0 if stops else 9, **train)
            for name, (train, stages) in CASES.items()
        ]
        if ranks == 1:
            paths += [
                configured(tmp_path, f"plain-{name}", 1, stages[0], 9, **train)
                for name, (train, stages) in CASES.items()
            ]
        groups.append((ranks, stops, paths))
    print(start(groups))
    for name in CASES:
        whole, parts = tmp_path / f"plain-{name}", tmp_path / name
        a, b = weights(whole), weights(parts)
        print(name, ((a - b).norm() / a.norm()).item())
        for (i, x), (j, y) in zip(steps(whole), steps(parts)):
            print(i, j, x, y)
    assert 0
