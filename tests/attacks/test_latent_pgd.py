"""Latent PGD on random models: the bound, where it acts, and that it gets the loss down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import TEXTS, failing_head, prompts, state_of, tiny_target

from es2fast.attacks.base import Answer
from es2fast.attacks.prompts.embeddings import frozen, layout, target_losses
from es2fast.attacks.states.latent_pgd import LatentPgd, LatentPgdSettings, perturbed, spread
from es2fast.errors import UserError
from es2fast.modeling.taps import causal_lm, tapped

SMALL = {"steps": 12, "target": "sure here is {prompt} .", "layer": 1}


def attack(**more: object) -> LatentPgd:
    return LatentPgd(LatentPgdSettings(**(SMALL | more)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_every_token_keeps_to_the_bound(dtype: torch.dtype, epsilon: float) -> None:
    target, one = tiny_target(dtype=dtype), attack()
    rows = one.rows(target, prompts(*TEXTS))
    with frozen(target.model):
        delta, first, losses = one.fit(target, rows, 1, epsilon)
    batch = target.formatter.pad([row.before for row in rows])
    with torch.no_grad(), tapped(target.model, [1], lambda hidden: hidden) as kept:
        target.model(**batch)
    limit = epsilon * kept[1].float().norm(dim=-1)
    real = batch["attention_mask"].bool()
    slack = 1e-5 if dtype == torch.float32 else 0.05  # targets of other lengths, other rounding
    assert delta.dtype == torch.float32 and delta.shape == kept[1].shape
    assert (delta.norm(dim=-1)[real] <= limit[real] * (1 + slack)).all()
    assert (delta.norm(dim=-1)[real] > 0.5 * limit[real]).any()
    assert (delta[~real] == 0).all()
    assert (losses < first).all()


def test_larger_bounds_reach_lower_losses_and_beat_noise() -> None:
    target, one = tiny_target(), attack(steps=30)
    rows = one.rows(target, prompts(*TEXTS))
    batch = layout(target.model, rows, 0, target.device)
    means = []
    with frozen(target.model):
        for epsilon in (0.1, 0.3, 1.0):
            delta, first, losses = one.fit(target, rows, 1, epsilon)
            noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
            noise *= delta.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            with torch.no_grad(), perturbed(target.model, 1, noise):
                assert (losses < target_losses(target.model, batch, batch.embeddings)).all()
            with torch.no_grad(), perturbed(target.model, 1, delta):
                again = target_losses(target.model, batch, batch.embeddings)
            torch.testing.assert_close(again, losses)
            means.append(float(losses.mean()))
    assert float(first.mean()) > means[0] > means[1] > means[2]


def test_first_step_is_down_the_gradient_of_plain_autograd_in_fp64() -> None:
    target, one = tiny_target(dtype=torch.float64), attack(steps=1, step=0.5)
    (row,) = one.rows(target, prompts(TEXTS[1]))
    with frozen(target.model):
        delta, _, _ = one.fit(target, [row], 1, 0.01)
    states: list[torch.Tensor] = []

    def keep(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        states.append(output.detach().requires_grad_())
        return states[0]

    handle = target.model.model.layers[1].register_forward_hook(keep)
    ids = torch.tensor([[*row.before, *row.target]])
    logits = target.model(ids, use_cache=False).logits[0, len(row.before) - 1 : -1]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target))
    (gradient,) = torch.autograd.grad(loss, states[0])
    prompt = gradient[0, : len(row.before)]
    size = states[0][0, : len(row.before)].norm(dim=-1, keepdim=True)
    wanted = -0.5 * 0.01 * size * prompt / prompt.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(delta[0], wanted.detach(), rtol=1e-8, atol=1e-14)


def test_only_the_prompt_is_perturbed_and_only_once() -> None:
    target = tiny_target()
    model, ids = target.model, torch.arange(6, 14)[None].repeat(2, 1)
    delta = torch.ones(2, 5, 32)
    with torch.no_grad(), tapped(model, [1], lambda hidden: hidden) as kept:
        model(ids)
        clean = kept[1]
    every = perturbed(model, 1, delta), tapped(model, [0, 1], lambda hidden: hidden)
    with torch.no_grad(), every[0], every[1] as kept:
        model(ids)
        torch.testing.assert_close(kept[1][:, :5], clean[:, :5] + 1)
        assert torch.equal(kept[1][:, 5:], clean[:, 5:])
        model(ids)  # the next pass is a decoding step when text is generated
        assert torch.equal(kept[1], clean)


def test_answers_are_those_of_the_perturbed_prompt() -> None:
    """Step by step without a cache, the same perturbation on the prompt's columns each time."""
    target, one = tiny_target(), attack(epsilons=[1.0])
    (row,) = one.rows(target, prompts(TEXTS[1]))
    with frozen(target.model):
        delta, _, _ = one.fit(target, [row], 1, 1.0)
    ids = list(row.before)
    for _ in range(target.max_new_tokens):
        with torch.no_grad(), perturbed(target.model, 1, delta):
            logits = target.model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in target.formatter.stop_token_ids:
            break
    wanted = target.formatter.decode(ids[len(row.before) :])
    (found,) = one.answers(target, prompts(TEXTS[1]))
    assert found[0].text == wanted != target.generate(prompts(TEXTS[1]))[0]


