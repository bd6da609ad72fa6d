"""The search space: which configuration keys vary, and between what.

    train.lr: {low: 3.0e-5, high: 6.0e-4, log: true}      of a range; integer: whole numbers
    kl.direction: {choices: [forward, jsd]}               one of these
    layers: {depths: [[0.35, 0.55], [0.5, 0.7]]}          blocks at these fractions of the depth

Lists among the choices go to optuna as JSON, since it keeps plain values only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from es2fast.config import Config, load_config, read_yaml
from es2fast.errors import UserError

DEFAULT = Path(__file__).parent / "space.yaml"


class Dimension(BaseModel):
    """One key of the space: a range, a list of choices, or sets of depths."""

    model_config = ConfigDict(extra="forbid")

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: list[Any] | None = Field(None, min_length=1)
    depths: list[list[float]] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        ranged = self.low is not None and self.high is not None
        if ranged + (self.choices is not None) + (self.depths is not None) != 1:
            raise ValueError("expected {low, high}, {choices} or {depths}")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"low={self.low:g} must be above 0 with log: true")
        places = [place for places in self.depths or [] for place in places]
        if any(not 0 <= place <= 1 for place in places):
            raise ValueError("depths are fractions of the model's depth, 0 to 1")
        return self

    @property
    def options(self) -> list[Any]:
        """The choices as plain values."""
        found = self.choices if self.choices is not None else self.depths or []
        return [json.dumps(item) if isinstance(item, list | dict) else item for item in found]

    def suggest(self, trial: Any, key: str) -> Any:
        """optuna's value for this trial."""
        if self.low is None or self.high is None:
            return trial.suggest_categorical(key, self.options)
        if self.integer:
            return trial.suggest_int(key, math.ceil(self.low), math.floor(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a configuration's value is a point of this dimension."""
        if self.low is None or self.high is None:
            return self.depths is None and value in self.options
        return isinstance(value, int | float) and self.low <= value <= self.high

    def override(self, value: Any, depth: int) -> Any:
        """optuna's value as the configuration's; depth: blocks of the model."""
        if self.depths is not None:
            places = json.loads(value)
            return sorted({round(place * (depth - 1)) for place in places})
        if self.choices is not None and isinstance(value, str) and value not in self.choices:
            return json.loads(value)
        return value


class Space:
    """All dimensions by configuration key."""

    def __init__(self, dimensions: dict[str, Dimension]):
        self.dimensions = dimensions

    @classmethod
    def read(cls, path: Path, config: Config) -> Space:
        """Reads a space and checks it against the configuration that it varies.

        Raises:
            UserError: unreadable file, no valid dimension, a key that the configuration lacks.
        """
        raw = read_yaml(path, "--space")
        if not raw:
            raise UserError(f"--space {path}: no keys; give at least one to vary")
        dimensions = {}
        for key, value in raw.items():
            try:
                dimensions[key] = Dimension.model_validate(value)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join([str(key), *map(str, first["loc"])])
                message = first["msg"].removeprefix("Value error, ")
                raise UserError(f"--space {path}: {where}: {message}") from None
            try:
                load_config(varied(config), [f"{key}={_sample(dimensions[key])}"])
            except UserError as error:
                raise UserError(f"--space {path}: {error}") from None
        return cls(dimensions)

    def suggest(self, trial: Any, depth: int) -> list[str]:
        """The `key=value` overrides of a trial."""
        found = {key: part.suggest(trial, key) for key, part in self.dimensions.items()}
        return self.overrides(found, depth)

    def overrides(self, parameters: dict[str, Any], depth: int) -> list[str]:
        """`key=value` of optuna's parameters."""
        return [
            f"{key}={json.dumps(self.dimensions[key].override(value, depth))}"
            for key, value in parameters.items()
        ]

    def point_of(self, config: Config) -> dict[str, Any]:
        """The configuration's own point, where it lies in the space: worth to be tried first."""
        point = {}
        for key, dimension in self.dimensions.items():
            value: Any = config.model_dump(mode="json")
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if dimension.holds(value):
                point[key] = value
        return point


def varied(config: Config) -> dict[str, Any]:
    """What was set in a configuration: defaults that follow from other keys stay free to do so."""
    return config.model_dump(mode="json", exclude_unset=True)


def _sample(dimension: Dimension) -> str:
    if dimension.low is not None:
        return json.dumps(math.ceil(dimension.low) if dimension.integer else dimension.low)
    value = dimension.options[0]
    return json.dumps(dimension.override(value, 10))
