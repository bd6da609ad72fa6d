"""A plan: what it says, and that nothing is read a second time to train on it."""

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
from tiny_models import save_tiny, write_prompts

from es2fast.config import load_config
from es2fast.training import plan as plans
from es2fast.training.plan import make_plan

COUNT_READS = """
import json, sys
opened = []
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".jsonl"):
        opened.append([str(arguments[0]), arguments[1]])
sys.addaudithook(hook)
from es2fast.train import main
code = main(["--config", sys.argv[1]])
print(json.dumps(opened), file=open(sys.argv[2], "w"))
sys.exit(code)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    raw: dict[str, Any] = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "train": {"steps": 1, "micro_batch_size": 2, "gradient_accumulation": 3, "device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "run.yaml"


def test_a_plan_holds_what_a_run_needs(config: Path) -> None:
    plan = make_plan(load_config(config), world_size=2)
    assert plan.deepspeed["train_batch_size"] == 12 and plan.zero_stage == 2
    assert len(plan.lengths) == len(plan.groups.harmful) + len(plan.groups.harmless) == 24
    rows = [plan.sampler(rank).indices(0) for rank in (0, 1)]
    assert rows[0] != rows[1] and len(rows[0]) == 3
    assert "2 pairs x 3 micro-batches x 2 ranks = 12 pairs per step" in "\n".join(plan.lines())
    assert not plan.folder.path.exists()


def test_auto_says_which_stage_it_took_and_a_named_one_stays(config: Path) -> None:
    auto = make_plan(load_config(config, ["deepspeed=auto"]), world_size=2)
    named = make_plan(load_config(config), world_size=2)
    whole = make_plan(load_config(config, ["deepspeed=zero0"]), world_size=2)
    assert auto.deepspeed == whole.deepspeed != named.deepspeed  # the tiny model fits anywhere
    assert auto.why_stage.startswith("deepspeed: auto picks ZeRO stage 0: it fits and nothing ")
    assert auto.lines() == [*whole.lines()[:-1], auto.why_stage, named.lines()[-1]]
    third = make_plan(load_config(config, ["deepspeed=zero3"]), world_size=2)
    assert third.zero_stage == 3 and third.why_stage == ""


def test_says_where_bfloat16_would_be_faster(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "GEMM_BF16", "AMX")
    auto = load_config(config, ["model.dtype=auto"])
    assert make_plan(auto).dtype_line == ""  # the model is small
    monkeypatch.setattr(plans, "BF16_WIDTH", 1)
    line = make_plan(auto).dtype_line
    assert line in make_plan(auto).lines() and "(AMX)" in line and "model.dtype=bf16" in line
    assert make_plan(load_config(config)).dtype_line == ""  # fp32 was asked for
    monkeypatch.setattr(plans, "GEMM_BF16", "BFMMLA")  # never measured
    assert make_plan(auto).dtype_line == ""


@pytest.mark.parametrize("has_it", [True, False])
def test_says_where_bfloat16_is_only_emulated(
    config: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it)
    line = make_plan(load_config(config, ["model.dtype=bf16"])).dtype_line
    assert line == "" if has_it else "model.dtype=fp32" in line
    assert make_plan(load_config(config, ["model.dtype=fp32"])).dtype_line == ""


@pytest.mark.slow
def test_a_training_reads_every_source_once(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_READS, str(config), str(tmp_path / "opened.json")],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/train.json").is_file()
    opened = [Path(path).name for path, _ in json.loads((tmp_path / "opened.json").read_text())]
    assert [opened.count(f"{name}.jsonl") for name in ("harmful", "harmless")] == [1, 1]
