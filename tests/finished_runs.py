"""Run folders as a training leaves them, made without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from es2fast.config import ModelConfig, parse_config, save_config
from es2fast.modeling.load import load_causal_lm
from es2fast.run.export import SETTINGS, save_model
from es2fast.run.folder import RunFolder

LORA_LAYERS = ["q_proj", "down_proj"]


def finished_run(path: Path, base: Path, seed: int, layers: int = 2, **options: Any) -> Path:
    """A run folder as a training leaves it, with a random adapter."""
    folder = RunFolder(path)
    path.mkdir()
    lora = LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": LORA_LAYERS} | options))
    model = get_peft_model(load_causal_lm(ModelConfig(name=str(base)), "fp32"), lora)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        save_model(model, AutoTokenizer.from_pretrained(base), folder.model, main=True)
    raw = {"model": {"name": str(base)}, "train": {"seed": seed}, "output_dir": str(path)}
    for place in (folder.config, folder.model / SETTINGS):
        save_config(parse_config(raw), place)
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
