"""Whether a checkpoint is of the run that is to go on.

The run is the same when every optimizer step has the rows that it would have had: what is drawn
follows from (seed, step) and the number of pairs per step, micro_batch_size x ranks x
gradient_accumulation. How these three share it, and which ZeRO stage the ranks use, may change.
Embeddings are paired within a micro-batch of all ranks, though, so while its size stays the weights
are those of an undisturbed run to rounding; with another size the loss averages over other pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from es2fast.data import model_fingerprint
from es2fast.errors import UserError
from es2fast.training.plan import Plan
from es2fast.training.reshard import Layout

_REMEDY = "set train.overwrite=true or choose another output_dir"


NAMES = {
    "model": "the weights of model.name",
    "data": "the prompts in data",
    "template": "the chat template or the tokenizer",
    "dtype": "model.dtype",
}


def identity_of(plan: Plan) -> dict[str, Any]:
    """What a checkpoint says of its run, beside the configuration."""
    return _sharing(plan) | made_of(plan)


def made_of(plan: Plan) -> dict[str, Any]:
    """What a run is made of, beside the configuration, by the keys of `NAMES`."""
    rows = [
        [prompt.messages, prompt.response]
        for prompt in [*plan.groups.harmful, *plan.groups.harmless]
    ]
    model = plan.config.model
    return {
        "dtype": plan.dtype,
        "model": model_fingerprint(model.name, model.revision),
        "template": plan.formatter.template_hash,
        "data": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
    }


def _sharing(plan: Plan) -> dict[str, Any]:
    """How a step's pairs and the optimizer's states are shared among ranks."""
    train = plan.config.train
    return {
        "ranks": plan.world_size,
        "zero_stage": plan.zero_stage,
        "micro_batch_size": train.micro_batch_size,
        "gradient_accumulation": train.gradient_accumulation,
    }


def check_same_run(manifest: Mapping[str, Any], plan: Plan) -> None:
    """UserError where the plan is not the run that wrote a checkpoint, naming what differs."""
    now = identity_of(plan)
    manifest = now | dict(manifest)  # those of earlier versions hold less
    for key, words in NAMES.items():
        if manifest[key] != now[key]:
            short = f" ({manifest[key]} there, {now[key]} now)" if key == "dtype" else ""
            raise UserError(
                f"checkpoint.resume: the run was started with another state of {words}{short}; "
                f"go back to that, {_REMEDY}"
            )
    _check_rows(manifest, now, by_length=plan.config.train.length_window > 1)
    if Layout.of(manifest) != Layout.of(now):
        _check_convertible(manifest, plan)


def changes(manifest: Mapping[str, Any], plan: Plan) -> str:
    """What is not as it was when the checkpoint was written, for the screen; empty: nothing."""
    now = _sharing(plan)
    manifest = now | dict(manifest)
    before, after = Layout.of(manifest), Layout.of(now)
    words = "" if before == after else f", written by {before}, goes on with {after}"
    if _paired(manifest) != _paired(now):
        words += (
            f"; {_paired(now)} pairs of prompts meet in a micro-batch, {_paired(manifest)} before: "
            "the separation averages over other pairs from here on"
        )
    return words


def _paired(about: Mapping[str, Any]) -> int:
    """Pairs of prompts per micro-batch of all ranks."""
    return int(about["micro_batch_size"] * about["ranks"])


def _check_rows(then: Mapping[str, Any], now: Mapping[str, Any], *, by_length: bool) -> None:
    before, after = (_paired(about) * about["gradient_accumulation"] for about in (then, now))
    regrouped = by_length and _paired(then) != _paired(now)  # micro-batches are made of like rows
    if before == after and not regrouped:
        return
    ranks, micro = now["ranks"], now["micro_batch_size"]
    what = (
        f"train.global_batch_size: train.micro_batch_size {micro} x train.gradient_accumulation "
        f"{now['gradient_accumulation']} x {ranks} ranks = {after} pairs per step"
    )
    if regrouped:
        what += f", {_paired(now)} per micro-batch"
    there = f"{before}" + (f", {_paired(then)} per micro-batch" if regrouped else "")
    raise UserError(
        f"{what}, but the unfinished run has {there}; {_keeping(then, ranks, by_length)}"
    )


def _keeping(then: Mapping[str, Any], ranks: int, by_length: bool) -> str:
    """Values that continue the run on so many ranks, in words."""
    paired, accumulation = _paired(then), then["gradient_accumulation"]
    total = paired * accumulation
    if paired % ranks == 0:
        micro = paired // ranks
    elif total % ranks == 0 and not by_length:
        micro = next(m for m in range(max(1, paired // ranks), 0, -1) if total // ranks % m == 0)
    else:
        whole = paired if by_length else total
        return f"continue with a number of ranks that divides {whole}, {_REMEDY}"
    return (
        f"on {ranks} ranks train.micro_batch_size={micro} and train.gradient_accumulation="
        f"{total // ranks // micro} continue it"
    )


def _check_convertible(manifest: Mapping[str, Any], plan: Plan) -> None:
    """UserError where the optimizer's states are others than those of es2fast's own AdamW."""
    zero = plan.deepspeed.get("zero_optimization", {})
    disk = (zero.get("offload_optimizer") or {}).get("device") == "nvme"
    for wrong, field in (
        ("optimizer" in plan.deepspeed, "deepspeed.optimizer"),
        (disk, "deepspeed.zero_optimization.offload_optimizer"),
    ):
        if wrong:
            raise UserError(
                f"{field}: its states cannot be converted for {Layout.of(_sharing(plan))}; "
                f"go back to {Layout.of(manifest)}, {_REMEDY}"
            )
