"""The cluster entry: `deepspeed --module es2fast.train --config run.yaml train.lr=1e-4 ...`.

Every rank runs this. A user's mistake is printed once, by rank 0, as one line; the exit code is 2.
A run that a safeguard stops ends in the same way with code 3, and without model/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from es2fast.config import Config, load_config, save_config
from es2fast.errors import RunStopped, UserError
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder

if TYPE_CHECKING:
    from es2fast.data import Formatter, PromptGroups
    from es2fast.training.loop import TrainResult


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
    from es2fast.training.loop import train
    from es2fast.training.plan import validate

    runtime = runtimes.start(config)
    validate(config, world_size=runtime.world_size)
    runtime.barrier()  # every rank has looked at the folder before one writes into it
    folder = RunFolder(config.output_dir)
    groups = load_groups(config.data)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    if runtime.is_main:
        folder.claim()
        save_config(config, folder.config)
        print("\n".join(groups.report.lines()), flush=True)
    runtime.barrier()
    result = train(config, formatter, groups, runtime)
    if runtime.is_main:
        _finish(config, result, groups, formatter)
        print(f"saved {folder.model}", flush=True)
    runtime.barrier()
    runtimes.stop()


def _finish(
    config: Config, result: TrainResult, groups: PromptGroups, formatter: Formatter
) -> None:
    """Rank 0's last files: train.json and the model card."""
    from es2fast.report.model_card import write_model_card

    folder = RunFolder(config.output_dir)
    summary = result.to_dict() | {"truncated_prompts": formatter.truncated}
    write_text(folder.summary, json.dumps(summary, indent=1) + "\n")
    write_model_card(
        folder.model,
        config=config,
        report=None,
        base_model=config.model.name,
        layers=result.prepared.layers,
        d0=result.prepared.d0,
        data_summary=groups.report.lines(),
        train=summary,
    )
    folder.drop_previous()


if __name__ == "__main__":
    sys.exit(main())
