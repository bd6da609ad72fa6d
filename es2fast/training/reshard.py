"""An engine's checkpoint for another number of ranks or another ZeRO stage than wrote it.

It goes through DeepSpeed's universal format: a folder per parameter with its fp32 weights and both
moments of Adam, whole. ZeRO 1 to 3 are converted by DeepSpeed's `ds_to_universal` and read by its
own loader. Stage 0, which neither knows, has everything in one file on every rank: it is written
into that format, and out of it, here. So are the differences between DeepSpeed's two dialects (its
readers of stages 1 and 2 expect `{"param": tensor}` and a step per parameter, that of stage 3 plain
tensors or mappings and one step), so that any stage follows any other.

Only fp32 weights, moments, step, learning rate and schedule are carried; what else an optimizer is
made of comes from the run's configuration, which is the same.
"""

from __future__ import annotations

import contextlib
import io
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.run.files import remove
from es2fast.training.master_adamw import MasterAdamW

State = dict[str, Tensor]  # of a parameter: fp32, exp_avg, exp_avg_sq, in its shape or flat; step
KINDS = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """How an engine's states are parted: number of ranks, ZeRO stage."""

    ranks: int
    stage: int

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Layout:
        """From a checkpoint's manifest."""
        return cls(about["ranks"], about["zero_stage"])

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} at ZeRO stage {self.stage}"


def convert(source: Path, target: Path, stage: int, engine: Any) -> None:
    """Writes what `load` reads; on one rank.

    Args:
        source: the verified files that `engine.save_checkpoint` wrote; read only.
        target: replaced when it exists.
        stage: ZeRO stage that wrote them.
        engine: that will read them, freshly built.

    Raises:
        OSError, RuntimeError: the disk is full.
    """
    remove(target)
    target.mkdir(parents=True)
    about = _read(source / _about(stage))
    named = _trainable(engine)
    if stage == 0:
        states, groups = _stage0_states(about, list(named)), about["optimizer"]["param_groups"]
    else:
        _run_converter(source, target)
        groups, step = _groups_and_step(target, stage)
        states = _universal_states(target, step)
    now = engine.zero_optimization_stage()
    if now == 0:
        about |= _stage0_file(engine, named, states, groups)
    else:
        about |= {"module": {}, "optimizer": None}
        if (stage == 3) != (now == 3) or stage == 0:
            for name in named:
                _write_parameter(target / "zero" / name, states(name))
        _write_common(target, groups, states(next(iter(named)))["step"])
    torch.save(about, target / _about(now))


def load(engine: Any, folder: Path) -> None:
    """Puts what `convert` wrote into the engine; call on every rank."""
    universal = engine.zero_optimization_stage() > 0
    engine._config.load_universal_checkpoint = universal
    try:
        with _quiet_deepspeed():
            engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    if universal:
        _part_steps(engine.optimizer.optimizer)


def _part_steps(optimizer: torch.optim.Optimizer) -> None:
    """Each flat part of a rank its own counter, where its weights are: DeepSpeed's reader of stage
    3 gives them all one tensor, which AdamW would then count up once per part."""
    for parameter, state in optimizer.state.items():
        step = int(state["step"])
        counts_in_tensor = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = (
            torch.tensor(float(step), device=parameter.device) if counts_in_tensor else step
        )


def _about(stage: int) -> str:
    """Where DeepSpeed looks for schedule and counters."""
    return f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"


def _trainable(engine: Any) -> dict[str, nn.Parameter]:
    """In the order of the optimizer."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _read(path: Path) -> Any:
    """Only of files whose hashes were verified, or that this process has just written."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


# From what was written.


def _run_converter(source: Path, target: Path) -> None:
    """DeepSpeed's, in this process: a child could outlive a killed rank and write on."""
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # which tensors are parted otherwise than by ZeRO: none
    )
    with _quiet_deepspeed():
        ds_to_universal.main(options)


def _groups_and_step(folder: Path, stage: int) -> tuple[list[dict[str, Any]], Any]:
    """The optimizer's groups, and the number of its steps where it is not with the parameters."""
    common = _read(folder / "zero" / "optimizer_state.pt")
    if stage < 3:
        return common["param_groups"], None
    return common["param_groups"], common["optimizer_state_dict"]["state"][0]["step"]


def _universal_states(folder: Path, step: Any) -> Callable[[str], State]:
    """name -> state, from a converted folder."""

    def state(name: str) -> State:
        place = folder / "zero" / name
        found = {kind: _read(place / f"{kind}.pt") for kind in KINDS}
        found = {kind: v["param"] if isinstance(v, dict) else v for kind, v in found.items()}
        own = _read(place / "step.pt") if step is None else step
        return found | {"step": torch.tensor(float(own))}

    return state


def _stage0_states(about: dict[str, Any], names: list[str]) -> Callable[[str], State]:
    """name -> state, from the one file of stage 0, whose optimizer numbers its parameters."""
    numbers = {name: number for number, name in enumerate(names)}
    module, held = about["module"], about["optimizer"]["state"]

    def state(name: str) -> State:
        own, weights = held[numbers[name]], module[name]
        moments = {kind: own[kind] for kind in KINDS[1:]}
        return {
            "fp32": own.get("master", weights).float(),
            **moments,
            "step": torch.as_tensor(own["step"]).float(),
        }

    return state


# For what reads it.


def _write_parameter(folder: Path, state: State) -> None:
    whole = {kind: state[kind].clone() for kind in KINDS}  # no view of a file that is replaced
    remove(folder)
    folder.mkdir(parents=True)
    for kind, value in whole.items():
        torch.save({"param": value}, folder / f"{kind}.pt")
    torch.save(state["step"], folder / "step.pt")


def _write_common(folder: Path, groups: list[dict[str, Any]], step: Tensor) -> None:
    """What both readers look for: stage 3's the inner mapping, that of 1 and 2 the rest."""
    from deepspeed import __version__

    rates = [_rates(group) for group in groups]
    inner = {"state": {0: {"step": step}}, "param_groups": rates}
    common = {"ds_version": __version__, "param_groups": rates, "optimizer_state_dict": inner}
    torch.save(common, folder / "zero" / "optimizer_state.pt")


def _stage0_file(
    engine: Any,
    named: dict[str, nn.Parameter],
    states: Callable[[str], State],
    groups: list[dict[str, Any]],
) -> dict[str, Any]:
    """Weights and optimizer as stage 0 saves them."""
    masters = isinstance(engine.optimizer, MasterAdamW)
    module, held = {}, {}
    for number, (name, parameter) in enumerate(named.items()):
        state = {k: v if k == "step" else v.view(parameter.shape) for k, v in states(name).items()}
        weights = state.pop("fp32")
        module[name] = weights.to(parameter.dtype)
        held[number] = state | ({"master": weights} if masters else {})
    own = engine.optimizer.state_dict()["param_groups"]
    rated = [group | _rates(then) for group, then in zip(own, groups, strict=True)]
    return {"module": module, "optimizer": {"state": held, "param_groups": rated}}


def _rates(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "initial_lr") if key in group}


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Drops its progress bars, prints and warnings."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logger.setLevel(level)
