"""A run that goes on with other ranks ends in the weights of one that was not stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny, write_prompts

from launcher.test_resume import ENVIRONMENT, EVERYTHING, steps

WORKER = str(Path(__file__).parents[1] / "training" / "reshard_ranks.py")
pytestmark = [pytest.mark.launcher, pytest.mark.slow]
PAIRS = 4  # per step
STEPS = 4
SMALL = 6000  # bytes of the largest file on a disk that is full
BOUND = 1e-5  # of how far the weights have moved
SEVERAL = {"zero_optimization": {"stage": 3, "sub_group_size": 3000}}  # flat parts per rank
# train, dtype; ranks and `deepspeed` of each start, all but the last stopped after a step
CASES: dict[str, tuple[dict[str, Any], str, list[tuple[int, Any]]]] = {
    "lora": ({"trainable": "lora", "lora": {"r": 4}}, "fp32", [(2, "zero3"), (1, "zero3")]),
    "blocks": ({}, "fp32", [(2, SEVERAL), (1, SEVERAL)]),
    "down": ({}, "fp32", [(2, "zero3"), (1, "zero2"), (2, "zero0")]),
    "up": ({}, "fp32", [(1, "zero0"), (2, "zero2"), (1, "zero3")]),
    "bf16": ({}, "bf16", [(1, "zero2"), (1, "zero0"), (1, "zero3")]),
}
if "ES2FAST_LONG" in os.environ:
    CASES["four"] = ({}, "fp32", [(2, SEVERAL), (4, SEVERAL)])
# probes of an attack are fitted on rows in an order that follows from the ranks, to a tolerance
STATES = EVERYTHING | {
    "separation": {
        "bank": 8,
        "robust": {"probability": 0.5, "attacks": ["mean_difference"], "states": 16},
    }
}


class Project:
    """A tiny model, prompts, and runs of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.too_small: list[str] = []  # configurations of starts on too small a disk
        self.base = load_file(save_tiny(folder / "model") / "model.safetensors")

    def file(
        self, name: str, ranks: int, deepspeed: Any, *, stops: bool, dtype: str, **train: Any
    ) -> str:
        """The run's configuration for so many ranks."""
        folder = self.folder
        settings = {"steps": STEPS, "micro_batch_size": PAIRS // ranks, "lr": 1e-3,
                    "warmup_ratio": 0.0, "device": "cpu"}  # fmt: skip
        config = {
            "model": {"name": str(folder / "model"), "dtype": dtype},
            "data": write_prompts(folder / "data") | {"cache_dir": str(folder / "cache")},
            "layers": [1, 2],
            "train": settings | train,
            "deepspeed": deepspeed,
            "checkpoint": {"every": 0 if stops else STEPS},
            "output_dir": str(folder / name),
        }
        path = folder / f"{name}-{ranks}-{stops}-{len(list(folder.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(config | STATES))
        return str(path)

    def moved(self, name: str) -> torch.Tensor:
        """By how much all trained weights differ from their start, which is 0 for LoRA's B."""
        found = load_file(next((self.folder / name / "model").glob("*.safetensors")))
        return torch.cat(
            [
                (found[key].double() - self.base.get(key, torch.zeros(())).double()).flatten()
                for key in sorted(found)
                if key in self.base or "lora_B" in key
            ]
        )

    def apart(self, one: str, other: str) -> float:
        """Between two runs' weights, relative to how far they have moved."""
        a, b = self.moved(one), self.moved(other)
        return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """All runs have come to their ends, in one process."""
    project = Project(tmp_path_factory.mktemp("reshard"))
    groups: list[tuple[int, int, list[str]]] = []
    for name in ("lora", "blocks", "bf16"):
        train, dtype, starts = CASES[name]
        path = project.file(f"plain-{name}", 1, starts[0][1], stops=False, dtype=dtype, **train)
        groups.append((1, 0, [path]))
    for name, (train, dtype, starts) in CASES.items():
        for place, (ranks, deepspeed) in enumerate(starts):
            stops = place < len(starts) - 1
            if name == "down" and place:
                path = project.file(name, 1, deepspeed, stops=stops, dtype=dtype)
                project.too_small.append(path)
                groups.append((-SMALL, 0, [path]))
            path = project.file(name, ranks, deepspeed, stops=stops, dtype=dtype, **train)
            groups.append((ranks, int(stops), [path]))
            if name == "up" and place == 0:
                copy = str(project.folder / "forgot")
                groups.append((0, 0, [str(project.folder / name), copy]))
                path = project.file("forgot", 1, "zero2", stops=False, dtype=dtype)
                groups.append((1, 0, [path]))
    ran = subprocess.run(
        [sys.executable, WORKER, json.dumps(groups)], env=ENVIRONMENT,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    return project


@pytest.mark.parametrize("name", CASES)
def test_other_ranks_and_stages_end_in_the_same_weights(done: Project, name: str) -> None:
    plain = f"plain-{name}" if name in ("lora", "bf16") else "plain-blocks"
    assert done.apart(plain, name) <= BOUND
    losses = zip(steps(done.folder / plain), steps(done.folder / name), strict=True)
    assert all(a == b and x == pytest.approx(y, rel=BOUND) for (a, x), (b, y) in losses)
    assert not (done.folder / name / "checkpoints").exists()


def test_a_disk_full_while_converting_leaves_the_checkpoint(done: Project) -> None:
    """`down` was refused so before each of its starts, and has ended in the right weights."""
    assert len(done.too_small) == 2
    for path, to in zip(done.too_small, ("ZeRO stage 2", "ZeRO stage 0"), strict=True):
        message, left = json.loads(Path(f"{path}.refused").read_text())
        assert message.startswith("checkpoint.resume: ") and "\n" not in message
        assert "could not be converted from " in message and f" to 1 rank at {to} (" in message
        assert left and all(name.startswith("step-0") for name in left)


def test_without_the_optimizers_moments_the_weights_would_be_others(done: Project) -> None:
    assert done.apart("plain-blocks", "forgot") > 1000 * BOUND
