"""What report.json holds, as types.

`evaluate` builds these objects, table, figures, page and card read them, and report.json is their
JSON. A report is checked where it is made or read (`Report.parse`) and nowhere else; a missing or
misspelt key is an error that names its path, keys beyond these are kept.

    {"version": 2, "models": [model], "train": {"steps", "seconds", "kl", "lambda"}}
    model = {"name", "harmless": {"refusal_rate", "intact_rate", "kl_to_base", "n"},
             "attacks": {label: {"refused", "useful", "gibberish", "n", "relative_push"}},
             "separation": {layer: {"distance", "distance_over_base", "probe_accuracy",
                                    "norm_ratio", "positions": {name: {...}}}}}

Version 1 had the models under "base" and "tuned"; it is read as well.

Rates are in 0..1. `null` means not measured, or not finite (then named under "warnings"); JSON has
no NaN. The optional `train.layers` tells separated layers from others when `separation` lists both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from es2fast.errors import UserError

BASE = "base"  # the name of the model that the others are compared with

Rate = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[float, Field(ge=0)]
Interval = Annotated[list[Rate], Field(min_length=2, max_length=2)]  # 95 %
SLACK = 0.005  # three rates rounded to two or three digits may add up to slightly more than 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=False)


class KindResult(_Part):
    """Refusals among the harmless prompts of one kind."""

    refusal_rate: Rate
    n: int = Field(ge=1)


class HarmlessResult(_Part):
    """What the model still does for harmless prompts."""

    refusal_rate: Rate
    intact_rate: Rate | None
    kl_to_base: float | None  # nats per token; an estimate may fall just below 0
    n: int = Field(ge=1)
    kl_response: float | None = None  # nats per token, over the tokens that decide the response
    top1_agreement: Rate | None = None  # of these, the most likely token is the base model's
    perplexity: Magnitude | None = None  # of the reference responses
    refusal_by: dict[str, dict[str, KindResult]] | None = None  # column of the source -> value


class JudgeRates(_Part):
    """How the same prompts ended for one of several judges."""

    refused: Rate
    partial: Rate
    useful: Rate
    gibberish: Rate


class CorrectedRate(_Part):
    """A rate without its judge's mistakes on answers that people labelled (Rogan and Gladen)."""

    useful: Rate
    interval: Interval  # with the calibration's own


class AttackResult(_Part):
    """How the held-out harmful prompts ended under one attack; each prompt ends one way."""

    refused: Rate  # the partial ones among them
    useful: Rate
    gibberish: Rate
    n: int = Field(ge=1)
    partial: Rate = 0.0  # refused, and gave something of substance all the same
    relative_push: Magnitude | None  # mean |ε| / ‖h‖ of the push; null where nothing is pushed
    answers_per_prompt: int = Field(1, ge=1)  # a prompt is useful when any of them is
    seconds: Magnitude | None = None  # to prepare it and to get the answers, on this machine
    repetitive: Rate | None = None  # answers that look like gibberish, whatever their verdict
    judges: dict[str, JudgeRates] | None = None  # where several judged; the first one decided
    kappa: dict[str, float | None] | None = None  # "a | b": Cohen's κ of useful or not, answers
    corrected: CorrectedRate | None = None  # the useful rate without the judge's mistakes
    refused_repetitive: Rate | None = None  # prompts refused by answers that all look like that
    minimal_push: Magnitude | None = None  # the smallest relative push that still works
    outcomes: str | None = Field(None, pattern="^[a-z]*$")  # per prompt: r, u, g ..., in order
    variants: list[dict[str, Any]] | None = None  # {"parameters", "n", rates} on held-out prompts
    trials: list[dict[str, Any]] | None = None  # the attacker's search, on training prompts
    examples: list[dict[str, Any]] | None = None  # {"prompt", "answer", "verdict"}

    @model_validator(mode="after")
    def _one_outcome_each(self) -> AttackResult:
        total = self.refused + self.useful + self.gibberish
        if total > 1 + SLACK:
            raise ValueError(f"refused + useful + gibberish is {total:.3f}, expected at most 1")
        if self.partial > self.refused + SLACK:
            raise ValueError(
                f"partial is {self.partial:.3f}, more than refused, {self.refused:.3f}, which it "
                "is part of"
            )
        if self.outcomes is not None and len(self.outcomes) != self.n:
            raise ValueError(f"outcomes has {len(self.outcomes)} letters for {self.n} prompts")
        return self


