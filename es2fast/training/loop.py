"""The training loop: prepare, build, step, save.

Read top to bottom, `train` is the whole run. One optimizer step = `gradient_accumulation`
micro-batches, each one engine forward and one backward; one small all-reduce before it (the number
of tokens of the step) and one after it (the metrics). What the safeguards decide they
decide from these, so every rank does the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from es2fast.config import Config, save_config
from es2fast.data import MicroBatch, Prompt, collate
from es2fast.distributed.runtime import Runtime
from es2fast.errors import RunStopped
from es2fast.modeling.taps import Push
from es2fast.run.export import save_model
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import MetricsWriter
from es2fast.training.budget import DualAscent, meet_budget
from es2fast.training.engine import build_engine
from es2fast.training.plan import Plan
from es2fast.training.prepare import Prepared, prepare
from es2fast.training.refusals import (
    AnchorTexts,
    RefusalAnchor,
    RefusalTokens,
    refusal_counts,
    refusal_metrics,
)
from es2fast.training.robust import SimulatedAttack
from es2fast.training.safeguards import CollapseMonitor, EarlyStop
from es2fast.training.weights import GoodWeights, TrainableWeights

MEASURED = 8  # optimizer steps' batches on which the KL of the final weights is measured
COUNTS = ("kl_tokens", "tokens", "rows", "refusal_weights", "refusals")  # of a step, all ranks
SUMS = ("kl_sum", "refusal_sum", "refusal_hits")  # of the objective's metrics; the rest are means


@dataclass
class TrainResult:
    """What the report and the model card say about the training.

    kl: of the final weights, nats per token; scale: of the update, below 1 where `kl.budget` asked
    for it; trouble: why a safeguard ended the run.
    """

    steps: int
    seconds: float
    kl: float
    kl_weight: float
    prepared: Prepared
    stopped_early: bool = False
    scale: float = 1.0
    trouble: str | None = None

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
        }


def train(plan: Plan, runtime: Runtime) -> TrainResult:
    """Trains and writes the folder's model/, metrics.jsonl and layers.json.

    Raises:
        UserError: see `prepare`.
        RunStopped: the collapse monitor ended the run; model/ was not written, `last_good/` holds
            the last sane weights.
    """
    config, folder = plan.config, plan.folder
    prepared, harmless, texts = prepare(plan, runtime)
    gc.collect()  # the base model of the preparation is gone before two models are loaded
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    if runtime.is_main:
        prepared.save(folder)
        print(f"layers {prepared.layers}: {prepared.reason}", flush=True)
    engine = build_engine(plan, prepared, runtime)
    feed = Feed(plan, harmless, runtime.rank, texts)
    writer = MetricsWriter(folder, config, main=runtime.is_main, steps=config.train.steps)
    try:
        result, good = _loop(config, engine, prepared, feed, writer, runtime)
    finally:
        writer.close()
    if result.trouble is not None:
        if good.copy is not None and good.copy.step > 0:
            good.restore()
            _save(engine, plan, folder.last_good, runtime)
        runtime.barrier()
        raise RunStopped(_stop_message(result, good, folder))
    _save(engine, plan, folder.model, runtime)
    if runtime.is_main and result.scale < 1:
        print(
            f"note: the update was scaled by {result.scale:.3f} to meet kl.budget="
            f"{config.kl.budget:g}; a lower train.lr keeps more of it",
            flush=True,
        )
    runtime.barrier()
    return result


def _save(engine: Any, plan: Plan, target: Path, runtime: Runtime) -> None:
    """The student's weights, and the configuration that they come from beside them."""
    student, tokenizer = engine.module.student, plan.formatter.tokenizer
    save_model(student, tokenizer, target, main=runtime.is_main)
    if runtime.is_main:
        save_config(plan.config, target / "es2fast.yaml")


def _stop_message(result: TrainResult, good: GoodWeights, folder: RunFolder) -> str:
    if good.copy is None:
        kept = "no weights were measured to be sane, nothing was saved"
    elif good.copy.step == 0:
        kept = "the last sane weights are the base model's, nothing was saved"
    else:
        where = f"are in {str(folder.last_good)!r}"
        kept = f"the weights of step {good.copy.step} (KL {good.copy.kl:.2g}) {where}"
    earlier = ", the earlier run is in previous/" if folder.previous.is_dir() else ""
    return (
        f"training stopped at step {result.steps}: {result.trouble}; {kept}; model/ was not "
        f"written{earlier}. Lower train.lr, raise kl.weight, set kl.budget or use "
        "separation.loss=hinge"
    )


