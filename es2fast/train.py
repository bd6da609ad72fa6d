"""The cluster entry: `deepspeed --module es2fast.train --config run.yaml train.lr=1e-4 ...`.

Every rank runs this. A user's mistake is printed once, by rank 0, as one line; the exit code is 2.
A run that a safeguard stops ends in the same way with code 3, and without model/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from es2fast.config import Config, load_config, save_config
from es2fast.errors import RunStopped, UserError

if TYPE_CHECKING:
    from es2fast.data import Formatter, PromptGroups
    from es2fast.training.engine import TrainResult

RUN_FILES = ("config.yaml", "metrics.jsonl", "layers.json", "model", "report.json", "report.html",
             "states.npz", "train.json", "tensorboard", "last_good",
             "whitening.safetensors")  # fmt: skip
PREVIOUS = "previous"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and trains; returns the exit code."""
    parser = argparse.ArgumentParser(prog="es2fast.train", description=__doc__)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", help="key=value, for example train.lr=1e-4")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(parsed.local_rank))
    try:
        run(load_config(parsed.config, parsed.overrides))
    except RunStopped as error:
        _report(error)
        _leave_together()
        return 3
    except UserError as error:
        _report(error)
        return 2
    return 0


def _report(error: UserError) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)


def _leave_together() -> None:
    """The launcher kills the other ranks when one has left: not before rank 0 has spoken."""
    import torch.distributed as dist

    from es2fast.distributed.runtime import stop

    if dist.is_initialized():
        dist.barrier()
    stop()


def run(config: Config) -> None:
    """One training run on every rank of the process group.

    Raises:
        UserError: any mistake in configuration, data, model or folders.
    """
    from es2fast.data import Formatter, load_groups
    from es2fast.distributed import runtime as runtimes
    from es2fast.modeling.load import load_tokenizer
    from es2fast.training.engine import train
    from es2fast.training.plan import validate

    runtime = runtimes.start(config)
    validate(config, world_size=runtime.world_size)
    runtime.barrier()  # every rank has looked at the folder before one writes into it
    folder = Path(config.output_dir)
    groups = load_groups(config.data)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    if runtime.is_main:
        clear_run(folder)
        save_config(config, folder / "config.yaml")
        print("\n".join(groups.report.lines()), flush=True)
    runtime.barrier()
    result = train(config, formatter, groups, runtime)
    if runtime.is_main:
        _finish(config, result, groups, formatter)
        print(f"saved {folder / 'model'}", flush=True)
    runtime.barrier()
    runtimes.stop()


def _finish(
    config: Config, result: TrainResult, groups: PromptGroups, formatter: Formatter
) -> None:
    """Rank 0's last files: train.json and the model card."""
    from es2fast.report.model_card import write_model_card

    folder = Path(config.output_dir)
    summary = result.to_dict() | {"truncated_prompts": formatter.truncated}
    (folder / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_model_card(
        folder / "model",
        config=config,
        report=None,
        base_model=config.model.name,
        layers=result.prepared.layers,
        d0=result.prepared.d0,
        data_summary=groups.report.lines(),
        train=summary,
    )
    drop_previous(folder)


def run_in(folder: Path) -> bool:
    """The folder already holds a run."""
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "model"))


def occupied(folder: Path) -> str:
    """What to tell a user whose output folder holds another run."""
    return (
        f"output_dir: {str(folder)!r} already holds a run; choose another output_dir or set "
        "train.overwrite=true"
    )


def clear_run(folder: Path) -> None:
    """Makes room for a run. A finished model is set aside with its files, in `previous/`, until the
    new run has one of its own (`drop_previous`); of a run without a model nothing is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not (folder / "model").is_dir():
        for path in found:
            _remove(path)
        return
    _remove(folder / PREVIOUS)
    (folder / PREVIOUS).mkdir()
    for path in found:
        path.rename(folder / PREVIOUS / path.name)


def drop_previous(folder: Path) -> None:
    """Removes the earlier run that `clear_run` set aside."""
    _remove(folder / PREVIOUS)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