def test_what_shares_a_batch_does_not_change_a_row() -> None:
    target, one = tiny_target("qwen3", dtype=torch.float64), attack()
    rows = one.rows(target, prompts(*TEXTS[:2]))
    with frozen(target.model):
        both, _, losses = one.fit(target, rows, 1, 0.3)
        for number, row in enumerate(rows):
            alone, _, loss = one.fit(target, [row], 1, 0.3)
            torch.testing.assert_close(losses[number], loss[0], rtol=1e-8, atol=0)
            own = both[number, -len(row.before) :]
            torch.testing.assert_close(own, alone[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("lora", [False, True])
def test_a_curve_over_the_bounds_and_the_same_again(lora: bool) -> None:
    runs = []
    for _ in range(2):
        target, one = tiny_target(lora=lora), attack(layer=None, candidates=2, steps=4)
        before = state_of(target.model)
        one.prepare(target)
        runs.append((one.summary(), one.answers(target, prompts(*TEXTS[:2]))))
        assert state_of(target.model) == before
    assert runs[0] == runs[1]
    summary, answers = runs[0]
    best = max(summary["trials"], key=lambda trial: (trial["useful"], -trial["loss"]))
    assert len(summary["trials"]) == 2 and summary["layers"] == [best["layer"]]
    epsilons = [answer.parameters["epsilon"] for answer in answers[0]]
    assert epsilons == [0.1, 0.3, 1.0] and len(answers) == 2


def test_recorded_trials_lead_to_the_same_block() -> None:
    kept: dict[str, list[Answer]] = {}

    def record(name: str, parameters: Any, prompts: Any, answer: Any) -> list[Answer]:
        key = repr(parameters)
        fresh = key not in kept
        made.append(fresh)
        if fresh:
            kept[key] = answer()
        return kept[key]

    summaries = []
    for fresh in (True, False):
        made: list[bool] = []
        one = attack(layer=None, candidates=3, steps=2)
        one.prepare(tiny_target(recorder=record))
        summaries.append(one.summary())
        assert made == 3 * [fresh]
    assert summaries[0] == summaries[1]


def test_hooks_and_flags_after_an_exception() -> None:
    target = tiny_target()
    target.model.train()
    before = state_of(target.model)
    with failing_head(target.model), pytest.raises(RuntimeError, match="head"):
        attack().answers(target, prompts(*TEXTS))
    assert state_of(target.model) == before
    assert causal_lm(target.model).training


def test_blocks_to_try() -> None:
    assert spread(32, 4) == [3, 11, 19, 27]
    assert spread(1, 4) == [0]
    with pytest.raises(UserError, match="block 9"):
        attack(layer=9).prepare(tiny_target())
