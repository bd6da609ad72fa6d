"""The base model's blocks under the tuned ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks.small import HARMFUL, HARMLESS, logits, small_target, snapshot, unchanged
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn

from es2fast.attacks.base import Target
from es2fast.attacks.registry import make_attack
from es2fast.attacks.weights.splice import Splice, SpliceSettings
from es2fast.config import EvaluateConfig
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts, Subject
from es2fast.evaluation.run import evaluate_models
from es2fast.modeling.taps import blocks
from es2fast.report.schema import BASE
from es2fast.run.folder import RunFolder


def changed(model: nn.Module, places: list[int], embedding: bool = False) -> Any:
    """A copy with noise on some blocks."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    parts: list[nn.Module] = [blocks(tuned)[i] for i in places]
    with torch.no_grad():
        for part in [*parts, *([tuned.model.embed_tokens] if embedding else [])]:
            for parameter in part.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return tuned


def pair(tuned: nn.Module, base: nn.Module | None) -> Target:
    return small_target(tuned, load_base=None if base is None else lambda: base)


def test_all_blocks_of_the_base_give_the_base_s_logits() -> None:
    base = tiny_model("llama")
    target = pair(changed(base, [0, 1, 3], embedding=True), base)
    attack = Splice(SpliceSettings(depth=3))
    attack.prepare(target)
    before = snapshot(target.model)
    parts = [target.model.model.embed_tokens, *blocks(target.model)]
    with attack.applied(target.model):
        assert torch.equal(logits(target), logits(small_target(base)))
    assert unchanged(target.model, before)
    assert all(a is b for a, b in zip(parts, [target.model.model.embed_tokens,
                                              *blocks(target.model)]))  # fmt: skip
    assert not torch.equal(logits(target), logits(small_target(base)))
    assert attack.summary() == {"layers": [0, 1, 2, 3]}


def test_by_default_the_deepest_changed_block_stays() -> None:
    base = tiny_model("llama")
    target = pair(changed(base, [0, 2]), base)
    attack = Splice()
    attack.prepare(target)
    assert attack.summary() == {"layers": [0, 1]}
    only = copy.deepcopy(base)
    blocks(only)[2].load_state_dict(blocks(target.model)[2].state_dict())
    with attack.applied(target.model):
        assert torch.equal(logits(target), logits(small_target(only)))
    texts = [found[0].text for found in attack.answers(target, HARMFUL)]
    assert texts == small_target(only).generate(HARMFUL)


def test_under_an_adapter() -> None:
    base = tiny_model("llama")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["o_proj"], layers_to_transform=[0, 1, 2])
    tuned: Any = get_peft_model(copy.deepcopy(base), lora)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    target = pair(tuned.eval(), base)
    attack = Splice()
    attack.prepare(target)
    assert attack.summary() == {"layers": [0, 1]}
    whole = Splice(SpliceSettings(depth=2))
    whole.prepare(target)
    before = snapshot(target.model)
    with whole.applied(target.model):
        assert torch.equal(logits(target), logits(small_target(base)))
    assert unchanged(target.model, before)


def test_blocks_go_back_after_an_error_and_keep_their_mode() -> None:
    base = tiny_model("llama").train()
    target = pair(changed(base, [3]).eval(), base)
    before = snapshot(target.model)
    attack = Splice()
    attack.prepare(target)
    with pytest.raises(RuntimeError, match="stop"), attack.applied(target.model):
        assert not any(part.training for part in blocks(target.model))
        raise RuntimeError("stop")
    assert unchanged(target.model, before)
    assert all(block.training for block in blocks(base))


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, "no base model"),
    ("same", {}, "no block differs"),
    ("lowest", {}, "only block 0 differs"),
    ("deeper", {}, "one architecture"),
    ("lowest", {"depth": 4}, "block 4 is out of range"),
]


@pytest.mark.parametrize(("kind", "settings", "words"), REFUSED)
def test_what_cannot_be_spliced_is_said(kind: Any, settings: dict[str, Any], words: str) -> None:
    model = tiny_model("llama")
    bases = {"same": copy.deepcopy(model), "lowest": changed(model, [0]),
             "deeper": tiny_model("llama", num_hidden_layers=5)}  # fmt: skip
    with pytest.raises(UserError, match=words):
        Splice(SpliceSettings(**settings)).prepare(pair(model, bases.get(kind)))


@pytest.mark.parametrize("others", [["direct"], []])
def test_evaluation_brings_the_base_and_warns_where_there_is_none(
    others: list[str | dict[str, Any]], tmp_path: Path
) -> None:
    base = tiny_model("llama")
    tuned, formatter = changed(base, [2]), small_target().formatter
    prompts = EvaluationPrompts(HARMFUL[:4], HARMLESS[:4], HARMFUL[4:], HARMLESS[4:])
    config = EvaluateConfig(attacks=[*others, "splice"], max_new_tokens=3)
    subjects = [Subject.of(BASE, base, formatter), Subject.of("tuned", tuned, formatter)]
    report = evaluate_models(subjects, prompts, config, RunFolder(tmp_path))
    assert list(report.model(BASE).attacks) == others
    assert list(report.model("tuned").attacks) == [*others, "splice"]
    assert len(report.warnings) == 1 and "base, splice" in report.warnings[0]


def test_answers_of_another_base_are_not_taken_from_the_log(tmp_path: Path) -> None:
    base, formatter = tiny_model("llama"), small_target().formatter
    tuned = changed(base, [3])
    prompts = EvaluationPrompts(HARMFUL[:4], HARMLESS[:4], HARMFUL[4:], HARMLESS[4:])
    config = EvaluateConfig(attacks=["splice", "direct"], max_new_tokens=3)
    asked: list[str] = []

    def run(base: nn.Module) -> None:
        subject = Subject.of("tuned", tuned, formatter)
        subject.load = lambda: asked.append("tuned") or tuned  # type: ignore[func-returns-value]
        before = Subject.of(BASE, base, formatter)
        evaluate_models([before, subject], prompts, config, RunFolder(tmp_path))

    run(base)
    lines = (tmp_path / "answers.jsonl").read_text().count('"splice"')
    run(base)
    assert (tmp_path / "answers.jsonl").read_text().count('"splice"') == lines > 0
    run(changed(base, [1]))
    assert (tmp_path / "answers.jsonl").read_text().count('"splice"') == 2 * lines


def test_by_name() -> None:
    assert make_attack({"name": "splice", "depth": 3}).settings.depth == 3  # type: ignore[attr-defined]
