"""The mean of runs' updates, against sums of whole matrices in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoTokenizer

from es2fast.config import ModelConfig, load_config, parse_config, save_config
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm, load_merged
from es2fast.run.average import average_runs
from es2fast.run.export import save_model
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import read_metrics

LAYERS = ["q_proj", "down_proj"]


def finished_run(path: Path, base: Path, seed: int, layers: int = 2, **options: Any) -> Path:
    """A run folder as a training leaves it, with a random adapter."""
    folder = RunFolder(path)
    path.mkdir()
    lora = LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": LAYERS} | options))
    model = get_peft_model(load_causal_lm(ModelConfig(name=str(base)), "fp32"), lora)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        save_model(model, AutoTokenizer.from_pretrained(base), folder.model, main=True)
    raw = {"model": {"name": str(base)}, "train": {"seed": seed}, "output_dir": str(path)}
    save_config(parse_config(raw), folder.config)
    told = {
        "steps": 9,
        "seconds": 1.5,
        "kl": 0.1,
        "lambda": 10.0,
        "layers": [layers],
        "d0": {"2": 4 + 1e-12 * seed},
    }
    folder.summary.write_text(json.dumps(told))
    rows = [{"step": step, "kl": seed * 0.1 + step} for step in (2, 1)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert folder.finished
    return path


def update(run: Path, scale: float) -> dict[str, torch.Tensor]:
    """B A times `scale` of each layer, by its weight's name, fp64."""
    tensors = load_file(run / "model" / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): scale
        * (tensors[name.replace("lora_A", "lora_B")].double() @ weight.double())
        for name, weight in tensors.items()
        if "lora_A" in name
    }


def test_the_mean_of_three_runs(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    runs = [
        finished_run(tmp_path / "a", base, 1),
        finished_run(tmp_path / "b", base, 2, r=4, lora_alpha=4),
        finished_run(tmp_path / "c", base, 3),
    ]
    mean = RunFolder(tmp_path / "deep" / "mean")
    average_runs(runs, mean.path)
    assert mean.finished and load_config(mean.config).output_dir == str(mean.path)
    told = json.loads(mean.summary.read_text())
    assert told == {"steps": 9, "seconds": 4.5, "kl": None, "lambda": 10.0, "layers": [2],
                    "d0": {"2": 4 + 1e-12}, "mean_of_seeds": "1, 2, 3"}  # fmt: skip
    told = [(row["seed"], row["step"], row["kl"]) for row in read_metrics(mean.metrics)]
    assert told == [(s, step, s * 0.1 + step) for step in (1, 2) for s in (1, 2, 3)]
    assert json.loads((mean.model / "adapter_config.json").read_text())["r"] == 8
    found = dict(load_merged(ModelConfig(name=str(mean.model)), "fp32").named_parameters())
    plain = dict(load_causal_lm(ModelConfig(name=str(base)), "fp32").named_parameters())
    updates = [update(run, scale) for run, scale in zip(runs, (3, 1, 3))]
    assert len(updates[0]) == 4 * len(LAYERS)
    for name, before in plain.items():
        moved = sum(one[name] for one in updates) / 3 if name in updates[0] else 0.0
        torch.testing.assert_close(found[name].double(), before.double() + moved, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(mean.model)("break a cup")["input_ids"]


def test_what_has_no_mean(tmp_path: Path) -> None:
    base, out = save_tiny(tmp_path / "base"), tmp_path / "mean"
    run = finished_run(tmp_path / "a", base, 1)
    other = finished_run(tmp_path / "b", save_tiny(tmp_path / "base2"), 2)
    deep = finished_run(tmp_path / "c", base, 3, layers=3)
    whole = finished_run(tmp_path / "d", base, 4)
    (whole / "model" / "adapter_config.json").unlink()
    wide = finished_run(tmp_path / "f", base, 6)
    for one, pairs in ((run, 4), (wide, 8)):
        told = json.loads((one / "train.json").read_text())
        (one / "train.json").write_text(json.dumps(told | {"pairs_per_step": pairs}))
    mean = finished_run(tmp_path / "e", base, 5)
    (mean / "train.json").write_text(json.dumps({"layers": [2], "mean_of_seeds": "5, 6"}))
    cases = [
        ([run], "one run is its own mean; name two or more"),
        ([run, tmp_path / "none"], "none' holds no finished run; train it first"),
        ([run, whole], "d' holds whole weights and no LoRA adapter; train with"),
        ([run, other], "b' differs from .*a' in model.name; only runs that are alike but for"),
        ([run, run], r"a' has train\.seed=1 as another one has; leave it out"),
        ([run, mean], r"e' is a mean itself; name the runs it is made of"),
        ([run, deep], r"c' has the layers \[3\] and .*a' \[2\]; train both with the same"),
        ([run, wide], "f' had 8 pairs per step and .*a' 4; train both on as many ranks"),
    ]
    for runs, words in cases:
        with pytest.raises(UserError, match=words):
            average_runs(runs, out)
        assert not out.exists()
    with pytest.raises(UserError, match=r"a' holds a run already; choose another --out"):
        average_runs([run, deep], run)
    for place in (tmp_path / "b" / "config.yaml", run / "model"):
        with pytest.raises(UserError, match=r"is a file or a model; choose another --out"):
            average_runs([run, deep], place)
