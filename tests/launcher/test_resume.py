"""A run that is stopped and given again ends in the weights of one that was not."""

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
from safetensors.torch import load
from tiny_models import save_tiny, write_prompts

from es2fast.distributed.launch import free_port

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
WORKER = str(Path(__file__).parents[1] / "training" / "resume_worker.py")
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
EVERYTHING = {
    "separation": {
        "bank": 8,
        "robust": {"probability": 0.5, "attacks": ["scav", "mean_difference"], "states": 16},
    },
    "kl": {"budget": 0.02},
    "safeguards": {"keep_every": 2},
}


def case(folder: Path, name: str, every: int, train: dict[str, Any], **changes: Any) -> str:
    config = {
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": write_prompts(folder / "data") | {"cache_dir": str(folder / "cache")},
        "layers": [1, 2],
        "train": {"steps": 3, "micro_batch_size": 1, "lr": 1e-3, "device": "cpu"} | train,
        "checkpoint": {"every": every},
        "output_dir": str(folder / name),
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | changes))
    return str(folder / f"{name}.yaml")


def weights(run: Path) -> bytes:
    return next((run / "model").glob("*.safetensors")).read_bytes()


def steps(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    """Files end where a full disk would end them: the engine's states do not fit, a model does."""
    save_tiny(tmp_path / "model")
    path = case(tmp_path, "full", 1, {}, deepspeed="zero2")
    done = subprocess.run(
        [sys.executable, WORKER, path], env=ENVIRONMENT | {"LARGEST_FILE": "180000"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for step in (1, 2):
        assert f"warning: the checkpoint of step {step} could not be written" in done.stdout
    assert "there is none yet" in done.stdout and "Traceback" not in done.stderr
    assert len(steps(tmp_path / "full")) == 3 and weights(tmp_path / "full")
    assert not list((tmp_path / "full").glob("checkpoints/*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_after_every_step(tmp_path: Path, ranks: int) -> None:
    """LoRA with dropout under ZeRO-3, on one rank whole blocks under ZeRO-2 too, and in bf16 under
    stage 0, with every state that there is; and without a budget, where a wish to stop is seen
    during the next step."""
    save_tiny(tmp_path / "model")
    lora = {"trainable": "lora", "lora": {"r": 4, "dropout": 0.1}}
    paths = []
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("lora", lora, "zero3"),
        ("blocks", {"teacher": "cache"}, "zero2"),
        ("bf16", {}, "zero0"),
        ("late", {}, "zero2"),
    ]
    cases = [cases[0], cases[3]] if ranks > 1 else cases
    for kind, train, stage in cases:
        model = {"name": str(tmp_path / "model"), "dtype": "bf16" if kind == "bf16" else "fp32"}
        changes = EVERYTHING | {"deepspeed": stage, "model": model}
        if kind == "late":
            changes |= {"kl": {"weight": 5.0}}
        paths += [case(tmp_path, f"{kind}-{every}", every, train, **changes) for every in (9, 0)]
        if kind == "lora":
            paths.append(case(tmp_path, "scaled", 9, train | {"update_scale": 0.25}, **changes))
    start = [sys.executable, WORKER]
    if ranks > 1:
        start = [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)),
            *("--master_port", str(free_port()), WORKER),
        ]
    done = subprocess.run(
        [*start, *paths], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for kind, *_ in cases:
        whole, parts = tmp_path / f"{kind}-9", tmp_path / f"{kind}-0"
        assert f"{parts} took {2 if kind == 'late' else 3} starts" in done.stdout
        assert steps(whole) == steps(parts)
        assert weights(whole) == weights(parts)
        assert not (parts / "checkpoints").exists()
    check_scaled(tmp_path / "lora-9", tmp_path / "scaled")


def test_a_run_that_meets_its_target_has_the_weights_of_that_step(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    train = {"lr": 1e-2, "weight_decay": 0.5, "schedule": "constant", "warmup_ratio": 0.0}
    near = {"margin": 0.5}  # at rest from the start
    met = case(tmp_path, "met", 9, train | {"steps": 9, "early_stop": True}, separation=near)
    short = case(tmp_path, "short", 9, train | {"steps": 5}, separation=near)
    done = subprocess.run(
        [sys.executable, WORKER, met, short], env=ENVIRONMENT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (
        steps(tmp_path / "met") == steps(tmp_path / "short") and len(steps(tmp_path / "met")) == 5
    )
    assert weights(tmp_path / "met") == weights(tmp_path / "short")
    assert json.loads((tmp_path / "met" / "train.json").read_text())["stopped_early"]


def check_scaled(whole: Path, scaled: Path) -> None:
    """A quarter of the update: the adapter's B is a quarter of the trained one, its A the same."""
    for run, scale in ((whole, 1.0), (scaled, 0.25)):
        assert json.loads((run / "train.json").read_text())["update_scale"] == scale
    ends, saved = (load(weights(run)) for run in (whole, scaled))
    for name, tensor in ends.items():
        factor = 0.25 if "lora_B" in name else 1.0
        torch.testing.assert_close(saved[name], factor * tensor, rtol=1e-6, atol=0)
    assert any(tensor.any() for name, tensor in ends.items() if "lora_B" in name)
