"""The training loop around DeepSpeed: prepare, build, step, save.

Read top to bottom, `train` is the whole run. One optimizer step = `gradient_accumulation`
micro-batches, each one engine forward and one backward; one small all-reduce before it (the number
of harmless tokens of the step) and one after it (sums for the metrics and the finite check).
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.config import Config, save_config
from es2fast.data import Formatter, MicroBatch, PairedSampler, Prompt, PromptGroups, collate
from es2fast.deepspeed_config import build_deepspeed
from es2fast.errors import UserError
from es2fast.export import save_model
from es2fast.metrics import MetricsWriter
from es2fast.modeling.load import load_causal_lm, load_model_config
from es2fast.modeling.teacher import head_is_shared, resolve_teacher, set_trainable
from es2fast.objective import ES2Objective
from es2fast.prepare import Prepared, prepare, zero3_loading
from es2fast.runtime import Runtime


@dataclass
class TrainResult:
    """What the report and the model card say about the training."""

    steps: int
    seconds: float
    kl: float
    kl_weight: float
    prepared: Prepared
    stopped_early: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "kl": self.kl,
            "lambda": self.kl_weight,
            "layers": self.prepared.layers,
            "d0": {str(k): v for k, v in self.prepared.d0.items()},
            "stopped_early": self.stopped_early,
        }


def train(
    config: Config, formatter: Formatter, groups: PromptGroups, runtime: Runtime
) -> TrainResult:
    """Trains and writes `config.output_dir`: model/, metrics.jsonl, layers.json, config.yaml.

    Raises:
        UserError: see `prepare`; a loss that stops being finite.
    """
    folder = Path(config.output_dir)
    prepared, harmless = prepare(config, formatter, groups, runtime)
    gc.collect()  # the base model of the preparation is gone before two models are loaded
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    if runtime.is_main:
        prepared.save(folder / "layers.json")
        print(f"layers {prepared.layers}: {prepared.reason}", flush=True)
    engine = build_engine(config, prepared, runtime)
    sampler = PairedSampler(
        len(groups.harmful),
        len(harmless),
        seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    writer = MetricsWriter(folder, config, main=runtime.is_main, steps=config.train.steps)
    try:
        result = _loop(config, engine, prepared, formatter, groups.harmful, harmless, sampler,
                       writer, runtime)  # fmt: skip
    finally:
        writer.close()
    save_model(engine.module.student, formatter.tokenizer, folder / "model", main=runtime.is_main)
    if runtime.is_main:
        save_config(config, folder / "model" / "es2fast.yaml")
    runtime.barrier()
    return result


def build_engine(config: Config, prepared: Prepared, runtime: Runtime) -> Any:
    """Student, teacher and losses as one DeepSpeed engine.

    Args:
        config: the run.
        prepared: layers, base distances and norms.
        runtime: ranks, device and precision.
    """
    import deepspeed
    from transformers import get_scheduler

    train = config.train
    raw = build_deepspeed(
        config,
        world_size=runtime.world_size,
        dtype=runtime.dtype,
        model_config=load_model_config(config.model),
    )
    with zero3_loading(raw):
        student = load_causal_lm(config.model, runtime.dtype)
        twin = resolve_teacher(train) == "twin"
        teacher = load_causal_lm(config.model, runtime.dtype) if twin else None
    if train.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    torch.manual_seed(train.seed)  # LoRA's start: the same on every rank and in every run
    student = set_trainable(student, train, prepared.layers[-1])
    objective = ES2Objective(
        student,
        teacher,
        layers=prepared.layers,
        d0=prepared.d0,
        norm0=prepared.norm0,
        config=config,
        share_head=head_is_shared(train),
    )
    parameters = [p for p in objective.parameters() if p.requires_grad]
    warmup = math.ceil(train.warmup_ratio * train.steps)
    optimizer = None if "optimizer" in raw else _optimizer(config, raw, parameters, runtime)
    engine, *_ = deepspeed.initialize(
        model=objective,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=lambda opt: get_scheduler(train.schedule, opt, warmup, train.steps),
        config=raw,
    )
    engine.train()
    return engine


def _optimizer(
    config: Config, raw: dict[str, Any], parameters: list[nn.Parameter], runtime: Runtime
) -> torch.optim.Optimizer:
    """AdamW: torch's own (fused on a GPU), DeepSpeed's CPU kernel when states are offloaded."""
    options: dict[str, Any] = {
        "lr": config.train.lr,
        "betas": config.train.betas,
        "weight_decay": config.train.weight_decay,
    }
    if raw.get("zero_optimization", {}).get("offload_optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    return torch.optim.AdamW(parameters, fused=runtime.device.type == "cuda", **options)


def _loop(
    config: Config,
    engine: Any,
    prepared: Prepared,
    formatter: Formatter,
    harmful: list[Prompt],
    harmless: list[Prompt],
    sampler: PairedSampler,
    writer: MetricsWriter,
    runtime: Runtime,
) -> TrainResult:
    began = time.perf_counter()
    dual = DualAscent(config)
    target = _EarlyStop(config.train.early_stop)
    row: dict[str, Any] = {}
    step = 0
    for step in range(1, config.train.steps + 1):
        started = time.perf_counter()
        batches = [
            collate(
                formatter,
                [harmful[i] for i in a],
                [harmless[i] for i in b],
                config.kl.positions,
            )
            for a, b in sampler.indices(step - 1)
        ]
        sums = train_step(engine, batches, dual.weight, runtime)
        row = _row(step, sums, dual.weight, prepared, config, engine, time.perf_counter() - started)
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"step {step}: the loss is {row['loss']}; nothing was saved. Lower train.lr "
                f"(now {config.train.lr}) or use separation.loss=hinge"
            )
        if step % config.train.log_every == 0 or step == config.train.steps:
            writer.log(row)
        writer.tick(row)
        dual.update(row["kl"])
        if target.reached(row, prepared.layers):
            break
    stopped = step < config.train.steps
    if stopped and step % config.train.log_every:
        writer.log(row)
    seconds = time.perf_counter() - began
    return TrainResult(step, seconds, row["kl"], row["kl_weight"], prepared, stopped)


def train_step(
    engine: Any, batches: list[MicroBatch], kl_weight: float, runtime: Runtime
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches.

    Returns:
        sums over all ranks and micro-batches: `kl_sum`, `kl_tokens`, `tokens`, `rows`; and means
        over micro-batches of the objective's other metrics.
    """
    device = runtime.device
    own = [(float(b.kl_weights.sum()), b.num_tokens, len(b.input_ids)) for b in batches]
    counts = runtime.sum(torch.tensor(own, device=device).sum(0))
    metrics: dict[str, Tensor] = {}
    for batch in batches:
        index = batch.kl_weights.flatten().nonzero().squeeze(1)
        weights = batch.kl_weights.flatten()[index]
        batch = batch.to(device)
        loss, found = engine(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            prompt_last=batch.prompt_last,
            kl_index=index.to(device),
            kl_weights=weights.to(device),
            num_harmful=batch.num_harmful,
            kl_weight=kl_weight,
            kl_tokens=counts[0],
            accumulation=len(batches),
        )
        engine.backward(loss)
        engine.step()
        for key, value in found.items():
            metrics[key] = metrics.get(key, 0.0) + value.float()
    shared = {key: value / len(batches) for key, value in metrics.items() if key != "kl_sum"}
    kl_sum = runtime.sum(metrics["kl_sum"].reshape(1).clone())
    names = ["kl_sum", "kl_tokens", "tokens", "rows", *shared]
    values = torch.cat([kl_sum, counts, torch.stack(list(shared.values()))]).tolist()
    return dict(zip(names, values))


