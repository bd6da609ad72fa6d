"""The cluster entry: `deepspeed --module es2fast.train --config run.yaml train.lr=1e-4 ...`.

Every rank runs this. A user's mistake is one line and exit code 2, a run that a safeguard stops one
line and code 3 (and no model/), one that was asked to stop one line and code 0, anything else a
traceback and code 1; who says it, see `distributed.failures`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from es2fast.config import Config, load_config
from es2fast.distributed.failures import report
from es2fast.distributed.interrupt import StopWish, die_with_launcher
from es2fast.distributed.runtime import let_go, stop
from es2fast.errors import STOPPED, RunInterrupted, RunStopped, UserError

if TYPE_CHECKING:
    from es2fast.training.loop import TrainResult
    from es2fast.training.plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and trains; returns the exit code."""
    parser = argparse.ArgumentParser(prog="es2fast.train", description=__doc__)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", help="key=value, for example train.lr=1e-4")
    parsed = parser.parse_intermixed_args(arguments)
    wish = StopWish()
    if threading.current_thread() is threading.main_thread():
        wish.listen()
    if parsed.local_rank is not None:
        die_with_launcher()
        os.environ.setdefault("LOCAL_RANK", str(parsed.local_rank))
    try:
        _run(load_config(parsed.config, parsed.overrides), wish)
    except RunInterrupted as note:
        if os.environ.get("RANK", "0") == "0":
            print(note, flush=True)
        stop()  # every rank is here
    except RunStopped as error:
        report(error)
        stop()  # every rank is here
        return STOPPED
    except Exception as error:
        report(error)
        let_go()  # not every rank may be here
        return 2 if isinstance(error, UserError) else 1
    return 0


def _run(config: Config, wish: StopWish) -> None:
    from es2fast.training.run import run

    finished = run(config, wish)
    if finished is not None:
        _write_card(*finished)


def _write_card(plan: Plan, result: TrainResult) -> None:
    """The finished model's README.md."""
    from es2fast.report.model_card import public_source, write_model_card
    from es2fast.training.run import summary

    write_model_card(
        plan.folder.model,
        config=plan.config,
        report=None,
        base_model=plan.config.model.name,
        layers=result.prepared.layers,
        d0=result.prepared.d0,
        data_summary=plan.groups.report.lines(public_source, prompts=False),
        train=summary(plan, result),
    )


if __name__ == "__main__":
    sys.exit(main())
