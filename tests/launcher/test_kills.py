"""A run that is killed, or asked to stop, goes on with the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny_models import save_tiny, write_prompts

from es2fast.config import load_config
from es2fast.errors import UserError
from es2fast.training.plan import make_plan

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.slow,
    pytest.mark.skipif("ES2FAST_LONG" not in os.environ, reason="minutes; set ES2FAST_LONG=1"),
]
STEPS = 8
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def configured(folder: Path, name: str) -> list[str]:
    """The command that trains a tiny model on two ranks, a checkpoint after every step."""
    config: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": write_prompts(folder / "data") | {"cache_dir": str(folder / "cache")},
        "layers": [1, 2],
        "separation": {"bank": 4},
        "train": {"steps": STEPS, "micro_batch_size": 1, "lr": 1e-3, "device": "cpu"},
        "deepspeed": "zero2",
        "checkpoint": {"every": 1},
        "output_dir": str(folder / name),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "es2fast.cli", "train", str(folder / f"{name}.yaml"),
            "--ranks", "2"]  # fmt: skip


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def disturbed(
    command: list[str], run: Path, after: int, disturb: Callable[[psutil.Process], None]
) -> tuple[int, str]:
    """Starts the command, disturbs it once `after` steps are logged, and waits for its end, and for
    that of all processes below it."""
    started = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process = psutil.Process(started.pid)
    deadline = time.monotonic() + 200
    while steps_done(run) < after:
        assert started.poll() is None, started.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.02)
    below = process.children(recursive=True)
    disturb(process)
    said = started.communicate(timeout=200)[0]
    _, alive = psutil.wait_procs(below, timeout=60)
    for child in alive:
        child.kill()
    assert not alive, "processes outlived the command"
    return started.returncode, said


def ask(process: psutil.Process) -> None:
    process.send_signal(signal.SIGTERM)


def weights(run: Path) -> bytes:
    return next((run / "model").glob("*.safetensors")).read_bytes()


def test_killed_and_asked_to_stop_it_ends_in_the_same_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    plain = subprocess.run(
        configured(tmp_path, "plain"), env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert plain.returncode == 0, plain.stdout[-2000:] + plain.stderr[-3000:]
    command, run = configured(tmp_path, "killed"), tmp_path / "killed"
    code, said = disturbed(command, run, 2, lambda process: process.kill())
    assert code == -signal.SIGKILL  # its ranks were killed with it
    code, said = disturbed(command, run, 5, ask)
    assert "continues after step" in said
    assert code == 0 and "the same command again continues" in said
    assert not (run / "model").exists() and steps_done(run) < STEPS
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert weights(run) == weights(tmp_path / "plain")
    with pytest.raises(UserError, match=r"already holds a run.*train\.overwrite"):
        make_plan(load_config(tmp_path / "killed.yaml"))
