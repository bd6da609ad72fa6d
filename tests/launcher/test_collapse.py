"""A run that collapses, under the real launcher on two ranks: one message, the last good weights,
and a finished model of an earlier run untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_tiny, write_prompts
from transformers import AutoModelForCausalLM

from es2fast.errors import STOPPED

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
IDS = torch.tensor([[1, 4, 10, 16, 5, 23]])


def launch(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "es2fast.cli", "train", str(path), "--ranks", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS).logits.log_softmax(-1)


@pytest.mark.parametrize("stage", [3, 2])
def test_collapse_keeps_the_last_good_weights_and_the_earlier_model(
    tmp_path: Path, stage: int
) -> None:
    base = save_tiny(tmp_path / "model")
    config: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "separation": {"loss": "l2"},
        "kl": {"weight": 0.0},
        "safeguards": {
            "max_kl": 0.05, "max_grad_growth": None, "patience": 2, "keep_every": 1
        },
        "train": {"steps": 60, "micro_batch_size": 2, "lr": 3e-3, "warmup_ratio": 0.0,
                  "schedule": "constant", "device": "cpu", "overwrite": True},
        "deepspeed": f"zero{stage}",
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/kept.txt").write_text("of an earlier run")
    (tmp_path / "run/.es2fast").touch()  # the mark of a run's folder
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = launch(tmp_path / "run.yaml")
    everything = done.stdout + done.stderr
    assert done.returncode == STOPPED == 3
    assert everything.count("error: training stopped at step") == 1, everything[-3000:]
    message = next(x for x in everything.splitlines() if x.startswith("error: "))
    assert "safeguards.max_kl=0.05, for 2 steps" in message
    assert f"are in {str(tmp_path / 'run/last_good')!r}" in message
    assert "model/ was not written, the earlier run is in previous/" in message
    assert 'File "' not in everything.split("error: ")[0].split("es2fast/train.py")[-1]
    assert (tmp_path / "run/previous/model/kept.txt").read_text() == "of an earlier run"
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/train.json").exists()
    kept, before = logits(tmp_path / "run/last_good"), logits(base)
    kl = (before.exp() * (before - kept)).sum(-1).mean()
    assert 1e-7 < kl < 0.2
