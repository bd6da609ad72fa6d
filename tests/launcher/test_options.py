"""Every option of the separation, a refusal anchor and a sharded head, launched on two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import REFUSAL, save_refusing, write_prompts

from es2fast.distributed.launch import launch
from es2fast.ops.separation.whitening import Whitening

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def test_all_options_together(tmp_path: Path) -> None:
    config = {
        "model": {"name": str(save_refusing(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data") | {"cache_dir": str(tmp_path / "cache")},
        "layers": [1, 3],
        "separation": {
            "weight": 0.5, "loss": "fisher", "margin": 3.0, "space": "normed",
            "norm_band": [0.9, 1.1],
            "bank": 8, "robust": {"probability": 0.5, "attack": "scav", "refit_every": 1},
        },
        "refusal": {"weight": 2.0, "prefill": {"probability": 0.5}},
        "train": {
            "steps": 8, "micro_batch_size": 2, "lr": 1e-2, "device": "cpu", "zero3_head": "sharded",
        },
        "deepspeed": "zero3",
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch(tmp_path / "run.yaml", ranks=2, device="cpu")
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {row["attacked"] for row in rows} == {0.0, 1.0}
    assert rows[0]["sep/1"] < 3.0 and {"norm_band", "norm_out/1", "norm_out/3"} <= rows[0].keys()
    for row in rows:
        terms = 0.5 * row["sep"] + row["kl_weight"] * row["kl"] + 2.0 * row["refusal"]
        assert row["loss"] == pytest.approx(terms + row["norm_band"], rel=1e-6)
        assert 0 <= row["refusal_top1"] <= 1
    assert len({row["refusal_top1"] for row in rows}) > 1
    answers = [json.loads(x) for x in (tmp_path / "cache/responses.jsonl").read_text().splitlines()]
    assert len(answers) == 12  # one per harmful prompt
    assert 0 < sum(row["text"].startswith(REFUSAL) for row in answers) < 12
    layers = json.loads((tmp_path / "run/layers.json").read_text())
    assert layers["whitened0"].keys() == {"1", "3"} and "whitening" not in layers
    tensors = load_file(tmp_path / "run/whitening.safetensors")
    for layer in (1, 3):
        whitening = Whitening(tensors[f"{layer}.inverse_std"], tensors[f"{layer}.factor"])
        assert torch.isfinite(whitening(torch.randn(4, 32))).all()
