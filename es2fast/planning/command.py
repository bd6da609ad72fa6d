"""`es2fast plan`: what a run will need and take, before any of it runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from es2fast.config import load_config
from es2fast.errors import UserError
from es2fast.run.claim import check_output, files_of
from es2fast.run.files import write_text


def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, for example train.trainable=lora", show_default=False),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="A100, H100, H200, B200 or cpu")] = "H100",
    gpus: Annotated[str, typer.Option("--gpus", help="numbers of them, 1 to 1024")] = "1,8,64",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Estimate memory, flop, time and communication of a run without loading any weights."""
    from es2fast.distributed.memory import cpu_memory
    from es2fast.planning.estimate import describe
    from es2fast.planning.machines import machine
    from es2fast.planning.screen import show
    from es2fast.training.plan import make_plan, without_machine

    counts = ranks_of(gpus)
    known = machine(gpu, cpu_memory() if gpu.lower() == "cpu" else None)
    resolved = load_config(config, overrides or ())
    check_output("--json", json_file, [config, *files_of(resolved)])
    wanted = resolved.model.dtype
    dtype = ("fp32" if known.device == "cpu" else "bf16") if wanted == "auto" else wanted
    checked = make_plan(without_machine(resolved), weights=False)
    train = checked.config.train.model_copy(update={"zero3_head": resolved.train.zero3_head})
    free = checked.config.model_copy(update={"deepspeed": resolved.deepspeed, "train": train})
    checked = dataclasses.replace(checked, config=free)
    found = describe(checked, known, dtype, counts, resolved.train.global_batch_size)
    show(found)
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")
        print(f"written: {json_file}")


def ranks_of(text: str) -> list[int]:
    """Numbers with commas between them, in order.

    Raises:
        UserError: something else, or a number outside of 1..1024.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise UserError(f"--gpus: {text!r} must be numbers from 1 to 1024, such as 1,8,64")
    return sorted({int(part) for part in parts})
