"""The mean of several runs' updates: a "soup" of models (Wortsman et al. 2022, arXiv 2203.05482).

Runs that differ in their seed alone learn to refuse alike, and what else they do to a model hardly
agrees: the updates of two runs of a 0.5B model have a cosine of 0.07, yet half of each together
refuses as one does and is nearer to the base model (docs/real_models.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from es2fast.config import Config, load_config, save_config
from es2fast.errors import UserError
from es2fast.modeling.adapter import ADAPTER, ADAPTER_WEIGHTS, is_adapter, read_adapter
from es2fast.modeling.load import holds_model
from es2fast.run.claim import check_ours
from es2fast.run.export import SETTINGS
from es2fast.run.files import copy_folder, remove, write_text
from es2fast.run.folder import RunFolder
from es2fast.run.identity import other_run
from es2fast.run.metrics import metrics_of_parts

MEAN = "mean_of_seeds"  # in train.json of a run that is a mean


def average_runs(runs: Sequence[Path], out: Path) -> None:
    """Writes a run folder whose model is the base model with the mean of the runs' LoRA updates,
    ready for `evaluate` and `export`.

    Args:
        runs: folders of two finished runs or more, alike but for their seeds.
        out: must hold no run.

    Raises:
        UserError: fewer than two runs; one that is not finished, holds whole weights, is a mean
            itself, is damaged, or was made in another way than the first; `out` holds a run, a
            model or files of a run's names that no run wrote, or is a file.
    """
    if len(runs) < 2:
        raise UserError("average: one run is its own mean; name two or more")
    written = RunFolder(out)
    if written.occupied:
        raise UserError(f"average: {str(out)!r} holds a run already; choose another --out")
    if out.is_file() or holds_model(out):
        raise UserError(f"average: {str(out)!r} is a file or a model; choose another --out")
    check_ours(written, f"average: {str(out)!r}", "choose another --out")
    write_mean([RunFolder(run) for run in runs], written)


def write_mean(parts: Sequence[RunFolder], written: RunFolder) -> None:
    """As `average_runs`, whatever `written` holds. The mean is exact but for rounding, since ranks
    add up: the adapter's rank is the sum of theirs. train.json, which makes a run finished, comes
    last."""
    for part in parts:
        part.check_finished("average")
    configs = [load_config(part.config) for part in parts]
    told = [part.read_summary() for part in parts]
    _check_alike(parts, configs, told)
    config = configs[0].model_copy(update={"output_dir": str(written.path)})
    written.path.mkdir(parents=True, exist_ok=True)
    partial = written.model.with_name(written.model.name + ".tmp")
    remove(partial)
    _write_adapter([part.model for part in parts], partial)
    save_config(config, partial / SETTINGS)
    remove(written.model)
    partial.rename(written.model)
    save_config(config, written.config)
    files = {one.train.seed: part.metrics for one, part in zip(configs, parts)}
    write_text(written.metrics, metrics_of_parts(files))
    write_text(written.summary, json.dumps(_summary(configs, told), indent=1) + "\n")


def seeds_text(seeds: Iterable[int]) -> str:
    """How train.json names the seeds of a mean, under `MEAN`."""
    return ", ".join(map(str, seeds))


def _write_adapter(adapters: Sequence[Path], target: Path) -> None:
    """A folder like the first one, whose update is sum_i (alpha_i / r_i) B_i A_i over their
    number."""
    read = [read_adapter(folder) for folder in adapters]
    options, tensors = [one[0] for one in read], [one[1] for one in read]
    copy_folder(adapters[0], target, "README.md", ADAPTER_WEIGHTS, SETTINGS)
    shares = [one["lora_alpha"] / one["r"] / len(adapters) for one in options]
    mean = {}
    for name, first in tensors[0].items():
        if "lora_A" in name:
            mean[name] = torch.cat([one[name] for one in tensors])
        else:
            scaled = [share * one[name].float() for share, one in zip(shares, tensors)]
            mean[name] = torch.cat(scaled, dim=1).to(first.dtype)
    save_file(mean, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    rank = sum(one["r"] for one in options)
    text = json.dumps(options[0] | {"r": rank, "lora_alpha": rank}, indent=2, sort_keys=True)
    write_text(target / ADAPTER, text + "\n")


def _summary(configs: Sequence[Config], told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """train.json of the mean: what the runs have in common, and the first one's d0, from which
    the others' differ by rounding at most."""
    common = {key: v for key, v in told[0].items() if all(one.get(key) == v for one in told)}
    return common | {
        "d0": told[0]["d0"],
        "steps": max(one["steps"] for one in told),
        "seconds": sum(one["seconds"] for one in told),
        "kl": None,  # that of none of them
        "lambda": common.get("lambda"),
        MEAN: seeds_text(config.train.seed for config in configs),
    }


def _check_alike(
    parts: Sequence[RunFolder], configs: Sequence[Config], told: Sequence[dict[str, Any]]
) -> None:
    first, one = str(parts[0].path), configs[0]
    seeds: set[int] = set()
    for part, config, summary in zip(parts, configs, told):
        name = str(part.path)
        if not is_adapter(part.model):
            raise UserError(
                f"average: {name!r} holds whole weights and no LoRA adapter; train with "
                "train.trainable=lora"
            )
        if MEAN in summary:
            raise UserError(f"average: {name!r} is a mean itself; name the runs it is made of")
        if config.train.seed in seeds:
            raise UserError(
                f"average: {name!r} has train.seed={config.train.seed} as another one has; leave "
                "it out"
            )
        seeds.add(config.train.seed)
        train = config.train.model_copy(update={"seed": one.train.seed})
        other = other_run(one, config.model_copy(update={"train": train, "layers": one.layers}))
        if other:
            raise UserError(
                f"average: {name!r} differs from {first!r} in {other}; only runs that are alike "
                "but for train.seed have a mean"
            )
        if summary["layers"] != told[0]["layers"]:
            raise UserError(
                f"average: {name!r} has the layers {summary['layers']} and {first!r} "
                f"{told[0]['layers']}; train both with the same, layers={told[0]['layers']}"
            )
        made = [one.get("made_of") or {} for one in (told[0], summary)]
        for key in made[0].keys() & made[1].keys():
            if made[0][key] != made[1][key]:
                raise UserError(
                    f"average: {name!r} was trained from another state of {key} than {first!r} "
                    f"({made[1][key]}, {made[0][key]}); train both from the same"
                )
        pairs = [one.get("pairs_per_step") for one in (told[0], summary)]
        if None not in pairs and pairs[0] != pairs[1]:
            raise UserError(
                f"average: {name!r} had {pairs[1]} pairs per step and {first!r} {pairs[0]}; train "
                "both on as many ranks"
            )
