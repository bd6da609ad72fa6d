"""The DeepSpeed configuration of a run: presets or the user's JSON, filled in and checked.

DeepSpeed itself rejects unknown keys under `zero_optimization` but silently accepts them at the top
level, where a typo then costs a run; and only the Hugging Face Trainer knows what `"auto"` means.
Both are done here. Batch sizes, clipping and precision belong to the run's own YAML: a JSON that
says something else about them is an error, never a silent winner.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from es2fast.config import Config, TrainConfig
from es2fast.errors import UserError

AUTO = "auto"  # one of the presets, by what fits: `training.stage`
PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")

_KNOWN = {
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_types", "disable_allgather",
    "dump_state", "flops_profiler", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "optimizer",
    "prescale_gradients", "sparse_gradients", "steps_per_print", "tensorboard", "timers",
    "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
_REFUSED = {
    "fp16": "hidden-state distances overflow fp16; use model.dtype=bf16",
    "scheduler": "set train.schedule and train.warmup_ratio",
    "sequence_parallel_size": "rows are dropped half way through the model; leave it out",
    "tensor_parallel": "not supported; use ZeRO-3",
    "elasticity": "not part of DeepSpeed any more; leave it out",
}
_REFUSED_ZERO = {
    "zero_quantized_weights": "it perturbs the teacher's and the student's logits alike",
    "mics_shard_size": "MiCS is not part of DeepSpeed any more",
}


def load_deepspeed(choice: str | dict[str, Any]) -> dict[str, Any]:
    """The raw DeepSpeed mapping behind `deepspeed:` (a preset's name, a JSON file, or a mapping).

    Raises:
        UserError: no such preset or file, malformed JSON, unknown or unsupported keys.
    """
    if isinstance(choice, dict):
        raw = json.loads(json.dumps(choice))
    elif choice in PRESETS:
        raw = json.loads(
            (resources.files("es2fast.distributed") / "presets" / f"{choice}.json").read_text()
        )
    else:
        raw = _read_json(choice)
    _check_keys(raw)
    zero = raw.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):  # DeepSpeed's own word for none
        if part in zero and (zero[part] or {}).get("device", "none") in (None, "none"):
            del zero[part]
    return raw


def _read_json(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        known = (AUTO, *PRESETS)
        close = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(known)}"
        raise UserError(f"deepspeed: {path!r} is neither a preset nor a file; {hint}")
    try:
        raw = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed: {path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"deepspeed: {path} holds a {type(raw).__name__}, expected a mapping")
    return raw


def _check_keys(raw: dict[str, Any]) -> None:
    for key in raw:
        if key in _REFUSED:
            raise UserError(f"deepspeed.{key}: {_REFUSED[key]}")
        if key not in _KNOWN:
            close = difflib.get_close_matches(key, sorted(_KNOWN), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise UserError(f"deepspeed.{key}: unknown key; {hint}")
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"deepspeed.zero_optimization: {zero!r} is no mapping; give one such as {{stage: 2}}"
        )
    for key, reason in _REFUSED_ZERO.items():
        if zero.get(key) not in (None, False, -1):
            raise UserError(f"deepspeed.zero_optimization.{key}: {reason}; leave it out")
    _check_zero_keys(zero)
    _check_optimizer(raw)


def _check_zero_keys(zero: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = set()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        names.update({name, field.alias or name})
    for key in zero:
        if key not in names:
            close = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise UserError(f"deepspeed.zero_optimization.{key}: unknown key; {hint}")
    _check_zero_values(zero, DeepSpeedZeroConfig)


def _check_zero_values(zero: dict[str, Any], schema: Any) -> None:
    """What DeepSpeed's own schema says of the values, and what only its engine would."""
    known = {key: value for key, value in zero.items() if value != "auto"}
    try:
        schema(**known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"deepspeed.zero_optimization.{path}: {first['msg'].lower()}, found {first['input']!r}"
        ) from None
    for key, value in zero.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise UserError(
                f"deepspeed.zero_optimization.{key}: {value} is negative; give a positive number"
            )
    for part in ("offload_optimizer", "offload_param"):
        place = zero.get(part) or {}
        disk = place.get("nvme_path")
        if place.get("device") == "nvme" and not (disk and Path(disk).is_dir()):
            raise UserError(
                f"deepspeed.zero_optimization.{part}.nvme_path: {disk!r} is no folder; name "
                "an existing one on the NVMe disk"
            )


_OPTIMIZERS = ("adam", "adamw", "lamb", "lion", "muon", "onebitadam", "onebitlamb", "zerooneadam")


def _check_optimizer(raw: dict[str, Any]) -> None:
    optimizer = raw.get("optimizer")
    if optimizer is None:
        return
    name = optimizer.get("type") if isinstance(optimizer, dict) else None
    if str(name).lower() not in _OPTIMIZERS:
        raise UserError(
            f"deepspeed.optimizer: {optimizer!r} names no optimizer of DeepSpeed "
            f"({', '.join(_OPTIMIZERS)}); leave it out for AdamW with train.lr"
        )


def build_deepspeed(
    config: Config,
    *,
    world_size: int,
    dtype: str,
    model_config: Any | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """The complete DeepSpeed mapping for a run.

    Args:
        config: the run.
        world_size: data-parallel ranks.
        dtype: "bf16" or "fp32".
        model_config: a transformers config; fills the `"auto"` bucket sizes (defaults without it).
        preset: in place of the run's own `deepspeed`, which has to be a choice made when it is
            `auto`.

    Raises:
        UserError: batch sizes that do not multiply; a key that contradicts the run's YAML.
    """
    raw = load_deepspeed(preset or config.deepspeed)
    train = config.train
    check_batch_sizes(config, world_size)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "train_batch_size": train.micro_batch_size * train.gradient_accumulation * world_size,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
    }
    for key, value in ours.items():
        theirs = raw.get(key, "auto")
        same = (
            theirs.get("enabled", "auto") in ("auto", dtype == "bf16")
            if isinstance(theirs, dict)
            else theirs in ("auto", value)
        )
        if not same:
            raise UserError(
                f"deepspeed.{key}: {theirs!r} contradicts the run's {value!r}; leave it out"
            )
        raw[key] = theirs | value if isinstance(theirs, dict) else value
    raw.setdefault("zero_allow_untested_optimizer", True)
    raw.setdefault("steps_per_print", 2**31 - 1)
    _fill_optimizer(raw, train)
    _fill_auto(raw, model_config)
    return raw


def check_batch_sizes(config: Config, world_size: int) -> None:
    """UserError when `train.global_batch_size` is not micro x accumulation x ranks."""
    train = config.train
    product = train.micro_batch_size * train.gradient_accumulation * world_size
    if train.global_batch_size not in (None, product):
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is not micro_batch_size "
            f"{train.micro_batch_size} x gradient_accumulation {train.gradient_accumulation} x "
            f"{world_size} ranks = {product}; change one of them"
        )