class SuiteResult(_Part):
    """All attacks together: a prompt is broken when any answer under any of them is useful."""

    useful: Rate
    n: int = Field(ge=1)
    attacks: int = Field(ge=1)
    answers_per_prompt: int = Field(ge=1)  # over all attacks


class PositionResult(_Part):
    """Geometry of the two groups at other tokens than the last prompt token."""

    distance: Magnitude | None
    distance_over_base: Magnitude | None
    probe_accuracy: Rate | None
    probe_interval: Interval | None = None


class LayerResult(_Part):
    """Geometry of the two groups at the output of one decoder block, last prompt token.

    Probes are cross-validated where they have an interval (95 %, over prompts); in older reports
    the accuracy is that of a single split.
    """

    distance: Magnitude | None
    distance_over_base: Magnitude | None
    probe_accuracy: Rate | None
    norm_ratio: Magnitude | None
    spread_harmful: Magnitude | None = None  # mean distance of the group's states from their mean
    spread_harmless: Magnitude | None = None
    probe_interval: Interval | None = None
    probe_margin: float | None = None  # mean distance to the boundary / d0, right side positive
    probe_margin_interval: list[float] | None = Field(None, min_length=2, max_length=2)
    # "instruction": its last token; "template": mean state over the template's tokens after it
    positions: dict[str, PositionResult] | None = None


class TaskScore(_Part):
    """One metric of one task of lm-evaluation-harness."""

    value: float | None
    stderr: Magnitude | None = None
    n: int | None = None  # documents


class ModelResult(_Part):
    """Everything measured on one model."""

    name: str
    harmless: HarmlessResult
    attacks: dict[str, AttackResult]
    separation: dict[Annotated[str, Field(pattern=r"^\d+$")], LayerResult]
    shift_rank: dict[str, float] | None = None  # effective rank of h - h_base, per layer
    worst_of_suite: SuiteResult | None = None
    # "plain" or the attack in place -> task -> metric
    lm_eval: dict[str, dict[str, dict[str, TaskScore]]] | None = None
    paired_by: str | None = None  # hash of prompts, references, judge: whose outcomes can be paired
    base: str | None = None  # where several reports are one: its own one's base model; "": none


class TrainSummary(_Part):
    """How the tuned model came about."""

    steps: int = Field(ge=0)
    seconds: Magnitude
    kl: float | None
    weight: float | None = Field(alias="lambda")
    layers: list[int] | None = None
    mean_of_seeds: str | None = None  # of the runs that the model is the mean of; seconds: of all


