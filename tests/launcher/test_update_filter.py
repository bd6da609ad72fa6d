"""A run that filters its update, under ZeRO-3 on two ranks, against filtering the same run's
unfiltered adapter afterwards on one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_refusing, write_prompts

from es2fast.config import load_config
from es2fast.distributed.launch import launch
from es2fast.errors import UserError
from es2fast.run.export import export_run
from es2fast.training.update_filter import filter_adapter

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
STRENGTH = 2.0


def test_a_run_filters_its_update(tmp_path: Path) -> None:
    model, sources = save_refusing(tmp_path / "model"), write_prompts(tmp_path / "data")

    def run(name: str, ranks: int, strength: float) -> Path:
        config = {
            "model": {"name": str(model), "dtype": "fp32"},
            "data": sources | {"cache_dir": str(tmp_path / "cache")},
            "layers": [1, 2],
            "refusal": {"weight": 1.0, "prefill": {"probability": 0.5}},
            "train": {"steps": 3, "micro_batch_size": 4 // ranks, "lr": 1e-2, "device": "cpu",
                      "trainable": "lora", "trainable_blocks": "all", "update_filter": strength},
            "deepspeed": "zero3" if ranks > 1 else "zero0",
            "output_dir": str(tmp_path / name),
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        launch(path, ranks=ranks, device="cpu")
        return tmp_path / name

    filtered, plain = run("filtered", 2, STRENGTH), run("plain", 1, 0.0)
    out = tmp_path / "later"
    export_run(plain, out, merge=False, strength=STRENGTH, filter_adapter=filter_adapter)
    assert load_config(out / "es2fast.yaml").train.update_filter == STRENGTH
    assert not (out / "README.md").exists()
    found, expected, before = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (filtered / "model", out, plain / "model")
    )
    changed = {name for name in before if not torch.equal(expected[name], before[name])}
    assert changed == {name for name in before if "lora_A" in name and "down_proj" not in name}
    for name in changed:  # far nearer to each other than to what was not filtered
        gap, effect = (expected[name] - other[name] for other in (found, before))
        assert gap.norm() < 0.005 * effect.norm(), (name, gap.norm(), effect.norm())
    for name in before.keys() - changed:
        assert (found[name] - before[name]).norm() < 1e-4 * before[name].norm(), name
    kl = [json.loads((folder / "train.json").read_text())["kl"] for folder in (filtered, plain)]
    assert 0 < kl[0] < kl[1]

    for strength in (math.nan, math.inf, -1.0):
        with pytest.raises(UserError, match=r"--filter: .* is no strength"):
            export_run(plain, tmp_path / "x", merge=False, strength=strength)
    with pytest.raises(UserError, match=r"--filter: .*update_filter=2; export it without"):
        export_run(filtered, tmp_path / "x", merge=False, strength=1.0)
