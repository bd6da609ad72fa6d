"""Configuration: unknown keys, overrides, consistency, round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from es2fast.config import load_config, parse_config, save_config
from es2fast.errors import UserError

MINIMAL = {"model": {"name": "m"}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model": {"name": "m"}, "trian": {}}, ["trian: unknown key", "did you mean 'train'"]),
        ({"model": {"name": "m"}, "train": {"l_r": 1}}, ["train.l_r: unknown key", "'lr'"]),
        ({"model": {"name": "m"}, "train": {"lora": {"rank": 1}}}, ["train.lora.rank", "unknown"]),
        ({"model": {"name": "m"}, "train": {"lr": -1}}, ["train.lr", "greater than 0", "-1"]),
        ({"model": {"name": "m"}, "layers": []}, ["layers", "empty"]),
        ({"model": {"name": "m"}, "layers": [3, 3]}, ["layers", "[3, 3]", "twice"]),
        ({"model": {"name": "m"}, "data": {"harmful": [{"file": "x"}]}}, ["file", "unknown key"]),
        ({"data": {}}, ["model", "required"]),
        (
            MINIMAL | {"evaluate": {"batch_size": 0}},
            ["evaluate.batch_size: expected auto", "or more, found 0"],
        ),
        (
            {"model": {"name": "m"}, "layers": [1, 2], "separation": {"weights": [1.0]}},
            ["separation.weights", "1 weights for 2 layers"],
        ),
        (
            {"model": {"name": "m"}, "train": {"teacher": "adapters_off"}},
            ["train.teacher", "trainable=lora"],
        ),
        (
            {
                "model": {"name": "m"},
                "train": {"early_stop": True},
                "separation": {"loss": "l2"},
            },
            ["train.early_stop", "l2", "hinge"],
        ),
        (
            {"model": {"name": "m"}, "separation": {"loss": "l2", "margin": 3.0}},
            ["separation", "margin=3", "loss='l2'", "hinge"],
        ),
        (
            {"model": {"name": "m"}, "separation": {"loss": "cosine", "margin": 4.0}},
            ["separation", "margin=4", "cosine"],
        ),
        (
            {"model": {"name": "m"}, "data": {"harmful": [{"source": "x.txt", "rows": 620}]}},
            ["data.harmful", "rows", "620", "rows: '10:20'"],
        ),
        ({"model": {"name": "m"}, "separation": {"margin": -1}}, ["margin=-1", "greater than 0"]),
        (
            {"model": {"name": "m"}, "separation": {"norm_band": [1.5, 2.0]}},
            ["norm_band=[1.5, 2.0]", "low < 1 < high"],
        ),
        (
            {"model": {"name": "m"}, "separation": {"robust": {"probability": 1.0}}},
            ["separation.robust.probability", "less than 1"],
        ),
        (
            {"model": {"name": "m"}, "separation": {"loss": "l2", "ramp": 0.5}},
            ["separation", "ramp=0.5", "loss='l2'", "loss=hinge"],
        ),
        (
            {"model": {"name": "m"}, "kl": {"refused_weight": 0.5}},
            ["kl.refused_weight: 0.5", "'keep'", "data.refused=even"],
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_reach_nested_keys_and_parse_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: m}\ntrain: {lr: 1.0e-5, steps: 3}\n")
    config = load_config(path, ["train.lr=1e-4", "layers=[4, 9]", "kl.budget=0.02"])
    assert config.train.lr == 1e-4
    assert config.train.steps == 3
    assert config.layers == [4, 9]
    assert config.kl.budget == 0.02


@pytest.mark.parametrize("item", ["train.lr", "=3", "model.name.x=1", "train.lr=[1"])
def test_malformed_overrides_are_named(item: str) -> None:
    with pytest.raises(UserError, match="override"):
        load_config(None, ["model.name=m", item])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        load_config(tmp_path / "list.yaml")


def test_saved_configuration_is_complete_and_reloads(tmp_path: Path) -> None:
    config = parse_config(MINIMAL | {"data": {"harmful": "a.txt", "harmless": ["b.txt"]}})
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert "budget_lr" in (tmp_path / "c.yaml").read_text()


@pytest.mark.parametrize(
    ("separation", "margin"),
    [
        ({}, 4.0),
        ({"loss": "softplus"}, 4.0),
        ({"loss": "cosine"}, 0.0),
        ({"loss": "l2"}, None),
        ({"loss": "centroid"}, None),
        ({"loss": "fisher", "margin": 2}, 2.0),
    ],
)
def test_margins_and_what_is_bounded(separation: dict[str, Any], margin: float | None) -> None:
    section = parse_config(MINIMAL | {"separation": separation}).separation
    assert section.margin == margin
    assert section.bounded == (margin is not None)
    if section.bounded:  # a bounded loss has a target to stop at
        parse_config(MINIMAL | {"separation": separation, "train": {"early_stop": True}})


def test_a_source_may_be_a_string_a_mapping_or_a_list() -> None:
    data = parse_config(MINIMAL | {"data": {"harmful": {"source": "a", "limit": 3}}}).data
    assert data.harmful[0].limit == 3
    data = parse_config(MINIMAL | {"data": {"harmful": ["a", {"source": "b"}]}}).data
    assert [s.source for s in data.harmful] == ["a", "b"]
