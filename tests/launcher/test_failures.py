"""Errors of one rank under the real launcher on two: shown, and the end of every rank."""

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
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, write_prompts

from es2fast.distributed.launch import free_port

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
REMOTE = """
import os
from transformers import LlamaForCausalLM

class Broken(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        if os.environ["RANK"] == "1":
            raise RuntimeError("rank 1 alone is broken")
        return super().forward(*args, **kwargs)
"""


def run(
    folder: Path, override: str = "train.seed=0", deepspeed: str = "zero3", **changes: Any
) -> list[str]:
    """Lines on stderr of a run that fails; rank 1 has one override more."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    config: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "dtype": "fp32", "trust_remote_code": True},
        "data": write_prompts(folder / "data"),
        "train": {"steps": 1, "micro_batch_size": 1, "device": "cpu"},
        "deepspeed": deepspeed,
        "output_dir": str(folder / "run"),
    }
    for name, change in changes.items():
        config[name] |= change
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    worker = str(Path(__file__).parent / "failing_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
         "--master_port", str(free_port()), worker, override, "--config", str(folder / "run.yaml")],
        env=os.environ
        | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "hf")},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    assert not (folder / "run/model").exists()
    return done.stderr.splitlines()


def errors(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("error: ", "[rank "))]


@pytest.mark.parametrize("deepspeed", ["zero3", "auto"])  # auto: rank 0 waits for rank 1's memory
def test_a_file_that_only_one_node_lacks(tmp_path: Path, deepspeed: str) -> None:
    lines = run(tmp_path, "data.harmful=absent.jsonl", deepspeed)
    first = errors(lines)[0]
    assert first.startswith("[rank 1] error: ") and "absent.jsonl" in first
    assert not any("Traceback" in line for line in lines if line.startswith("[rank 1]"))
    assert not (tmp_path / "run/config.yaml").exists()


def test_what_rank_0_finds_while_measuring_ends_both_with_one_message(tmp_path: Path) -> None:
    """Without attention the last token's state is the same for all prompts; only rank 0 has the
    states to see it."""
    weights = save_tiny(tmp_path / "model") / "model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if "o_proj" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, weights, metadata={"format": "pt"})
    lines = run(tmp_path)
    found = errors(lines)
    assert len(found) == 1
    assert found[0].startswith("error: layers: harmful and harmless prompts have the same state")
    assert not any("Traceback" in line for line in lines)


def test_an_unexpected_exception_is_a_traceback_of_its_rank(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "broken.py").write_text(REMOTE)
    settings = json.loads((model / "config.json").read_text())
    settings |= {"auto_map": {"AutoModelForCausalLM": "broken.Broken"}}
    (model / "config.json").write_text(json.dumps(settings))
    lines = run(tmp_path)
    start = lines.index("[rank 1] Traceback (most recent call last):")
    assert "RuntimeError: rank 1 alone is broken" in lines[start:]
    assert not any(line.startswith("[rank 0] Traceback") for line in lines)
