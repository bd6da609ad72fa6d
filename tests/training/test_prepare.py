"""Layers, base distances, norms and whitening, against plain loops over the prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, write_prompts
from torch import Tensor

from es2fast.config import parse_config
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm
from es2fast.modeling.taps import backbone
from es2fast.ops.separation.whitening import Whitening
from es2fast.probing.causal import refusal_effects
from es2fast.training.plan import Plan, make_plan
from es2fast.training.prepare import Prepared, measure

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    raw: dict[str, Any] = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data"),
        "separation": {"loss": "fisher", "margin": 3.0},
        "train": {"device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    return make_plan(parse_config(raw))


def measured(plan: Plan, **options: Any) -> tuple[Any, Prepared]:
    model = load_causal_lm(plan.config.model, "fp32").eval()
    return model, measure(plan, model, backbone(model), ALONE, **options)


def last_states(model: Any, plan: Plan, prompts: Any, layer: int) -> Tensor:
    """(n, H), one prompt at a time, by transformers' own option."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([plan.formatter.prompt_ids(prompt)])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        rows.append(out.hidden_states[layer + 1][0, -1])
    return torch.stack(rows)


def test_only_the_named_layers_are_looked_at(plan: Plan) -> None:
    named = plan.config.model_copy(update={"layers": [3, 1]})
    _, found = measured(dataclasses.replace(plan, config=named))
    _, every = measured(plan)
    assert found.layers == [1, 3] == sorted(found.d0)
    assert found.table == [dataclasses.replace(every.table[i], effect=None, effect_interval=None)
                           for i in (1, 3)]  # fmt: skip


@pytest.mark.parametrize("blocks_at_once", [1, 4])
def test_whatever_memory_there_is_the_measures_are_those_of_plain_loops(
    plan: Plan, blocks_at_once: int
) -> None:
    """With one block at a time the chosen ones have gone by the time they are chosen."""
    model, found = measured(plan, memory=blocks_at_once * 4 * 24 * 32)
    assert [row.layer for row in found.table] == [0, 1, 2, 3]
    assert found.layers == sorted(found.d0) == sorted(found.whitening) and len(found.layers) == 2
    for layer in found.layers:
        assert layer < 3  # the option's last entry comes after the final norm
        a, b = (last_states(model, plan, group, layer)
                for group in (plan.groups.harmful, plan.groups.harmless))  # fmt: skip
        pairs = [(x.double() - y.double()).norm().item() for x in a for y in b]
        assert found.d0[layer] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
        norm = torch.cat([a, b]).norm(dim=-1).mean().item()
        assert found.norm0[layer] == pytest.approx(norm, rel=1e-5)
        w = Whitening.fit(a, b)
        whitened = [w((x - y)[None].double()).norm().item() for x in a for y in b]
        expected = sum(whitened) / len(whitened)
        assert found.whitened0[layer] == pytest.approx(expected, rel=1e-4)


def test_the_effect_on_the_refusal_is_that_of_the_groups_own_gap(plan: Plan) -> None:
    model, found = measured(plan, refusals=["please draw .", "sure ."])
    words = plan.formatter.tokenizer
    starts = words.convert_tokens_to_ids(["please", "sure"])
    gaps = {
        layer: last_states(model, plan, plan.groups.harmless, layer).mean(0)
        - last_states(model, plan, plan.groups.harmful, layer).mean(0)
        for layer in range(3)
    }
    wanted = refusal_effects(
        model, plan.formatter, plan.groups.harmful, gaps, sorted(starts), ALONE
    )
    for layer in range(3):
        row = found.table[layer]
        assert row.effect == pytest.approx(wanted[layer].mean().item(), abs=1e-4)
        assert row.effect_interval[0] <= row.effect <= row.effect_interval[1]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "not measured: the tokenizer knows no word that a refusal starts with"),
        ({"separation": {"space": "normed"}}, "not measured: separation.space=normed"),
        ({"layer_choice": {"causal": False}}, "of |h|), chosen in"),
        ({"layers": [0, 1]}, "given by the configuration"),
    ],
)
def test_without_that_effect_the_reason_says_why(
    plan: Plan, changes: dict[str, Any], reason: str
) -> None:
    raw = plan.config.model_dump(mode="json")
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    _, found = measured(dataclasses.replace(plan, config=parse_config(raw)))
    assert reason in found.reason and all(row.effect is None for row in found.table)
    assert ("not measured" in found.reason) == ("not measured" in reason)


def test_equal_states_are_named(plan: Plan) -> None:
    same = plan.groups.harmless[:1] * 6
    plan.groups.harmful[:], plan.groups.harmless[:] = same, same
    with pytest.raises(UserError, match=r"same state at block \d \(distance 0\)"):
        measured(plan)
