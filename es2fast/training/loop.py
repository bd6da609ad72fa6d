"""The training loop: prepare, build, step, save.

Read top to bottom, `train` is the whole run and `_Steps` its optimizer steps; one of them is in
`step`. What the safeguards decide they decide from a step's metrics, which all ranks share, so
every rank does the same.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from es2fast.config import Config, save_config
from es2fast.distributed.interrupt import StopWish
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import full_state_dict
from es2fast.errors import RunStopped
from es2fast.modeling.load import free_memory
from es2fast.modeling.taps import blocks
from es2fast.run.export import write_model
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import MetricsWriter
from es2fast.training.budget import TOLERANCE, DualAscent, scale_update
from es2fast.training.checkpoint import load
from es2fast.training.engine import build_engine
from es2fast.training.feed import Feed
from es2fast.training.plan import Plan
from es2fast.training.prepare import Prepared, cached_teacher, prepare
from es2fast.training.profiling import StepProfiler
from es2fast.training.refusals import refusal_metrics
from es2fast.training.reshard import Layout
from es2fast.training.resume import Checkpoints, Resumed
from es2fast.training.robust import SimulatedAttack
from es2fast.training.safeguards import CollapseMonitor, EarlyStop, Spikes, remedy
from es2fast.training.skipped import SkippedSteps
from es2fast.training.step import StepInputs, StepNumbers, measure_kl, step_inputs, train_step
from es2fast.training.weights import GoodWeights, TrainableWeights

MEASURED = 8  # optimizer steps' batches on which the KL of the final weights is measured


@dataclass
class TrainResult:
    """What the report and the model card say about the training.

    kl: of the final weights, nats per token; scale: of the update, below
    `train.update_scale` where `kl.budget` asked for it; trouble: why a safeguard ended the run.
    """

    steps: int
    seconds: float
    kl: float
    kl_weight: float
    prepared: Prepared
    stopped_early: bool = False
    scale: float = 1.0
    trouble: str | None = None
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "kl": self.kl,
            "lambda": self.kl_weight,
            "layers": self.prepared.layers,
            "d0": {str(k): v for k, v in self.prepared.d0.items()},
            "stopped_early": self.stopped_early,
            "update_scale": self.scale,
            "skipped_steps": self.skipped,
        }


def train(
    plan: Plan,
    runtime: Runtime,
    resumed: Resumed | None = None,
    wish: StopWish | None = None,
) -> TrainResult:
    """Trains and writes the folder's model/, metrics.jsonl and layers.json.

    Args:
        plan: the run.
        runtime: its ranks.
        resumed: the checkpoint that it goes on from.
        wish: how this rank is asked to stop; rank 0 also looks for the folder's STOP file.

    Raises:
        UserError: see `prepare`.
        RunStopped: the collapse monitor ended the run; model/ was not written, `last_good/` holds
            the last sane weights.
        RunInterrupted: a rank was asked to stop, and a checkpoint was saved.
    """
    config, folder = plan.config, plan.folder
    if resumed is None:
        prepared, harmless, texts = prepare(plan, runtime)
    else:
        prepared, harmless, texts = resumed.prepared, resumed.harmless, resumed.texts
        prepared.teacher = cached_teacher(plan, harmless, runtime)
    free_memory()  # the base model of the preparation is gone before two models are loaded
    if runtime.is_main:
        prepared.save(folder)
        print(f"layers {prepared.layers}: {prepared.reason}", flush=True)
    engine = build_engine(plan, prepared, runtime)
    feed = Feed(plan, harmless, runtime.rank, texts, prepared.teacher)
    if runtime.is_main and (left_out := feed.left_out_line):
        print(left_out, flush=True)
    done = 0 if resumed is None else resumed.step
    writer = MetricsWriter(
        folder, config, main=runtime.is_main, steps=config.train.steps, done=done
    )
    profiler = StepProfiler(config.train.profile, engine, folder, runtime.is_main)
    saver = Checkpoints(plan, runtime, prepared, harmless, texts, wish)
    if wish is not None:
        wish.stepping = True
    try:
        steps = _Steps(config, engine, prepared, feed, writer, runtime, profiler, saver, resumed)
        result, good = steps.run(), steps.good
    finally:
        profiler.close()
        writer.close()
    if result.trouble is not None:
        if good.copy is not None and good.copy.step > 0:
            good.restore()
            _save(engine, plan, folder.last_good, runtime)
        message = _stop_message(result, result.trouble, good, folder)
        if runtime.is_main:
            write_text(folder.stopped, json.dumps({"step": result.steps, "why": message}) + "\n")
        runtime.barrier()
        raise RunStopped(message)
    _save(engine, plan, folder.model, runtime)
    if runtime.is_main and result.scale < config.train.update_scale:
        print(_scaled_note(result, config), flush=True)
    runtime.barrier()
    return result


def _scaled_note(result: TrainResult, config: Config) -> str:
    budget = config.kl.budget
    assert budget is not None and result.kl is not None
    text = f"note: the update was scaled by {result.scale:.3f} to meet kl.budget={budget:g}"
    if result.kl > TOLERANCE * budget:
        return (
            f"{text}, and its KL is still {result.kl:.3g}: most of that is rounding; "
            "give a larger kl.budget"
        )
    return f"{text}; a lower train.lr keeps more of it"


def _save(engine: Any, plan: Plan, target: Path, runtime: Runtime) -> None:
    """The student's weights, and the configuration that they come from beside them; call on every
    rank."""
    student = engine.module.student
    state = full_state_dict(student, main=runtime.is_main)

    def write() -> None:
        template = plan.formatter.template if plan.config.data.chat_template else None
        write_model(student, state, plan.formatter.tokenizer, target, template=template)
        save_config(plan.config, target / "es2fast.yaml")

    runtime.long_on_main(write)  # a large model may take longer than a collective waits


def _stop_message(result: TrainResult, trouble: str, good: GoodWeights, folder: RunFolder) -> str:
    if good.copy is None:
        kept = "no weights were measured to be sane, nothing was saved"
    elif good.copy.step == 0:
        kept = "the last sane weights are the base model's, nothing was saved"
    else:
        where = f"are in {str(folder.last_good)!r}"
        kept = f"the weights of step {good.copy.step} (KL {good.copy.kl:.2g}) {where}"
    earlier = ", the earlier run is in previous/" if folder.previous.is_dir() else ""
    return (
        f"training stopped at step {result.steps}: {trouble}; {kept}; model/ was not "
        f"written{earlier}. {remedy(trouble)}"
    )


class _Over(Exception):
    """The numbers of the step before end the run."""


@dataclass(frozen=True)
class _Taken:
    """An optimizer step that was taken, whose numbers may still be on their way.

    step: from 1; kl_weight, margin, attacked: that it was taken with; lr: after it; began:
    `time.perf_counter()`; host_seconds: until all of it was on its way, which over many steps is
    what they take.
    """

    step: int
    numbers: StepNumbers
    kl_weight: float
    margin: float | None
    attacked: bool
    lr: float
    began: float
    host_seconds: float


class _Steps:
    """All optimizer steps from the first, or the one after a checkpoint, and the last look at the
    weights.

    What a step's numbers decide is decided during the forward of the next step, before that changes
    any weight: a run that ends by them ends with the weights of that step. Where they are needed at
    once, by `kl.budget` for the next step's lambda, by a checkpoint, and at the end, the host waits
    for them. On a CPU, where all of it gains nothing, it is the same, so that what runs on GPUs is
    what runs everywhere.

    Args:
        config, engine, prepared, feed: of the run.
        writer: of metrics.jsonl.
        runtime: the ranks.
        profiler, saver: told of every step, and when to save.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        config: Config,
        engine: Any,
        prepared: Prepared,
        feed: Feed,
        writer: MetricsWriter,
        runtime: Runtime,
        profiler: StepProfiler,
        saver: Checkpoints,
        resumed: Resumed | None,
    ):
        self._config, self._engine, self._prepared, self._feed = config, engine, prepared, feed
        self._writer, self._runtime = writer, runtime
        self._profiler, self._saver = profiler, saver
        self._began = time.perf_counter()
        self._dual, self._target = DualAscent(config), EarlyStop(config.train.early_stop)
        self._monitor, self._spikes = CollapseMonitor(config, runtime.world_size), Spikes()
        self._skips = SkippedSteps(runtime, feed.names)
        depth = len(blocks(engine.module.student))
        self._simulated = SimulatedAttack(config, prepared.layers, runtime, depth)
        self._weights = TrainableWeights(engine.module.student)
        self.good = GoodWeights(self._weights, config.safeguards.keep_every)
        self._scaled = config.kl.budget is not None or config.train.update_scale < 1
        self._start = self._weights.copy() if self._scaled else []
        self._parts: dict[str, Any] = {
            "dual": self._dual, "target": self._target, "monitor": self._monitor,
            "simulated": self._simulated, "good": self.good, "spikes": self._spikes,
            "skips": self._skips,
        }  # fmt: skip
        if engine.module.bank is not None:
            self._parts["bank"] = engine.module.bank
        self._step = 0  # the last one that was taken
        if resumed is not None:
            load(engine, self._parts, resumed.folder, runtime, Layout.of(resumed.about))
            self._step = resumed.step
        self._row: dict[str, Any] = {}
        self._taken: _Taken | None = None  # and not decided
        self._inputs: StepInputs | None = None  # of the next one
        self._ended = self._stopping = False
        self._trouble: str | None = None

    def run(self) -> TrainResult:
        """To the end.

        Raises:
            RunInterrupted, UserError: see `Checkpoints.save`.
        """
        while not self._ended:
            try:
                self._take()
            except _Over:
                break
            last = self._step == self._config.train.steps
            due = self._stopping or self._saver.due(self._step)
            if last or due or self._config.kl.budget is not None:
                self._decide(at_once=True)
            if not self._ended and (due or self._stopping):
                self._saver.save(
                    self._engine, self._parts, self._step, asked_to_stop=self._stopping
                )
        return self._finished()

    def _take(self) -> None:
        """The next optimizer step."""
        began, step = time.perf_counter(), self._step + 1
        if self._inputs is None:
            self._inputs = self._made_ready(step)
        attack, margin = self._simulated.for_step(step), margin_at(self._config, step)
        weight = self._dual.weight

        def meanwhile() -> StepInputs | None:
            self._decide()
            if self._ended:
                raise _Over
            following = self._made_ready(step + 1) if step < self._config.train.steps else None
            self.good.before_step(step)  # where it copies weights the host waits for a GPU
            return following

        numbers, self._inputs = train_step(
            self._engine,
            self._inputs,
            weight,
            self._runtime,
            attack,
            self._simulated.observe,
            margin,
            self._saver.asked_to_stop,
            partial(self._skips.add, step - 1),
            meanwhile,
        )
        self._step = step
        self._profiler.step()
        self._taken = _Taken(
            step,
            numbers,
            weight,
            margin,
            attack is not None,
            lr=float(self._engine.get_lr()[0]),
            began=began,
            host_seconds=time.perf_counter() - began,
        )

    def _made_ready(self, step: int) -> StepInputs:
        """The rows of optimizer step `step`, from 1."""
        batches, where = self._feed(step - 1), self._simulated.where(step)
        return step_inputs(self._engine, batches, self._runtime.device, where)

    def _decide(self, at_once: bool = False) -> None:
        """What the numbers of the step that was taken last say, once they are there."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        config, step = self._config, taken.step
        sums = taken.numbers.wait()
        seconds = time.perf_counter() - taken.began if at_once else taken.host_seconds
        row = self._row = _row(taken, sums, seconds, self._prepared, config)
        if config.separation.robust.probability:
            row["attacked"] = float(taken.attacked)
        row |= {"skipped": sums["skipped"], "spike": float(self._spikes.flag(row))}
        self._trouble = self._monitor.verdict(row)
        if self._trouble is not None and row["skipped"]:
            self._trouble = f"{self._trouble}; {self._skips.words()}"
        self.good.measured(self._monitor.sane(row), row["kl"])
        full = taken.margin == config.separation.margin
        met = self._target.reached(row, self._prepared.layers, full)
        self._ended = self._trouble is not None or met or step == config.train.steps
        self._stopping = self._stopping or sums["stop"] > 0
        if self._ended or step % config.train.log_every == 0:
            self._writer.log(row)
        self._writer.tick(row)
        if not row["skipped"]:
            self._dual.update(row["kl"])

    def _finished(self) -> TrainResult:
        config, engine, runtime, step = self._config, self._engine, self._runtime, self._step
        scale, kl, trouble = 1.0, self._row["kl"], self._trouble
        if trouble is None:
            batches = [self._feed(step + i) for i in range(min(config.train.steps, MEASURED))]
            kl = measure_kl(engine, batches, runtime)
            if config.train.update_filter:
                engine.eval()
                engine.module.taps.disarm()
                self._feed.filter(engine.module.student, runtime)
                learned, kl = kl, measure_kl(engine, batches, runtime)
                if runtime.is_main:
                    words = f"KL {learned:.3g} -> {kl:.3g} nats per token"
                    print(f"update filter: {words}", flush=True)
            trouble = self._monitor.final(kl)
            if trouble is None and self._scaled:
                scale, kl = scale_update(
                    self._weights,
                    self._start,
                    kl,
                    lambda: measure_kl(engine, batches, runtime),
                    scale=config.train.update_scale,
                    budget=config.kl.budget,
                )
        return TrainResult(
            steps=step,
            seconds=time.perf_counter() - self._began,
            kl=kl,
            kl_weight=self._row["kl_weight"],
            prepared=self._prepared,
            stopped_early=step < config.train.steps,
            scale=scale,
            trouble=trouble,
            skipped=self._skips.count,
        )


def margin_at(config: Config, step: int) -> float | None:
    """The margin of optimizer step `step`, from 1, in units of d0; None without a target.

    With `separation.ramp` = r it grows linearly from 1, where the base model is, over the first
    r * steps steps: a hinge that is far from its target pushes at full strength, and what the
    optimizer has gathered by then carries it beyond.
    """
    section = config.separation
    if section.margin is None or not section.ramp:
        return section.margin
    share = step / (section.ramp * config.train.steps)
    return section.margin if share >= 1 else 1.0 + share * (section.margin - 1.0)


def _row(
    taken: _Taken, sums: dict[str, float], seconds: float, prepared: Prepared, config: Config
) -> dict[str, Any]:
    kl = sums["kl_sum"] / sums["kl_tokens"]
    refusal = refusal_metrics(sums)
    row: dict[str, Any] = {
        "step": taken.step,
        "loss": config.separation.weight * sums["sep"]
        + taken.kl_weight * kl
        + config.refusal.weight * refusal.get("refusal", 0.0)
        + sums.get("norm_band", 0.0),
        "sep": sums["sep"],
        "kl": kl,
        "kl_weight": taken.kl_weight,
        **refusal,
    }
    for layer in prepared.layers:
        row[f"sep/{layer}"] = sums[f"sep/{layer}"]
        row[f"distance/{layer}"] = sums[f"distance/{layer}"]
        row[f"distance_over_base/{layer}"] = sums[f"distance/{layer}"] / prepared.d0[layer]
        row[f"norm_ratio/{layer}"] = sums[f"norm/{layer}"] / prepared.norm0[layer]
        if f"norm_out/{layer}" in sums:
            row[f"norm_out/{layer}"] = sums[f"norm_out/{layer}"]
    if "norm_band" in sums:
        row["norm_band"] = sums["norm_band"]
    return row | {
        "grad_norm": sums["grad_norm"],
        "lr": taken.lr,
        "step_seconds": seconds,
        "samples_per_second": sums["rows"] / seconds,
        "tokens_per_second": sums["tokens"] / seconds,
        "padding": 1.0 - sums["computed"] / sums["places"],
        "shared": 1.0 - sums["computed"] / sums["tokens"],
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """Highest allocated GPU bytes of this rank; resident set of the process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
