"""The mean of several runs' updates: a "soup" of models (Wortsman et al. 2022, arXiv 2203.05482).

Runs that differ in their seed alone learn to refuse alike, and what else they do to a model hardly
agrees: the updates of two runs of a 0.5B model have a cosine of 0.07, yet half of each together
refuses as one does and is nearer to the base model (docs/real_models.md).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from es2fast.config import Config, load_config, save_config
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm, load_tokenizer
from es2fast.run.export import SETTINGS, is_adapter, is_bf16, save_model
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.run.identity import other_run

MEAN = "mean_of_seeds"  # in train.json of a run that is a mean


def average_runs(runs: Sequence[Path], out: Path) -> None:
    """Writes a run folder whose model is the base model with the mean of the runs' LoRA updates,
    ready for `evaluate` and `export`.

    The mean is exact but for rounding, since ranks add up: the adapter's rank is the sum of theirs.

    Args:
        runs: folders of two finished runs or more, alike but for their seeds.
        out: must hold no run.

    Raises:
        UserError: fewer than two runs; one that is not finished, holds whole weights, or was made
            in another way than the first; `out` holds a run.
    """
    if len(runs) < 2:
        raise UserError("average: one run is its own mean; name two or more")
    written = RunFolder(out)
    if written.occupied:
        raise UserError(f"average: {str(out)!r} holds a run already; choose another --out")
    folders = [RunFolder(run) for run in runs]
    for folder in folders:
        folder.check_finished("average")
    configs = [load_config(folder.config) for folder in folders]
    told = [json.loads(folder.summary.read_text()) for folder in folders]
    _check_alike(folders, configs, told)
    config = configs[0].model_copy(update={"output_dir": str(out)})
    out.mkdir(parents=True, exist_ok=True)
    _write_mean(config, [folder.model for folder in folders], written.model)
    save_config(config, written.model / SETTINGS)
    save_config(config, written.config)
    summary = told[0] | {
        "seconds": sum(one["seconds"] for one in told),
        "kl": None,  # that of none of them
        MEAN: seeds_text(one.train.seed for one in configs),
    }
    write_text(written.summary, json.dumps(summary, indent=1) + "\n")


def seeds_text(seeds: Iterable[int]) -> str:
    """How train.json names the seeds of a mean, under `MEAN`."""
    return ", ".join(map(str, seeds))


def _write_mean(config: Config, adapters: Sequence[Path], target: Path) -> None:
    from peft import PeftModel

    base = load_causal_lm(config.model, "bf16" if is_bf16(adapters[0]) else "fp32")
    names = [str(number) for number in range(len(adapters))]
    model: Any = PeftModel.from_pretrained(base, str(adapters[0]), names[0])
    for name, adapter in zip(names[1:], adapters[1:]):
        model.load_adapter(str(adapter), name)
    shares = [1 / len(names)] * len(names)
    model.base_model.add_weighted_adapter(names, shares, "default", combination_type="cat")
    with warnings.catch_warnings():  # that the active adapter is no longer there
        warnings.simplefilter("ignore")
        for name in names:
            model.delete_adapter(name)
    model.set_adapter("default")
    tokenizer = load_tokenizer(config.model.model_copy(update={"name": str(adapters[0])}))
    with torch.no_grad():
        save_model(model, tokenizer, target, main=True)


def _check_alike(
    folders: Sequence[RunFolder], configs: Sequence[Config], told: Sequence[dict[str, Any]]
) -> None:
    first = str(folders[0].path)
    seed = configs[0].train.seed
    for folder, config, summary in zip(folders, configs, told):
        name = str(folder.path)
        if not is_adapter(folder.model):
            raise UserError(
                f"average: {name!r} holds whole weights and no LoRA adapter; train with "
                "train.trainable=lora"
            )
        train = config.train.model_copy(update={"seed": seed})
        other = other_run(configs[0], config.model_copy(update={"train": train}))
        if other:
            raise UserError(
                f"average: {name!r} differs from {first!r} in {other}; only runs that are alike "
                "but for train.seed have a mean"
            )
        if summary["layers"] != told[0]["layers"]:
            raise UserError(
                f"average: {name!r} chose the layers {summary['layers']} and {first!r} "
                f"{told[0]['layers']}; train both with the same, layers={told[0]['layers']}"
            )
