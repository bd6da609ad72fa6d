"""The training loop: prepare, build, step, save.

Read top to bottom, `train` is the whole run; a step is in `step`. What the safeguards decide they
decide from a step's metrics, which all ranks share, so every rank does the same.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from es2fast.config import Config, save_config
from es2fast.data import MicroBatch, Prompt, collate
from es2fast.data.sources import one_line
from es2fast.distributed.interrupt import StopWish
from es2fast.distributed.runtime import Runtime
from es2fast.errors import RunStopped
from es2fast.modeling.taps import blocks
from es2fast.run.export import save_model
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import MetricsWriter
from es2fast.training.budget import DualAscent, scale_update
from es2fast.training.checkpoint import load
from es2fast.training.engine import build_engine
from es2fast.training.plan import Plan
from es2fast.training.prepare import Prepared, cached_teacher, prepare
from es2fast.training.profiling import StepProfiler
from es2fast.training.refusals import (
    AnchorTexts,
    RefusalAnchor,
    refusal_metrics,
)
from es2fast.training.reshard import Layout
from es2fast.training.responses import first_weights, trained_rows
from es2fast.training.resume import Checkpoints, Resumed
from es2fast.training.robust import SimulatedAttack
from es2fast.training.safeguards import CollapseMonitor, EarlyStop, Spikes, remedy
from es2fast.training.skipped import SkippedSteps
from es2fast.training.step import measure_kl, train_step
from es2fast.training.teacher_cache import TeacherCache
from es2fast.training.update_filter import filter_rows, filter_update
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
    gc.collect()  # the base model of the preparation is gone before two models are loaded
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
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
    try:
        result, good = _loop(
            config, engine, prepared, feed, writer, runtime, profiler, saver, resumed
        )
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
        print(
            f"note: the update was scaled by {result.scale:.3f} to meet kl.budget="
            f"{config.kl.budget:g}; a lower train.lr keeps more of it",
            flush=True,
        )
    runtime.barrier()
    return result


def _save(engine: Any, plan: Plan, target: Path, runtime: Runtime) -> None:
    """The student's weights, and the configuration that they come from beside them."""
    save_model(
        engine.module.student,
        plan.formatter.tokenizer,
        target,
        main=runtime.is_main,
        template=plan.formatter.template if plan.config.data.chat_template else None,
    )
    if runtime.is_main:
        save_config(plan.config, target / "es2fast.yaml")


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


