"""What does not fit, and the smallest change that makes it fit.

Changes are tried one at a time, in an order that costs little first, then together from the first
on: gradient checkpointing, LoRA, ZeRO-3, smaller micro-batches, more ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from es2fast.config import Config

MOST_RANKS = 1024
Fits = Callable[[Config, int], bool]


def smallest_change(config: Config, ranks: int, stage: int, fits: Fits) -> list[str] | None:
    """The overrides, `ranks=N` among them; [] where it fits as it is; None where nothing helps.

    Args:
        config: the run.
        ranks: of it.
        stage: the ZeRO stage that it would take.
        fits: whether a run fits on that many ranks.
    """
    if fits(config, ranks):
        return []
    for change in _changes(config, ranks, stage):
        if fits(*_changed(config, ranks, [change])):
            return [change]
    together: list[str] = []
    for change in _changes(config, ranks, stage):
        key = change.split("=")[0]
        together = [other for other in together if other.split("=")[0] != key] + [change]
        if fits(*_changed(config, ranks, together)):
            return together
    return None


def _changes(config: Config, ranks: int, stage: int) -> Iterator[str]:
    train = config.train
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true"
    if train.trainable != "lora":
        yield "train.trainable=lora"
    if stage < 3 and ranks > 1:
        yield "deepspeed=zero3"
    size = train.micro_batch_size
    while size > 1:
        size //= 2
        yield f"train.micro_batch_size={size}"
    while ranks < MOST_RANKS:
        ranks *= 2
        yield f"ranks={ranks}"


def _changed(config: Config, ranks: int, changes: list[str]) -> tuple[Config, int]:
    train, deepspeed = {}, config.deepspeed
    for change in changes:
        key, value = change.split("=")
        if key == "ranks":
            ranks = int(value)
        elif key == "deepspeed":
            deepspeed = value
        else:
            train[key.removeprefix("train.")] = _value(value)
    if train.get("trainable") == "lora":
        train["teacher"] = "auto"
    changed = config.train.model_copy(update=train)
    return config.model_copy(update={"train": changed, "deepspeed": deepspeed}), ranks


def _value(text: str) -> bool | int | str:
    return True if text == "true" else int(text) if text.isdigit() else text
