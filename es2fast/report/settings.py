"""The settings of a run that a reader of its report or model card asks for first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from es2fast.config import Config, RefusalConfig, SeparationConfig


def _options(separation: SeparationConfig) -> str:
    """The settings of the separation that are not at their defaults."""
    words = []
    if separation.weight != 1.0:
        words.append(f"weight {separation.weight:g}")
    if separation.space != "residual":
        words.append(f"{separation.space} states")
    if separation.moves != "both":
        words.append(f"moves the {separation.moves} states alone")
    if separation.ramp:
        words.append(f"margin grows over {separation.ramp:g} of the steps")
    if separation.norm_band is not None:
        words.append("norm band {:g} to {:g} of the base".format(*separation.norm_band))
    if separation.bank:
        words.append(f"bank of {separation.bank}")
    if separation.robust.probability:
        robust = separation.robust
        words.append(
            f"{', '.join(robust.attacks)} simulated in {robust.probability:g} of the steps"
        )
    return "".join(f", {word}" for word in words)


def _anchor(refusal: RefusalConfig) -> str:
    """The refusal anchor in words."""
    if not refusal.weight:
        return "none"
    words = f"weight {refusal.weight:g}, {refusal.tokens} tokens with decay {refusal.decay:g}, "
    words += {"auto": "own refusals", "column": "response column", "list": "given texts"}[
        refusal.source
    ]
    deep = refusal.prefill
    if deep.probability:
        words += (
            f", {deep.probability:g} of the rows after up to {deep.tokens} tokens of an opening"
        )
    return words


def config_rows(config: Config, layers: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """The settings that a reader of a report asks for first, as (name, value).

    Args:
        config: the run's configuration.
        layers: what `layers: auto` became, when known.
    """
    train, kl = config.train, config.kl
    chosen = _words(list(layers) if layers else config.layers)
    if layers and config.layers == "auto":
        chosen += " (chosen by probes)"
    separation = config.separation
    margin = "" if separation.margin is None else f", margin {separation.margin:g}"
    margin += "" if not margin or separation.loss == "cosine" else " × d0"
    weight = f"λ = {kl.weight:g}"
    if kl.budget is not None:
        weight = f"λ adaptive from {kl.weight:g}, budget {kl.budget:g} nats/token"
    seen = f"{kl.positions} tokens"
    if kl.first_weight != 1:
        seen += f", a response's first {kl.first_tokens} weighing {kl.first_weight:g}"
    pairs = f"{train.micro_batch_size} × {train.gradient_accumulation}"
    lora = f", r = {train.lora.r}, alpha = {train.lora.alpha:g}"
    return [
        ("layers", chosen),
        (
            "separation loss",
            separation.loss + margin + _options(separation),
        ),
        ("layer weights", _words(config.separation.weights or "1 each")),
        ("refusal anchor", _anchor(config.refusal)),
        ("KL", f"{kl.direction}, temperature {kl.temperature:g}, {seen}; {weight}"),
        ("trainable", train.trainable + (lora if train.trainable == "lora" else "")),
        ("teacher", train.teacher),
        ("optimizer steps", str(train.steps)),
        ("pairs per rank and step (micro-batch × accumulation)", pairs),
        ("learning rate", f"{train.lr:g}, {train.schedule}, warm-up {train.warmup_ratio:g}"),
        ("weight decay, gradient clipping", f"{train.weight_decay:g}, {train.max_grad_norm:g}"),
        ("precision, seed", f"{config.model.dtype}, {train.seed}"),
    ]


def _words(value: Any) -> str:
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)