class Feed:
    """One rank's micro-batches of every optimizer step.

    Args:
        plan: the run, with its harmful prompts.
        harmless: all harmless training prompts, with their responses.
        rank: whose.
        texts: the refusal anchor's, if there is one.
        teacher: what was kept of the base model, if it does not run during the training.
    """

    def __init__(
        self,
        plan: Plan,
        harmless: list[Prompt],
        rank: int,
        texts: AnchorTexts | None = None,
        teacher: TeacherCache | None = None,
    ):
        self._plan, self._texts, self._teacher = plan, texts, teacher
        self._formatter, self._positions = plan.formatter, plan.config.kl.positions
        self._first_tokens = plan.config.kl.first_tokens
        self._first_weights = first_weights(plan.config, harmless)
        self._harmful, self._harmless = plan.groups.harmful, harmless
        self._rows = trained_rows(plan.config, harmless)
        by_length = plan.config.train.length_window > 1
        lengths = plan.row_lengths([harmless[i] for i in self._rows]) if by_length else None
        self._sampler = plan.sampler(rank, lengths, self._rows)
        self._anchor: RefusalAnchor | None = None
        if texts is not None:
            self._anchor = RefusalAnchor(plan.config, plan.formatter, self._harmful, texts)

    @property
    def left_out_line(self) -> str:
        """What `data.refused` leaves out, in words; empty: nothing."""
        count = len(self._harmless) - len(self._rows)
        if not count:
            return ""
        return (
            f"left out of training: {count} of {len(self._harmless)} harmless prompts, which the "
            "base model refuses (data.refused: drop)"
        )

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, from 0."""
        pairs = self._sampler.indices(step)
        return [self._batch(step, a, [self._rows[i] for i in b]) for a, b in pairs]

    def filter(self, student: nn.Module, runtime: Runtime) -> None:
        """Filters the trained LoRA update on the rows of the run (`train.update_filter`)."""
        rows = filter_rows(self._plan, self._harmless, self._texts)
        strength = self._plan.config.train.update_filter
        filter_update(student, self._formatter, *rows, strength, runtime)

    def names(self, step: int) -> list[list[str]]:
        """Per micro-batch of a step its rows, harmful ones first: where they are from."""
        return [
            [
                *(f"harmful prompt {i + 1} {one_line(self._harmful[i].text, 40)!r}" for i in a),
                *(
                    f"harmless prompt {self._rows[i] + 1} "
                    f"{one_line(self._harmless[self._rows[i]].text, 40)!r}"
                    for i in b
                ),
            ]
            for a, b in self._sampler.indices(step)
        ]

    def _batch(self, step: int, harmful: list[int], harmless: list[int]) -> MicroBatch:
        anchor = self._anchor
        batch = collate(
            self._formatter,
            [self._harmful[i] for i in harmful],
            [self._harmless[i] for i in harmless],
            self._positions,
            None if anchor is None else [anchor.row(step, i) for i in harmful],
            1.0 if anchor is None else anchor.decay,
            ([self._first_weights[i] for i in harmless], self._first_tokens),
        )
        if self._teacher is not None:
            batch.teacher = self._teacher.tokens(harmless)
        return batch


def _loop(
    config: Config,
    engine: Any,
    prepared: Prepared,
    feed: Feed,
    writer: MetricsWriter,
    runtime: Runtime,
    profiler: StepProfiler,
    saver: Checkpoints,
    resumed: Resumed | None,
) -> tuple[TrainResult, GoodWeights]:
    """All optimizer steps, those before the checkpoint apart, and the last look at the weights."""
    began = time.perf_counter()
    steps = config.train.steps
    dual, target = DualAscent(config), EarlyStop(config.train.early_stop)
    monitor, spikes = CollapseMonitor(config, runtime.world_size), Spikes()
    skips = SkippedSteps(runtime, feed.names)
    depth = len(blocks(engine.module.student))
    simulated = SimulatedAttack(config, prepared.layers, runtime, depth)
    weights = TrainableWeights(engine.module.student)
    good = GoodWeights(weights, config.safeguards.keep_every)
    scaled = config.kl.budget is not None or config.train.update_scale < 1
    start = weights.copy() if scaled else []
    row: dict[str, Any] = {}
    trouble: str | None = None
    ended = False
    step = 0
    parts: dict[str, Any] = {
        "dual": dual, "target": target, "monitor": monitor, "simulated": simulated, "good": good,
        "spikes": spikes, "skips": skips,
    }  # fmt: skip
    if engine.module.bank is not None:
        parts["bank"] = engine.module.bank
    if resumed is not None:
        load(engine, parts, resumed.folder, runtime, Layout.of(resumed.about))
        step = resumed.step
    while not ended:
        step += 1
        started = time.perf_counter()
        good.before_step(step)
        attack, margin = simulated.for_step(step), margin_at(config, step)
        sums = train_step(
            engine,
            feed(step - 1),
            dual.weight,
            runtime,
            attack,
            simulated.observe,
            margin,
            saver.asked_to_stop,
            partial(skips.add, step - 1),
        )
        profiler.step()
        row = _row(step, sums, dual.weight, prepared, engine, time.perf_counter() - started)
        if config.separation.robust.probability:
            row["attacked"] = float(attack is not None)
        row |= {"skipped": sums["skipped"], "spike": float(spikes.flag(row))}
        trouble = monitor.verdict(row)
        if trouble is not None and row["skipped"]:
            trouble = f"{trouble}; {skips.words()}"
        good.measured(monitor.sane(row), row["kl"])
        met = target.reached(row, prepared.layers, margin == config.separation.margin)
        ended = trouble is not None or met or step == steps
        if ended or step % config.train.log_every == 0:
            writer.log(row)
        writer.tick(row)
        if not row["skipped"]:
            dual.update(row["kl"])
        if not ended:
            saver.after(engine, parts, step, asked_to_stop=sums["stop"] > 0)
    scale, kl = 1.0, row["kl"]
    if trouble is None:
        batches = [feed(step + i) for i in range(min(steps, MEASURED))]
        kl = measure_kl(engine, batches, runtime)
        if config.train.update_filter:
            engine.eval()
            engine.module.taps.disarm()
            feed.filter(engine.module.student, runtime)
            learned, kl = kl, measure_kl(engine, batches, runtime)
            if runtime.is_main:
                print(f"update filter: KL {learned:.3g} -> {kl:.3g} nats per token", flush=True)
        trouble = monitor.final(kl)
        if trouble is None and scaled:
            scale, kl = scale_update(
                weights,
                start,
                kl,
                lambda: measure_kl(engine, batches, runtime),
                scale=config.train.update_scale,
                budget=config.kl.budget,
            )
    return TrainResult(
        steps=step,
        seconds=time.perf_counter() - began,
        kl=kl,
        kl_weight=row["kl_weight"],
        prepared=prepared,
        stopped_early=step < steps,
        scale=scale,
        trouble=trouble,
        skipped=skips.count,
    ), good


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
    step: int,
    sums: dict[str, float],
    kl_weight: float,
    prepared: Prepared,
    engine: Any,
    seconds: float,
) -> dict[str, Any]:
    config = engine.module.config
    kl = sums["kl_sum"] / sums["kl_tokens"]
    refusal = refusal_metrics(sums)
    row: dict[str, Any] = {
        "step": step,
        "loss": config.separation.weight * sums["sep"]
        + kl_weight * kl
        + config.refusal.weight * refusal.get("refusal", 0.0)
        + sums.get("norm_band", 0.0),
        "sep": sums["sep"],
        "kl": kl,
        "kl_weight": kl_weight,
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
        "lr": float(engine.get_lr()[0]),
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
