"""What report.json must hold.

The report is read by people, by the README, by the model card and by scripts that compare runs,
so a missing or misspelt key is an error that names its path; keys beyond these are welcome.

    {"base": block, "tuned": block, "train": {"steps", "seconds", "kl", "lambda"}}
    block = {"harmless": {"refusal_rate", "intact_rate", "kl_to_base", "n"},
             "attacks": {name: {"refused", "useful", "gibberish", "n", "relative_push"}},
             "separation": {layer: {"distance", "distance_over_base", "probe_accuracy",
                                    "norm_ratio"}}}

Rates are in 0..1. `null` means not measured, or not finite (then named under "warnings"); JSON has
no NaN. The optional `train.layers` tells separated layers from others when `separation` lists both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from es2fast.errors import UserError

BLOCKS = ("base", "tuned")

Rate = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[float, Field(ge=0)]
SLACK = 0.005  # three rates rounded to two or three digits may add up to slightly more than 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=False)


class Harmless(_Part):
    """What the model still does for harmless prompts."""

    refusal_rate: Rate
    intact_rate: Rate | None
    kl_to_base: float | None  # nats per token; an estimate may fall just below 0
    n: int = Field(ge=1)


class Attack(_Part):
    """How the held-out harmful prompts ended under one attack; each prompt ends one way."""

    refused: Rate
    useful: Rate
    gibberish: Rate
    n: int = Field(ge=1)
    relative_push: Magnitude | None  # mean |ε| / ‖h‖ of the push; null where nothing is pushed

    @model_validator(mode="after")
    def _one_outcome_each(self) -> Attack:
        total = self.refused + self.useful + self.gibberish
        if total > 1 + SLACK:
            raise ValueError(f"refused + useful + gibberish is {total:.3f}, expected at most 1")
        return self


class Separation(_Part):
    """Geometry of the two groups at the output of one decoder block."""

    distance: Magnitude | None
    distance_over_base: Magnitude | None
    probe_accuracy: Rate | None
    norm_ratio: Magnitude | None


class Block(_Part):
    """Everything measured on one model."""

    harmless: Harmless
    attacks: dict[str, Attack]
    separation: dict[Annotated[str, Field(pattern=r"^\d+$")], Separation]


class Train(_Part):
    """How the tuned model came about."""

    steps: int = Field(ge=0)
    seconds: Magnitude
    kl: float | None
    weight: float | None = Field(alias="lambda")
    layers: list[int] | None = None


class Report(_Part):
    """report.json; at least one of the two models was evaluated."""

    base: Block | None = None
    tuned: Block | None = None
    train: Train | None = None

    @model_validator(mode="after")
    def _some_model(self) -> Report:
        if self.base is None and self.tuned is None:
            raise ValueError("base, tuned: required, at least one of them")
        return self


def plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that JSON can hold: text keys, Python numbers, `null` for NaN and infinities.

    What was not finite is listed under "warnings", so that a diverged KL does not pass for one
    that was never measured. An empty `train` counts as absent.
    """
    lost: list[str] = []
    copy = _plain(report, (), lost)
    if not copy.get("train"):
        copy.pop("train", None)
    if lost:
        copy["warnings"] = [*copy.get("warnings", []), *(f"{path}: not finite" for path in lost)]
    return copy


def check_report(report: Mapping[str, Any]) -> None:
    """Checks a report against the schema.

    Raises:
        UserError: naming the path of the first missing or invalid key.
    """
    if not isinstance(report, Mapping):
        raise UserError(f"report: expected a mapping, found {type(report).__name__}")
    clean = plain(report)
    try:
        Report.model_validate(clean)
    except ValidationError as error:
        raise UserError(_explain(error, clean)) from None


def blocks(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The models that were evaluated, base first."""
    return {name: report[name] for name in BLOCKS if report.get(name) is not None}


def separated_layers(report: Mapping[str, Any]) -> list[int]:
    """`train.layers` when given, otherwise every layer that a block reports on."""
    named = (report.get("train") or {}).get("layers")
    return sorted(named) if named else reported_layers(report)


def reported_layers(report: Mapping[str, Any]) -> list[int]:
    """Every layer that a block reports on, ascending."""
    return sorted({int(key) for block in blocks(report).values() for key in block["separation"]})


def attack_names(report: Mapping[str, Any]) -> list[str]:
    """Attacks on any of the models, in the order in which they were reported."""
    return list(dict.fromkeys(name for b in blocks(report).values() for name in b["attacks"]))


def _plain(value: Any, path: tuple[str, ...], lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(child, (*path, str(key)), lost) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child, (*path, str(i)), lost) for i, child in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist(), path, lost)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost.append(".".join(path))
        return None
    return str(value)


def _explain(error: ValidationError, report: dict[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "missing":
        return f"report: {path}: required and not given"
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return f"report: {message}"
    if first["type"] == "value_error":
        return f"report: {path}: {message}"
    if f"{path}: not finite" in report.get("warnings", []):
        return f"report: {path}: expected a finite number"
    return f"report: {path}: {message[0].lower()}{message[1:]}, found {first['input']!r}"
