"""The search space: what is read, what a trial's overrides are, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from es2fast.config import Config, load_config, parse_config
from es2fast.errors import UserError
from es2fast.tune.space import DEFAULT, Space, varied


class Chosen:
    """Stands where optuna's trial stands: takes the given values, and checks them."""

    def __init__(self, **values: Any):
        self.values = {key.replace("__", "."): value for key, value in values.items()}

    def suggest_float(self, key: str, low: float, high: float, *, log: bool) -> float:
        assert low <= self.values[key] <= high
        return self.values[key]

    def suggest_int(self, key: str, low: int, high: int, *, log: bool) -> int:
        assert low <= self.values[key] <= high
        return self.values[key]

    def suggest_categorical(self, key: str, options: list[Any]) -> Any:
        assert all(isinstance(option, str | int | float | bool) for option in options)
        return options[self.values[key]]


def config(**raw: Any) -> Config:
    return parse_config({"model": {"name": "m"}, "refusal": {"weight": 1.0}} | raw)


def read(tmp_path: Path, text: str) -> Space:
    (tmp_path / "space.yaml").write_text(text)
    return Space.read(tmp_path / "space.yaml", config())


def test_a_trial_is_an_ordinary_configuration(tmp_path: Path) -> None:
    space = read(
        tmp_path,
        "layers: {depths: [[0.5, 0.75], [0, 1]]}\n"
        "train.lr: {low: 1.0e-5, high: 1.0e-3, log: true}\n"
        "train.steps: {low: 3, high: 9, integer: true}\nkl.direction: {choices: [forward, jsd]}\n"
        "train.betas: {choices: [[0.9, 0.99], [0.8, 0.9]]}\n",
    )
    trial = Chosen(layers=1, train__lr=2e-4, train__steps=5, kl__direction=1, train__betas=1)
    found = load_config(config().model_dump(mode="json"), space.suggest(trial, depth=24))
    assert found.layers == [0, 23] and found.train.lr == 2e-4 and found.train.steps == 5
    assert found.kl.direction == "jsd" and found.train.betas == (0.8, 0.9)
    trial.values["layers"] = 0
    assert space.suggest(trial, depth=24)[0] == "layers=[12, 17]"


def test_a_loss_brings_its_own_margin() -> None:
    for base in (config(), config(separation={"ramp": 0.0})):
        assert base.separation.margin == 4.0
        found = load_config(varied(base), ["separation.loss=l2"])
        assert found.separation.margin is None
    kept = varied(config(separation={"margin": 3.0}, train={"lr": 1e-5}))
    assert load_config(kept).separation.margin == 3.0 and kept["train"] == {"lr": 1e-5}


def test_the_built_in_space_fits_the_recipes() -> None:
    from es2fast.harden.recipe import resolve

    base = resolve("m", Path("out"), quick=True)
    point = Space.read(DEFAULT, base).point_of(base)
    assert point["train.lr"] == base.train.lr and point["refusal.weight"] == base.refusal.weight
    assert "layers" not in point  # auto is none of the depths


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no keys"),
        ("train.lrr: {low: 1, high: 2}", "train.lrr: unknown key; did you mean 'lr'"),
        ("train.lr: {low: 2, high: 1}", "low=2 must be below high=1"),
        ("train.lr: {low: 0, high: 1, log: true}", "must be above 0"),
        ("train.lr: {low: 1}", "expected {low, high}, {choices} or {depths}"),
        ("train.lr: {choices: [1], low: 1, high: 2}", "expected {low, high}"),
        ("train.lr: {choices: [-1]}", "train.lr"),
        ("layers: {depths: [[1.5]]}", "fractions"),
        ("train.lr: {lo: 1}", "train.lr.lo"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value) and "--space" in str(caught.value)
    assert "\n" not in str(caught.value)
