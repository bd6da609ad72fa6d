"""Base against tuned: both models of a finished run under the same, refitted attacks.

Probes and means are fitted on training prompts and on the model under attack; every rate is
measured on held-out prompts. Runs in one process on one device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from es2fast.config import Config, load_config
from es2fast.data import Formatter, Prompt, PromptGroups, load_groups
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.evaluation.measure import evaluate_model
from es2fast.modeling.load import load_causal_lm, load_tokenizer
from es2fast.modeling.states import last_token_states
from es2fast.report.html import write_report
from es2fast.report.model_card import write_model_card


def evaluate_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Attacks the base and the tuned model of `run`; writes report.json and report.html there.

    Args:
        run: folder that `train` wrote.
        overrides: `key=value` changes to the run's saved configuration, e.g. evaluate.limit=50.

    Returns:
        the report (see `es2fast.report.schema`).

    Raises:
        UserError: no finished run there; no held-out prompts.
    """
    if not (run / "model").is_dir() or not (run / "train.json").is_file():
        raise UserError(f"evaluate: {str(run)!r} holds no finished run; train it first")
    config = load_config(run / "config.yaml", overrides)
    summary = json.loads((run / "train.json").read_text())
    layers = [int(layer) for layer in summary["layers"]]
    groups = load_groups(config.data)
    _check_held_out(groups)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    device = torch.device(resolve_device(config.train.device))
    dtype = resolve_dtype(config.model.dtype, device.type)
    base = load_causal_lm(config.model, dtype).to(device).eval()
    trained = config.model.model_copy(update={"name": str(run / "model"), "revision": None})
    tuned = load_causal_lm(trained, dtype).to(device).eval()
    prompts = _prompts(config, groups)
    settings: dict[str, Any] = {**prompts, "layers": layers, "config": config.evaluate}
    before = evaluate_model(base, formatter, base=None, **settings)
    after = evaluate_model(
        tuned, formatter, base=base, base_separation=before["separation"], **settings
    )
    report = {"base": before, "tuned": after, "train": summary}
    states: dict[str, Any] = {}
    for name, model in (("base", base), ("tuned", tuned)):
        for group in ("harmful", "harmless"):
            states[f"{name}_{group}"] = _states(model, formatter, prompts[group], layers[-1])
    np.savez_compressed(run / "states.npz", **states)
    write_report(run, report, states=states, config=config)
    write_model_card(
        run / "model",
        config=config,
        report=report,
        base_model=config.model.name,
        layers=layers,
        d0={int(layer): d0 for layer, d0 in summary["d0"].items()},
        data_summary=groups.report.lines(),
        train=summary,
    )
    return report


def _check_held_out(groups: PromptGroups) -> None:
    for name in ("eval_harmful", "eval_harmless"):
        if not getattr(groups, name):
            raise UserError(
                f"data.{name}: no held-out prompts; name a source that training did not see"
            )


def _prompts(config: Config, groups: PromptGroups) -> dict[str, list[Prompt]]:
    limit, fit = config.evaluate.limit, config.evaluate.fit_limit
    return {
        "harmful": groups.eval_harmful[:limit],
        "harmless": groups.eval_harmless[:limit],
        "fit_harmful": groups.harmful[:fit],
        "fit_harmless": groups.harmless[:fit],
    }


def _states(
    model: nn.Module, formatter: Formatter, prompts: Sequence[Prompt], layer: int
) -> np.ndarray:
    """(n, H) fp32 last-prompt-token states at one block."""
    return last_token_states(model, formatter.prompt_batches(prompts, 32), [layer])[layer].numpy()
