"""`es2fast demo`: the whole of es2fast on a small model, on any machine.

Builds the toy (once), trains ES2 on it through the real deepspeed launcher with ZeRO-3, attacks
the model before and after, and prints one table. Whatever is there already is used again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from es2fast.config import Config, parse_config, save_config
from es2fast.demo.toy import build_toy
from es2fast.distributed.launch import launch_to_end
from es2fast.errors import UserError
from es2fast.evaluation.run import evaluate_run
from es2fast.report.schema import Report, read_report
from es2fast.report.table import print_table
from es2fast.run.folder import RunFolder

SETTINGS: dict[str, Any] = {
    "layers": [0, 4],  # named: what docs/separation.md and docs/demo.md were measured with
    "separation": {"loss": "hinge", "margin": 6.0},
    "kl": {"weight": 10.0},
    "train": {"steps": 80, "micro_batch_size": 4, "lr": 3e-4},
    "deepspeed": "zero3",
    "evaluate": {
        "attacks": [  # without their sweeps, which would take as long as the rest of the demo
            "direct",
            {"name": "scav", "strengths": [1e-4], "blocks": ["all"], "repetition_penalty": 1.0},
            {"name": "mean_difference", "strengths": [1.0], "repetition_penalty": 1.0},
        ],
        "max_new_tokens": 32,
        "batch_size": 50,
        "attack_steps": "prompt",
    },
}


def run_demo(out: Path, *, seed: int = 0, steps: int | None = None, device: str = "auto") -> Report:
    """Runs the demo into `out` and returns its report.

    Args:
        out: folder of the run; the toy goes to `out/toy`.
        seed: of the toy and of the training.
        steps: optimizer steps, to override the demo's own number.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: `out` holds some other run.
    """
    _claim(out)
    toy = build_toy(out / "toy", seed=seed)
    config = demo_config(out, toy, seed=seed, steps=steps, device=device)
    if not _trained(out, config):
        path = out / "demo.yaml"
        save_config(config, path)
        launch_to_end(path, RunFolder(out), device=device)
    folder = RunFolder(out)
    if not folder.report.is_file():
        evaluate_run(out)
    report = read_report(folder.report)
    print_table(report)
    print(f"report: {folder.page}   model: {folder.model}")
    return report


def demo_config(
    out: Path, toy: Path, *, seed: int, steps: int | None = None, device: str = "auto"
) -> Config:
    """The demo's run as an ordinary configuration."""
    raw = json.loads(json.dumps(SETTINGS))
    raw["model"] = {"name": str(toy / "model")}
    names = ("harmful", "harmless", "eval_harmful", "eval_harmless")
    raw["data"] = {name: str(toy / "data" / f"{name}.jsonl") for name in names}
    raw["train"] |= {"seed": seed, "device": device, "overwrite": True}
    if steps is not None:
        raw["train"]["steps"] = steps
    raw["output_dir"] = str(out)
    return parse_config(raw)


def _trained(out: Path, config: Config) -> bool:
    """`out` holds the finished training of exactly this configuration and toy."""
    folder, weights = RunFolder(out), out / "toy" / "model" / "model.safetensors"
    if not folder.finished or not folder.config.is_file():
        return False
    if weights.stat().st_mtime > folder.summary.stat().st_mtime:
        return False
    return yaml.safe_load(folder.config.read_text()) == config.model_dump(mode="json")


def _claim(out: Path) -> None:
    """A demo replaces a demo, and nothing else."""
    if RunFolder(out).occupied and not (out / "demo.yaml").is_file():
        raise UserError(f"--out: {str(out)!r} holds another run; choose another folder")
