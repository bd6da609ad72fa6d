"""One training run from configuration to finished folder, on every rank of the process group."""

from __future__ import annotations

import json
from contextlib import ExitStack

from es2fast.config import Config, save_config
from es2fast.distributed import runtime as runtimes
from es2fast.distributed.interrupt import StopWish
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.compiled import check_compiler
from es2fast.run.claim import Lock, check_claim
from es2fast.run.files import write_text
from es2fast.run.metrics import cut_metrics
from es2fast.training.agreement import check_agreement
from es2fast.training.loop import TrainResult, train
from es2fast.training.plan import Plan, make_plan
from es2fast.training.resume import Resumed, find
from es2fast.training.same_run import made_of


def run(config: Config, wish: StopWish | None = None) -> tuple[Plan, TrainResult] | None:
    """Starts the ranks, checks, trains, and writes all of the run folder but the model card. An
    unfinished run of this configuration is continued, see `checkpoint.resume`.

    Args:
        config: the run.
        wish: how this process is asked to stop, beside the folder's STOP file.

    Returns:
        on rank 0 what was planned and what came of it; None elsewhere.

    Raises:
        UserError: any mistake in configuration, data, model or folders.
        RunStopped, RunInterrupted: see `loop.train`.
    """
    runtime = runtimes.start(config)
    finished = run_on(runtime, config, wish)
    runtimes.stop()
    return finished


def run_on(
    runtime: Runtime, config: Config, wish: StopWish | None = None
) -> tuple[Plan, TrainResult] | None:
    """`run` on ranks that have been started, and stay; call on every rank."""
    plan = make_plan(config, world_size=runtime.world_size)
    check_agreement(plan, runtime)
    if config.train.compile:
        check_compiler(runtime.device)
    runtime.barrier()  # every rank has looked at the folder before one writes into it
    with ExitStack() as stack:
        resumed = _enter(plan, runtime, stack)
        result = _trained(plan, runtime, resumed, wish)
    return (plan, result) if runtime.is_main else None


def _trained(
    plan: Plan, runtime: Runtime, resumed: Resumed | None, wish: StopWish | None
) -> TrainResult:
    if runtime.is_main:
        chosen = [line for line in (plan.dtype_line, plan.why_stage) if line]
        print("\n".join([*plan.groups.report.lines(), *chosen]), flush=True)
    runtime.barrier()
    result = train(plan, runtime, resumed, wish)
    if runtime.is_main:
        write_text(plan.folder.summary, json.dumps(summary(plan, result), indent=1) + "\n")
        plan.folder.drop_previous()
        print(f"saved {plan.folder.model}", flush=True)
    runtime.barrier()
    return result


def _enter(plan: Plan, runtime: Runtime, stack: ExitStack) -> Resumed | None:
    """The checkpoint that the run goes on from; rank 0 locks the folder until the stack ends.

    Raises:
        UserError: another run has it.
    """

    def enter() -> bool:
        stack.callback(Lock(plan.folder).release)
        return check_claim(plan.folder, plan.config)  # now that nobody else changes it

    goes_on = runtime.on_main(enter)
    resumed = find(plan, runtime) if goes_on else None
    if runtime.is_main:
        if resumed is None:
            plan.folder.claim()
            save_config(plan.config, plan.folder.config)
        else:
            cut_metrics(plan.folder.metrics, resumed.step)
            save_config(plan.config, plan.folder.config)  # the batch may be shared otherwise
            where = f"from {resumed.folder}{resumed.changes}"
            print(f"continues after step {resumed.step} {where}", flush=True)
    runtime.barrier()
    return resumed


def summary(plan: Plan, result: TrainResult) -> dict[str, object]:
    """What train.json holds."""
    told = {
        "truncated_prompts": plan.formatter.truncated,
        "zero_stage": plan.zero_stage,
        "pairs_per_step": plan.deepspeed["train_batch_size"],
        "made_of": made_of(plan),
    }
    return result.to_dict() | told