def _fill_auto(raw: dict[str, Any], model_config: Any | None) -> None:
    """Two LM heads (student, teacher) and two blocks must fit among the live parameters."""
    text = model_config.get_text_config() if model_config is not None else None
    hidden = getattr(text, "hidden_size", 4096)
    vocabulary = getattr(text, "vocab_size", 128256)
    block = 12 * hidden * hidden
    values = {
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_max_live_parameters": max(10**9, 2 * vocabulary * hidden + 2 * block),
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "reduce_bucket_size": max(hidden * hidden, 10**6),
    }
    zero = raw.get("zero_optimization", {})
    for key, value in values.items():
        if zero.get(key) == "auto":
            zero[key] = value
    unknown = next(_autos(raw), None)
    if unknown is not None:
        raise UserError(f"deepspeed.{unknown}: 'auto' cannot be filled in here; give a value")


def _fill_optimizer(raw: dict[str, Any], train: TrainConfig) -> None:
    """An optimizer's `"auto"` parameters are the run's."""
    params = (raw.get("optimizer") or {}).get("params") or {}
    ours = {"lr": train.lr, "betas": list(train.betas), "weight_decay": train.weight_decay}
    for key, value in ours.items():
        if params.get(key) == "auto":
            params[key] = value
    if params.get("eps") == "auto":
        del params["eps"]  # the optimizer's own


def _autos(value: Any, path: str = "") -> Iterator[str]:
    """Where an `"auto"` is left."""
    if value == "auto":
        yield path
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _autos(below, f"{path}.{key}".lstrip("."))
