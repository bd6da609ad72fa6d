"""Whether two configurations are the same run: which fields differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from es2fast.config import Config
from es2fast.distributed.deepspeed_config import AUTO, PRESETS

# no weight depends on them
IRRELEVANT = (
    "evaluate.",
    "checkpoint.",
    "train.log_every",
    "train.report_to",
    "train.bind_cores",
    "data.cache_dir",
    "safeguards.keep_every",
)

CONVERTED = {AUTO, *PRESETS} - {"zero3_offload"}  # of `deepspeed`: one may follow another
ROUNDING = ("train.compile",)  # the same weights to rounding
# how ranks share the work; compared with what a checkpoint was written with, see
# `training.same_run`
SHARING = (
    "train.micro_batch_size",
    "train.gradient_accumulation",
    "train.global_batch_size",
    "train.zero3_head",
)


def differences(old: Config, new: Config) -> Iterator[str]:
    """Fields that differ, with both values where they are short, in the order of the file."""
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (old, new))
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name), after.get(name)
        if a != b and name not in ("train.overwrite", "output_dir"):
            short = len(f"{a}{b}") < 60
            yield f"{name} ({a} there, {b} now)" if short else name


def weighty(config: Config) -> dict[str, Any]:
    """The fields that weights depend on, by their full names, and where they are written."""
    leaves = dict(_leaves(config.model_dump(mode="json")))
    return {name: value for name, value in leaves.items() if not name.startswith(IRRELEVANT)}


def other_run(old: Config, new: Config, *, same_sharing: bool = True) -> str:
    """The fields, in words, by which `new` would train other weights than `old`; "" if none.

    Args:
        same_sharing: also how ranks share a step's rows and, with a preset in `deepspeed`, the
            optimizer's states.
    """
    ignored = IRRELEVANT if same_sharing else (*IRRELEVANT, *SHARING, *ROUNDING)
    if not same_sharing and {str(old.deepspeed), str(new.deepspeed)} <= CONVERTED:
        ignored = (*ignored, "deepspeed")
    names = [name for name in differences(old, new) if not name.startswith(ignored)]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _leaves(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if isinstance(child, dict) and child:
            yield from _leaves(child, f"{path}{key}.")
        else:
            yield f"{path}{key}", child