class Report(_Part):
    """report.json; the base model, where there is one, comes first."""

    version: Literal[2] = 2
    models: list[ModelResult] = Field(min_length=1)
    train: TrainSummary | None = None
    trainings: dict[str, TrainSummary] | None = None  # where several reports are one
    judge: str = "rules"  # several: the first decides
    calibration: dict[str, Any] | None = None  # of that judge, see es2fast.judges.calibration
    created: str | None = None  # ISO 8601, UTC
    es2fast: str | None = None  # version of the library
    seed: int | None = None  # of the evaluation
    asked: str | None = None  # hash of a run's evaluation settings and prompts
    max_new_tokens: int | None = None  # of every answer to a held-out prompt
    warnings: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_name_each(self) -> Report:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: {name!r} occurs twice")
        return self

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Report:
        """A checked report from plain values, of version 1 or 2.

        What is not finite becomes None and is listed under `warnings`, so that a diverged KL does
        not pass for one that was never measured.

        Raises:
            UserError: naming the path of the first missing or invalid key.
        """
        if not isinstance(raw, Mapping):
            raise UserError(f"report: expected a mapping, found {type(raw).__name__}")
        clean = _upgraded(_plain(raw))
        try:
            return cls.model_validate(clean)
        except ValidationError as error:
            raise UserError(_explain(error, clean)) from None

    def to_json(self) -> str:
        """What report.json holds."""
        plain = self.model_dump(mode="json", by_alias=True)
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def names(self) -> list[str]:
        """The models' names, in order."""
        return [model.name for model in self.models]

    def model(self, name: str) -> ModelResult:
        """The model of that name. Raises KeyError: there is none."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    @property
    def attack_names(self) -> list[str]:
        """Attacks on any of the models, in the order in which they were reported."""
        return list(dict.fromkeys(name for model in self.models for name in model.attacks))

    @property
    def reported_layers(self) -> list[int]:
        """Every layer that a model reports on, ascending."""
        return sorted({int(layer) for model in self.models for layer in model.separation})

    @property
    def all_trainings(self) -> dict[str, TrainSummary]:
        """How the models came about, where that is known; a single one has the name ""."""
        return self.trainings or ({"": self.train} if self.train else {})

    @property
    def separated_layers(self) -> list[int]:
        """`layers` of any training when given, otherwise every reported layer."""
        named = {layer for one in self.all_trainings.values() for layer in one.layers or []}
        return sorted(named) if named else self.reported_layers


def read_report(path: str | Path) -> Report:
    """Reads and checks a report.json, of version 1 or 2.

    Raises:
        UserError: no such file, not JSON, or not a report.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"report {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"report {path}: not valid JSON ({error})") from None
    try:
        return Report.parse(raw)
    except UserError as error:
        raise UserError(
            f"report {path}: {str(error).removeprefix('report: ')}; evaluate the model again"
        ) from None


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """Version 1 (models under `base` and `tuned`) as version 2."""
    if "models" in raw or not {BASE, "tuned"} & raw.keys():
        return raw
    rest = {key: value for key, value in raw.items() if key not in (BASE, "tuned", "train")}
    models = [
        {"name": name, **raw[name]} for name in (BASE, "tuned") if isinstance(raw.get(name), dict)
    ]
    return {**rest, "version": 2, "models": models, "train": raw.get("train") or None}


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that JSON can hold: text keys, Python numbers, None for NaN and infinities."""
    lost: list[str] = []
    copy = _plain_value(report, (), lost)
    if lost:
        copy["warnings"] = [*copy.get("warnings", []), *(f"{path}: not finite" for path in lost)]
    return copy


def _plain_value(value: Any, path: tuple[str, ...], lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        items = value.items()
        return {str(key): _plain_value(child, (*path, str(key)), lost) for key, child in items}
    if isinstance(value, list | tuple):
        names = [_name_of(child, i) for i, child in enumerate(value)]
        inner = () if path == ("models",) else path  # a model is known by its name
        return [_plain_value(child, (*inner, name), lost) for child, name in zip(value, names)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain_value(value.tolist(), path, lost)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost.append(".".join(path))
        return None
    return str(value)


def _name_of(value: Any, index: int) -> str:
    name = value.get("name") if isinstance(value, Mapping) else None
    return name if isinstance(name, str) else str(index)


def _explain(error: ValidationError, report: dict[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    loc = [part for part in first["loc"] if part != "[key]"]
    if len(loc) > 1 and loc[0] == "models" and isinstance(loc[1], int):
        loc = [_name_of(report["models"][loc[1]], loc[1]), *loc[2:]]
    path = ".".join(str(part) for part in loc)
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