class Feed:
    """One rank's micro-batches of every optimizer step.

    Args:
        plan: the run, with its harmful prompts.
        harmless: all harmless training prompts, with their responses.
        rank: whose.
        texts: the refusal anchor's, if there is one.
    """

    def __init__(
        self, plan: Plan, harmless: list[Prompt], rank: int, texts: AnchorTexts | None = None
    ):
        self._formatter, self._positions = plan.formatter, plan.config.kl.positions
        self._harmful, self._harmless = plan.groups.harmful, harmless
        self._sampler = plan.sampler(rank)
        self._anchor: RefusalAnchor | None = None
        if texts is not None:
            self._anchor = RefusalAnchor(plan.config, plan.formatter, self._harmful, texts)

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, from 0."""
        anchor = self._anchor
        return [
            collate(
                self._formatter,
                [self._harmful[i] for i in a],
                [self._harmless[i] for i in b],
                self._positions,
                None if anchor is None else [anchor.row(step, i) for i in a],
                1.0 if anchor is None else anchor.decay,
            )
            for a, b in self._sampler.indices(step)
        ]


def _loop(
    config: Config,
    engine: Any,
    prepared: Prepared,
    feed: Feed,
    writer: MetricsWriter,
    runtime: Runtime,
) -> tuple[TrainResult, GoodWeights]:
    """All optimizer steps and the last look at the weights."""
    began = time.perf_counter()
    steps = config.train.steps
    dual, target = DualAscent(config), EarlyStop(config.train.early_stop)
    monitor = CollapseMonitor(config)
    simulated = SimulatedAttack(config, prepared.layers, runtime)
    weights = TrainableWeights(engine.module.student)
    good = GoodWeights(weights, config.safeguards.keep_every)
    start = weights.copy() if config.kl.budget is not None else []
    row: dict[str, Any] = {}
    trouble: str | None = None
    ended = False
    step = 0
    while not ended:
        step += 1
        started = time.perf_counter()
        good.before_step(step)
        push = simulated.for_step(step)
        sums = train_step(engine, feed(step - 1), dual.weight, runtime, push, simulated.observe)
        row = _row(step, sums, dual.weight, prepared, engine, time.perf_counter() - started)
        if config.separation.robust.probability:
            row["attacked"] = float(push is not None)
        good.measured(monitor.sane(row), row["kl"])
        trouble = monitor.verdict(row)
        met = target.reached(row, prepared.layers)
        ended = trouble is not None or met or step == steps
        if ended or step % config.train.log_every == 0:
            writer.log(row)
        writer.tick(row)
        dual.update(row["kl"])
    scale, kl = 1.0, row["kl"]
    if trouble is None:
        batches = [feed(step + i) for i in range(min(steps, MEASURED))]
        kl = measure_kl(engine, batches, runtime)
        trouble = monitor.final(kl)
        if trouble is None and config.kl.budget is not None:
            scale, kl = meet_budget(
                weights, start, kl, config.kl.budget, lambda: measure_kl(engine, batches, runtime)
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
    ), good


def train_step(
    engine: Any,
    batches: list[MicroBatch],
    kl_weight: float,
    runtime: Runtime,
    push: Push | None = None,
    observe: Callable[[dict[int, Tensor], int], None] | None = None,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches.

    Args:
        push: a simulated attack on the harmful states.
        observe: gets the block outputs (layer -> (n + m, H)) and n of each clean micro-batch.

    Returns:
        the same numbers on every rank: sums over ranks and micro-batches, `kl_sum`, with an anchor
        `refusal_sum` and `refusal_hits`, and COUNTS; means of the objective's other metrics;
        `grad_norm` before clipping.
    """
    counts = _counts(batches, runtime)
    metrics: dict[str, Tensor] = {}
    for batch in batches:
        loss, found = _forward(engine, batch, kl_weight, counts, len(batches), runtime, push)
        engine.backward(loss)
        engine.step()
        if push is None and observe is not None:
            observe(engine.module.taps.outputs, batch.num_harmful)
        for key, value in found.items():
            metrics[key] = metrics.get(key, 0.0) + value.float()
    norm = engine.get_global_grad_norm()
    shared = {key: value / len(batches) for key, value in metrics.items() if key not in SUMS}
    shared["grad_norm"] = torch.as_tensor(norm or 0.0, device=runtime.device).float()
    summed = {key: metrics[key] for key in SUMS if key in metrics}
    sums = [*summed.values(), *(value / runtime.world_size for value in shared.values())]
    values = torch.cat([runtime.sum(torch.stack(sums)), counts]).tolist()
    return dict(zip([*summed, *shared, *COUNTS], values))


def _counts(batches: list[MicroBatch], runtime: Runtime) -> Tensor:
    """COUNTS over ranks and micro-batches."""
    own = [
        (float(b.kl_weights.sum()), b.num_tokens, len(b.input_ids), *refusal_counts(b))
        for b in batches
    ]
    return runtime.sum(torch.tensor(own, device=runtime.device).sum(0))


def _forward(
    engine: Any,
    batch: MicroBatch,
    kl_weight: float,
    counts: Tensor,
    accumulation: int,
    runtime: Runtime,
    push: Push | None = None,
    anchored: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective on one micro-batch; without the refusals that it holds if not `anchored`."""
    device = runtime.device
    index = batch.kl_weights.flatten().nonzero().squeeze(1)
    weights = batch.kl_weights.flatten()[index]
    refusal = RefusalTokens.of(batch, counts[3], device) if anchored else None
    batch = batch.to(device)
    return engine(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        prompt_last=batch.prompt_last,
        kl_index=index.to(device),
        kl_weights=weights.to(device),
        num_harmful=batch.num_harmful,
        kl_weight=kl_weight,
        kl_tokens=counts[0],
        accumulation=accumulation,
        push=push,
        refusal=refusal,
    )


@torch.no_grad()
def measure_kl(engine: Any, steps: list[list[MicroBatch]], runtime: Runtime) -> float:
    """KL in nats per token of the weights as they are, without a step.

    Args:
        steps: this rank's micro-batches of one or more optimizer steps.
    """
    engine.eval()
    total = torch.zeros(2, device=runtime.device)
    for batches in steps:
        counts = _counts(batches, runtime)
        for batch in batches:
            _, found = _forward(engine, batch, 0.0, counts, len(batches), runtime, anchored=False)
            total[0] += found["kl_sum"]
        total[1] += counts[0] / runtime.world_size
    engine.train()
    kl_sum, tokens = runtime.sum(total).tolist()
    return kl_sum / tokens


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
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """Highest allocated GPU bytes of this rank; resident set of the process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
