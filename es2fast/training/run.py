"""One training run from configuration to finished folder, on every rank of the process group."""

from __future__ import annotations

import json

from es2fast.config import Config, save_config
from es2fast.distributed import runtime as runtimes
from es2fast.run.files import write_text
from es2fast.training.loop import TrainResult, train
from es2fast.training.plan import Plan, make_plan


def run(config: Config) -> tuple[Plan, TrainResult] | None:
    """Starts the ranks, checks, trains, and writes all of the run folder but the model card.

    Returns:
        on rank 0 what was planned and what came of it; None elsewhere.

    Raises:
        UserError: any mistake in configuration, data, model or folders.
        RunStopped: see `loop.train`.
    """
    runtime = runtimes.start(config)
    plan = make_plan(config, world_size=runtime.world_size)
    runtime.barrier()  # every rank has looked at the folder before one writes into it
    if runtime.is_main:
        plan.folder.claim()
        save_config(config, plan.folder.config)
        lines = [*plan.groups.report.lines(), *([plan.why_stage] if plan.why_stage else [])]
        print("\n".join(lines), flush=True)
    runtime.barrier()
    result = train(plan, runtime)
    if runtime.is_main:
        write_text(plan.folder.summary, json.dumps(summary(plan, result), indent=1) + "\n")
        plan.folder.drop_previous()
        print(f"saved {plan.folder.model}", flush=True)
    runtime.barrier()
    runtimes.stop()
    return (plan, result) if runtime.is_main else None


def summary(plan: Plan, result: TrainResult) -> dict[str, object]:
    """What train.json holds."""
    told = {"truncated_prompts": plan.formatter.truncated, "zero_stage": plan.zero_stage}
    return result.to_dict() | told
