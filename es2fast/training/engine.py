"""Student, teacher and losses as one DeepSpeed engine.

DeepSpeed sees one module (`ES2Objective`) with one forward per backward; the teacher lives in it,
so ZeRO-3 partitions it too. AdamW is torch's own, so that no operator has to be compiled.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import nn

from es2fast.config import Config
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import zero3_loading
from es2fast.modeling.compiled import compile_blocks
from es2fast.modeling.head import lm_head_of
from es2fast.modeling.load import load_causal_lm
from es2fast.modeling.teacher import (
    frozen_head,
    head_is_shared,
    make_twin,
    resolve_teacher,
    set_trainable,
)
from es2fast.training.master_adamw import MasterAdamW
from es2fast.training.objective import ES2Objective
from es2fast.training.plan import Plan
from es2fast.training.prepare import Prepared


def build_engine(plan: Plan, prepared: Prepared, runtime: Runtime) -> Any:
    """Student, teacher and losses as one DeepSpeed engine.

    Args:
        plan: the run.
        prepared: layers, base distances and norms.
        runtime: ranks, device and precision.
    """
    import deepspeed
    from transformers import get_scheduler

    config, train = plan.config, plan.config.train
    raw = copy.deepcopy(plan.deepspeed)
    with zero3_loading(raw):
        student = load_causal_lm(config.model, runtime.dtype)
        twin = resolve_teacher(train) == "twin"
        whole = twin and plan.zero_stage == 3
        teacher = load_causal_lm(config.model, runtime.dtype) if whole else None
    if train.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    head = None
    if not head_is_shared(train) and not twin:
        head = frozen_head(student)
    torch.manual_seed(train.seed)  # LoRA's start: the same on every rank and in every run
    student = set_trainable(student, train, prepared.layers[-1], config.model.revision)
    if twin and teacher is None:
        teacher = make_twin(student)
    if teacher is not None and not head_is_shared(train):
        head = lm_head_of(teacher)
    objective = ES2Objective(
        student,
        teacher,
        layers=prepared.layers,
        d0=prepared.d0,
        norm0=prepared.norm0,
        scale=prepared.whitened0,
        whitening=prepared.whitening,
        config=config,
        teacher_head=head,
        sharded=plan.head.sharded,
    )
    parameters = [p for p in objective.parameters() if p.requires_grad]
    warmup = math.ceil(train.warmup_ratio * train.steps)
    optimizer = None if "optimizer" in raw else _optimizer(config, raw, parameters, runtime)
    if isinstance(optimizer, MasterAdamW):
        raw["bf16"] = {"enabled": False}  # or DeepSpeed would make fp32 copies too
    engine, *_ = deepspeed.initialize(
        model=objective,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=lambda opt: get_scheduler(train.schedule, opt, warmup, train.steps),
        config=raw,
    )
    if plan.zero_stage == 0 and (runtime.dtype == "fp32" or isinstance(optimizer, MasterAdamW)):
        _keep_norm(engine, train.max_grad_norm)
    if plan.zero_stage == 0 and runtime.world_size == 1:
        engine.enable_backward_allreduce = False  # it would flatten all gradients for nobody
    engine.train()
    if train.compile:
        _compile(objective)
    return engine


def _compile(objective: ES2Objective) -> None:
    """Compiles the blocks of student and twin. What is measured without training is measured as an
    evaluation would, and what acts or listens inside of a block does so in plain code."""
    taps = objective.taps

    def eager() -> bool:
        return taps.acts_inside or not objective.training

    compile_blocks(objective.student, eager, taps.hooked_inside)
    if objective.teacher is not None:
        compile_blocks(objective.teacher, eager, taps.hooked_inside)


def _keep_norm(engine: Any, largest: float) -> None:
    """DeepSpeed clips at stage 0 in fp32 but forgets the norm, which the safeguards watch, and does
    not leave out a step whose gradients are no finite numbers, as its other stages do. The
    gradients are averaged by then, so every rank finds the same."""
    optimizer, update = engine.optimizer, engine.optimizer.step

    def clip() -> None:
        if isinstance(optimizer, MasterAdamW):
            engine._global_grad_norm = optimizer.clip(largest)
            return
        engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), largest)

    @functools.wraps(update)  # also the mark by which the schedule knows it
    def step(*args: Any, **options: Any) -> Any:
        optimizer.overflow = not math.isfinite(engine._global_grad_norm)  # what the engine asks for
        return None if optimizer.overflow else update(*args, **options)

    engine.clip_fp32_gradients = clip
    optimizer.step = step


def _optimizer(
    config: Config, raw: dict[str, Any], parameters: list[nn.Parameter], runtime: Runtime
) -> torch.optim.Optimizer:
    """AdamW: torch's own fused one; with fp32 copies for bf16 weights at stage 0, where ZeRO makes
    none; DeepSpeed's CPU kernel when states are offloaded."""
    options: dict[str, Any] = {
        "lr": config.train.lr,
        "betas": config.train.betas,
        "weight_decay": config.train.weight_decay,
    }
    if raw.get("zero_optimization", {}).get("offload_optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    if runtime.dtype == "bf16" and not raw.get("zero_optimization", {}).get("stage"):
        return MasterAdamW(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)