def _row(
    step: int,
    sums: dict[str, float],
    kl_weight: float,
    prepared: Prepared,
    config: Config,
    engine: Any,
    seconds: float,
) -> dict[str, Any]:
    kl = sums["kl_sum"] / sums["kl_tokens"]
    row: dict[str, Any] = {
        "step": step,
        "loss": sums["sep"] + kl_weight * kl,
        "sep": sums["sep"],
        "kl": kl,
        "kl_weight": kl_weight,
    }
    for layer in prepared.layers:
        row[f"sep/{layer}"] = sums[f"sep/{layer}"]
        row[f"distance/{layer}"] = sums[f"distance/{layer}"]
        row[f"distance_over_base/{layer}"] = sums[f"distance/{layer}"] / prepared.d0[layer]
        row[f"norm_ratio/{layer}"] = sums[f"norm/{layer}"] / prepared.norm0[layer]
    return row | {
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
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


class DualAscent:
    """lambda, fixed or adaptive: log lambda += lr (KL / budget - 1), clipped to +-1 a step.

    A user states what capability may be lost (`kl.budget`, nats per token) instead of a weight.
    """

    def __init__(self, config: Config):
        self._kl = config.kl
        self.weight = config.kl.weight if config.kl.budget is None else max(config.kl.weight, 1e-3)

    def update(self, kl: float) -> None:
        """After a step whose global KL was `kl` nats per token."""
        if self._kl.budget is None:
            return
        step = self._kl.budget_lr * (kl / self._kl.budget - 1.0)
        grown = self.weight * math.exp(min(max(step, -1.0), 1.0))
        self.weight = min(max(grown, 1e-3), self._kl.max_weight)


class _EarlyStop:
    """The hinge is (almost) at rest on every layer for five steps in a row."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._met = 0

    def reached(self, row: dict[str, Any], layers: list[int]) -> bool:
        met = all(row[f"sep/{layer}"] <= 0.01 for layer in layers)
        self._met = self._met + 1 if met else 0
        return self._enabled and self._met >= 5
