"""A run that is stopped or killed and given again ends in the weights of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import save_tiny, write_prompts

from es2fast.distributed.launch import free_port
from es2fast.run.checkpoints import CheckpointFolder

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
        "data": write_prompts(folder / "data"),
        "layers": [1, 2],
        "train": {"steps": 5, "micro_batch_size": 1, "lr": 1e-3, "device": "cpu"} | train,
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_after_every_step(tmp_path: Path, ranks: int) -> None:
    """LoRA with dropout under ZeRO-3, whole blocks under ZeRO-2 and every state that there is."""
    save_tiny(tmp_path / "model")
    lora = {"trainable": "lora", "lora": {"r": 4, "dropout": 0.1}}
    paths = []
    for kind, train, changes in (
        ("lora", lora, EVERYTHING | {"deepspeed": "zero3"}),
        ("blocks", {}, EVERYTHING | {"deepspeed": "zero2"}),
    ):
        paths += [case(tmp_path, f"{kind}-{every}", every, train, **changes) for every in (9, 0)]
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
    for kind in ("lora", "blocks"):
        whole, parts = tmp_path / f"{kind}-9", tmp_path / f"{kind}-0"
        assert f"{parts} took 5 starts" in done.stdout
        assert steps(whole) == steps(parts)
        assert weights(whole) == weights(parts)
        assert not (parts / "checkpoints").exists()


def started(path: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "es2fast.cli", "train", path, "--ranks", "2", *overrides],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ranks_of(path: str) -> list[int]:
    """Processes that train this configuration, in the order of their ranks."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        local = [word for word in words if word.startswith("--local_rank=")]
        if path in words and local:
            found[local[0]] = int(entry.name)
    return [found[name] for name in sorted(found)]


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_damaged_and_terminated_through_the_command(tmp_path: Path) -> None:
    """Rank 1 is killed, the newest checkpoint damaged, the command terminated; then it finishes."""
    save_tiny(tmp_path / "model")
    options = {"steps": 40}
    path = case(tmp_path, "run", 2, options, deepspeed="zero3")
    run = tmp_path / "run"
    checkpoints = CheckpointFolder(run / "checkpoints")

    first = started(path)
    wait_for(lambda: len(checkpoints.steps()) == 2)
    os.kill(ranks_of(path)[1], signal.SIGKILL)
    assert first.wait(timeout=60) == 2
    wait_for(lambda: not ranks_of(path), 10)
    newest = checkpoints.steps()[0]
    broken = next((checkpoints.at(newest) / "engine").glob("*optim_states.pt"))
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")

    second = started(path)
    wait_for(lambda: checkpoints.steps()[0] > newest + 2)
    second.send_signal(signal.SIGTERM)
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 0, text[-3000:]
    assert f"the checkpoint of step {newest} is damaged" in text and str(broken) in text
    assert "the same command again continues" in text and not ranks_of(path)

    third = started(path)
    wait_for(lambda: len(ranks_of(path)) == 2)
    third.kill()  # the command alone
    wait_for(lambda: not ranks_of(path), 20)
    other = started(path, "train.lr=2e-3")
    text, _ = other.communicate(timeout=60)
    assert other.returncode == 2 and "train.lr (0.001 there, 0.002 now)" in text

    last = started(path)
    text, _ = last.communicate(timeout=120)
    assert last.returncode == 0, text[-3000:]
    whole = case(tmp_path, "whole", 0, options, deepspeed="zero3")
    text, _ = (undisturbed := started(whole)).communicate(timeout=120)
    assert undisturbed.returncode == 0, text[-3000:]
    assert steps(run) == steps(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")
