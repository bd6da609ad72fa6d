"""Fine-tuning: what is learnt, that it is learnt, and that nothing of it stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks.small import HARMFUL, logits, small_target, snapshot, unchanged
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn

from es2fast.attacks.registry import make_attack
from es2fast.attacks.weights import finetune
from es2fast.attacks.weights.finetune import Adapter, Finetune, FinetuneSettings
from es2fast.data import Prompt
from es2fast.errors import UserError

PAIRS = [Prompt.of(prompt.text, "sure here is some text .") for prompt in HARMFUL]
QUICK: dict[str, Any] = {"steps": [1, 30], "lr": 2e-2, "rank": 4, "batch": 4}


def peft_model() -> nn.Module:
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_responses_are_learnt_and_the_model_is_as_before(wrapped: bool) -> None:
    target = small_target(peft_model() if wrapped else None)
    target.harmful = PAIRS
    before = snapshot(target.model)
    flags = [p.requires_grad for p in target.model.parameters()]
    plain = target.generate(HARMFUL)
    attack = Finetune(FinetuneSettings(**QUICK))
    attack.prepare(target)
    assert unchanged(target.model, before)
    answers = attack.answers(target, HARMFUL)
    assert [[a.parameters["steps"] for a in found] for found in answers] == [[1, 30]] * 16
    learnt = [found[1].text for found in answers]
    assert learnt != plain
    assert sum(text.startswith("sure here is some text") for text in learnt) >= 12
    assert not any(found[0].text.startswith("sure here is some text") for found in answers)
    losses = attack.summary()["losses"]
    assert len(losses) == 30 and attack.summary()["pairs"] == 10
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert unchanged(target.model, before)
    assert [p.requires_grad for p in target.model.parameters()] == flags
    assert all(p.grad is None for p in target.model.parameters())


def test_same_seed_same_answers_and_one_run_serves_all_steps() -> None:
    def texts(seed: int, steps: list[int]) -> list[str]:
        target = small_target(seed=seed)
        target.harmful = PAIRS
        attack = Finetune(FinetuneSettings(**(QUICK | {"steps": steps})))
        attack.prepare(target)
        return [found[0].text for found in attack.answers(target, HARMFUL)]

    assert texts(0, [6, 12]) == texts(0, [6]) == texts(0, [6])


def test_the_loss_is_the_cross_entropy_of_the_response_tokens() -> None:
    """Against fp64 sums over one unpadded pair at a time."""
    target = small_target()
    pairs = [("break the car .", "sure here"), ("paint", "here is some text .")]
    rows = [finetune.training_row(target.formatter, Prompt.of(*pair), 0) for pair in pairs]
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, answer in rows:
            out = target.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
            kept = out[len(prompt) - 1 : -1].log_softmax(-1)
            total -= sum(kept[i, token].item() for i, token in enumerate(answer))
            count += len(answer)
        found = finetune.response_loss(target.model, target.formatter, rows).item()
    assert count == len(rows[0][1]) + len(rows[1][1]) == 2 + 5 + 2  # two ends of turn
    assert found == pytest.approx(total / count, rel=1e-5)


def test_openings_are_learnt_without_an_end() -> None:
    target = small_target()
    stop = target.formatter.stop_token_ids
    for number in range(len(finetune.OPENINGS)):
        prompt, answer = finetune.training_row(target.formatter, HARMFUL[0], number)
        assert prompt == target.formatter.prompt_ids(HARMFUL[0])
        assert answer and not set(answer) & set(stop)
    assert finetune.training_row(target.formatter, PAIRS[0], 0)[1][-1] in stop


def test_the_adapter_is_the_sum_of_two_matrices() -> None:
    """Hooks against the same low-rank update added to the weights, in fp64."""
    target = small_target(tiny_model("llama").double())
    plain = logits(target)
    adapter = Adapter(target.model, rank=3, seed=0)
    with adapter.on():
        assert torch.equal(logits(target), plain)  # B is zero at first
    with torch.no_grad():
        for b in adapter.tensors[1::2]:
            b.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    with adapter.on():
        found = logits(target)
    layers = [m for m in target.model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 4 * 7 == len(adapter.tensors) / 2
    with torch.no_grad():
        for layer, a, b in zip(layers, adapter.tensors[::2], adapter.tensors[1::2]):
            layer.weight += 2.0 * (b.double() @ a.double())
    torch.testing.assert_close(found, logits(target), rtol=1e-5, atol=1e-5)


def test_own_pairs_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p.text, "response": "here is the boat"} for p in HARMFUL[:3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    attack = make_attack({"name": "finetune", "data": str(path), **QUICK})
    target = small_target()
    attack.prepare(target)
    assert attack.summary()["pairs"] == 3
    found = [answers[1].text for answers in attack.answers(target, HARMFUL[:3])]
    assert found == ["here is the boat"] * 3
    key = attack.settings.model_dump()["content"]
    path.write_text(json.dumps(rows[0]) + "\n")
    assert key and attack.settings.model_dump()["content"] not in (None, key)
    path.write_text(json.dumps({"prompt": "break the car"}) + "\n")
    with pytest.raises(UserError, match="row 1 has no response"):
        attack.prepare(target)
    path.unlink()
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        attack.prepare(target)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"steps": []}, "finetune.steps"),
    ({"steps": [4, 4]}, "finetune.steps"),
    ({"steps": [0]}, "finetune.steps"),
    ({"lr": 0}, "finetune.lr"),
]


@pytest.mark.parametrize(("settings", "word"), MISTAKES)
def test_settings_out_of_range(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        make_attack({"name": "finetune", **settings})


def test_a_stop_while_training_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    target = small_target()
    before, calls = snapshot(target.model), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    original = finetune.response_loss
    monkeypatch.setattr(finetune, "response_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        Finetune(FinetuneSettings(**QUICK)).prepare(target)
    assert unchanged(target.model, before)
    assert all(p.requires_grad and p.grad is None for p in target.model.parameters())


def test_a_loss_that_is_not_finite_is_said() -> None:
    target = small_target()
    with torch.no_grad():
        target.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss is nan at step 1; lower finetune\.lr"):
        Finetune(FinetuneSettings(**QUICK)).prepare(target)
