"""The mean of runs' updates, against sums of whole matrices in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finished_runs import LORA_LAYERS, finished_run
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoTokenizer

from es2fast.config import ModelConfig, load_config
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm, load_merged
from es2fast.run.average import average_runs
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import read_metrics


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
    assert len(updates[0]) == 4 * len(LORA_LAYERS)
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
    told = json.loads((mean / "train.json").read_text())
    (mean / "train.json").write_text(json.dumps(told | {"mean_of_seeds": "5, 6"}))
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
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train.json").write_text('{"prompt": "a person\'s own"}')
    with pytest.raises(UserError, match=r"foreign' holds train\.json, which no run .* --out"):
        average_runs([run, deep], foreign)
    assert json.loads((foreign / "train.json").read_text()) == {"prompt": "a person's own"}
    for place in (tmp_path / "b" / "config.yaml", run / "model", base):
        with pytest.raises(UserError, match=r"is a file or a model; choose another --out"):
            average_runs([run, deep], place)


def test_damaged_runs(tmp_path: Path) -> None:
    base, out = save_tiny(tmp_path / "base"), tmp_path / "mean"
    run, other = (finished_run(tmp_path / name, base, seed) for seed, name in enumerate("ab"))
    adapter, whole = other / "model" / "adapter_model.safetensors", other / "train.json"
    weights, told = adapter.read_bytes(), whole.read_text()
    for text in ("{", "{}", "[]", json.dumps(json.loads(told) | {"d0": 3})):
        whole.write_text(text)
        with pytest.raises(UserError, match=r"train\.json: .*b/train\.json' is damaged"):
            average_runs([run, other], out)
    whole.write_text(told)
    for content in (weights[:800], weights + b"x"):
        adapter.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors' is damaged .*anew"):
            average_runs([run, other], out)
    adapter.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors' is damaged .*anew"):
        average_runs([run, other], out)
    adapter.write_bytes(weights)
    (other / "model" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="does not say of which model the adapter is"):
        average_runs([run, other], out)
    assert not (out / "model").exists()
