"""A step whose numbers are not finite leaves no trace but a count and the row's name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_tiny, write_prompts

from es2fast.distributed.runtime import Runtime
from es2fast.training.safeguards import Spikes
from es2fast.training.skipped import SkippedSteps

STAGES = ("zero0", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("skipped")
    paths = []
    for stage in STAGES:
        config = {
            "model": {"name": str(save_tiny(folder / "model")), "dtype": "fp32"},
            "data": write_prompts(folder / "data"),
            "layers": [1, 2],
            "separation": {"bank": 4, "robust": {"probability": 1e-9}},
            # the worker breaks a row, which has to be one
            "train": {"steps": 6, "micro_batch_size": 2, "packing": False, "device": "cpu"},
            "deepspeed": stage,
            "output_dir": str(folder / stage),
        }
        paths.append(folder / f"{stage}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    worker = Path(__file__).parent / "skip_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), str(folder / "found.json"), *map(str, paths)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_weights_optimizer_schedule_bank_and_means_are_as_without_the_step(
    runs: dict[str, Any], stage: str
) -> None:
    broken, plain = runs[stage]
    assert broken["skipped"] == [0, 1, 0] and plain["skipped"] == [0, 0]
    assert broken["weights"] == plain["weights"] and broken["lr"] == plain["lr"]
    assert broken["kept"] == plain["kept"] and all(map(math.isfinite, plain["kept"]))
    assert len(plain["kept"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_row_is_named(runs: dict[str, Any], stage: str) -> None:
    broken = runs[stage][0]
    assert broken["words"] == f"not finite were the states of {broken['name']}"
    assert broken["name"].startswith("harmful prompt ")


def test_many_rows_and_none() -> None:
    alone = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")
    skips = SkippedSteps(alone, lambda step: [[f"{step}.{i}" for i in range(4)]] * 2)
    skips.add(3, [torch.zeros(4, dtype=torch.bool), torch.tensor([True, True, False, True])])
    assert skips.words() == "not finite were the states of 3.0, 3.1, 3.2, 3.3 and 1 more"
    skips.add(4, [torch.ones(4, dtype=torch.bool)] * 2)
    assert "no row" in skips.words() and skips.count == 2


def test_a_loss_that_stands_out_is_flagged() -> None:
    spikes = Spikes()
    noise = [1.0 + 0.01 * math.sin(7.0 * i) for i in range(40)]
    assert not any(spikes.flag({"loss": value}) for value in noise)
    assert spikes.flag({"loss": 1.2}) and spikes.flag({"loss": math.nan})
    assert not spikes.flag({"loss": 5.0, "attacked": 1.0})  # compared with attacked ones: none yet
    again = Spikes()
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.flag({"loss": 1.2}) and not again.flag({"loss": 1.0})
