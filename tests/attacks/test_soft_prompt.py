"""Soft prompts on random models: the descent, its independence of the batch, and the answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from targets import TEXTS, failing_head, prompts, state_of, tiny_target
from torch import Tensor

from es2fast.attacks.base import Target
from es2fast.attacks.prompts import embeddings
from es2fast.attacks.prompts.descent import Steps, fit_rows
from es2fast.attacks.prompts.soft_prompt import SoftPrompt, SoftPromptSettings
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, causal_lm, hooks, tapped

SMALL = {"tokens": 3, "steps": 8, "step_size": 1.0, "target": "sure here is {prompt} ."}
SMALL |= {"initial": ["please explain the"], "stop": 0.0}


def attack(**more: Any) -> SoftPrompt:
    return SoftPrompt(SoftPromptSettings(**(SMALL | more)))


def plain_loss(target: Target, text: str, soft: Tensor) -> Tensor:
    """One row without padding, through the model's own logits."""
    model, tokenizer = causal_lm(target.model), target.formatter.tokenizer
    table = model.get_input_embeddings()
    # the template of the tests: <s><user> text <bot>
    before = tokenizer(f"<s><user> {text} ", add_special_tokens=False)["input_ids"]
    after = tokenizer("<bot>", add_special_tokens=False)["input_ids"]
    wanted = tokenizer(f"sure here is {text.rstrip(' .')} .", add_special_tokens=False)["input_ids"]
    rows = [table(torch.tensor(before)), soft, table(torch.tensor(after + wanted))]
    logits = target.model(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0]
    found = logits[-len(wanted) - 1 : -1].log_softmax(-1)
    return -found[torch.arange(len(wanted)), torch.tensor(wanted)].mean()


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_one_step_is_that_of_plain_autograd_in_fp64(family: str) -> None:
    target, one = tiny_target(family, dtype=torch.float64), attack(steps=1, step_size=0.5)
    text = TEXTS[1]
    start = one.start(target, 0)
    soft = start.clone().requires_grad_()
    loss = plain_loss(target, text, soft)
    (gradient,) = torch.autograd.grad(loss, soft)
    batch = embeddings.layout(target.model, one.rows(target, prompts(text)), 3, target.device)
    part = start[None].clone().requires_grad_()
    found = one.objective(target)(batch, part)
    (own,) = torch.autograd.grad(found.sum(), part)
    torch.testing.assert_close(found[0], loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(own[0], gradient, rtol=1e-8, atol=1e-12)
    stepped = Steps("sign", 0.5, part)(part.detach(), own, torch.tensor([0]))
    assert torch.equal(stepped[0], start - 0.5 * gradient.sign())


@pytest.mark.parametrize(("family", "scale"), [("llama", 1.0), ("gemma2", 32**0.5)])
def test_the_step_is_in_units_of_the_embeddings_as_the_model_has_them(
    family: str, scale: float
) -> None:
    target = tiny_target(family, dtype=torch.float64)
    model, special = causal_lm(target.model), target.formatter.tokenizer.all_special_ids
    ids = [i for i in range(model.config.vocab_size) if i not in special]
    size = scale * model.get_input_embeddings().weight[ids].square().mean().sqrt().item()
    one, some = attack(steps=1, step_size=0.25), prompts(TEXTS[1])
    found = one.fit(target, some, 0)
    moved = (found.soft[0] - one.start(target, 0)).abs()
    assert found.losses[0] < found.first[0]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25 * size), rtol=1e-6, atol=0)


def test_adam_is_torchs_on_clipped_gradients() -> None:
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(1, 3, 4, generator=noise)
    gradients = [torch.randn(1, 3, 4, generator=noise) * size for size in (0.01, 9.0, 0.1)]
    wanted = start.clone().requires_grad_()
    adam, own, soft = torch.optim.Adam([wanted], lr=0.1), Steps("adam", 0.1, start), start.clone()
    for gradient in gradients:
        wanted.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([wanted], 1.0)
        adam.step()
        soft = own(soft, gradient, torch.tensor([0]))
    torch.testing.assert_close(soft, wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["user", "end"])
def test_what_shares_a_batch_does_not_change_a_row(place: str) -> None:
    target, one = tiny_target("qwen3", dtype=torch.float64), attack(place=place)
    both = one.fit(target, prompts(*TEXTS[:2]), 0)
    for row in (0, 1):
        alone = one.fit(target, prompts(TEXTS[row]), 0)
        torch.testing.assert_close(both.losses[row], alone.losses[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(both.soft[row], alone.soft[0], rtol=1e-9, atol=1e-12)


def test_loss_falls_and_beats_noise_of_the_same_size() -> None:
    target, one = tiny_target(), attack(steps=20)
    found = one.fit(target, prompts(*TEXTS), 0)
    moved = found.soft - one.start(target, 0)
    noise = torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
    noise *= moved.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    batch = embeddings.layout(target.model, one.rows(target, prompts(*TEXTS)), 3, target.device)
    random = one.objective(target)(batch, one.start(target, 0) + noise)
    assert (found.losses < found.first).all()
    assert (found.losses < random).all()
    torch.testing.assert_close(one.objective(target)(batch, found.soft), found.losses)


def test_rows_stop_one_by_one() -> None:
    target = tiny_target()
    free = attack(steps=20).fit(target, prompts(*TEXTS), 0)
    stop = float(free.losses.sort().values[1]) + 1e-3
    found = attack(steps=20, stop=stop).fit(target, prompts(*TEXTS), 0)
    done = free.losses <= stop
    assert 0 < int(done.sum()) < len(TEXTS)
    assert (found.losses[done] <= stop).all()
    torch.testing.assert_close(found.losses[~done], free.losses[~done], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_real_embeddings_in_the_slot_give_the_answers_of_their_ids(lora: bool) -> None:
    target = tiny_target(lora=lora, max_new_tokens=10)
    one, some = attack(initial=["please explain the"], steps=1, step_size=1e-30), prompts(*TEXTS)
    longer = prompts(*(f"{text} please explain the" for text in TEXTS))
    with seen_positions(target) as by_ids:
        wanted = target.generate(longer)
    with seen_positions(target) as by_embeddings:
        found = one.answers(target, some)
    assert [answers[0].text for answers in found] == wanted
    # rotary embeddings do not show a wrong start, so look at the positions themselves
    generated = by_embeddings[-len(by_ids) :]
    assert all(map(torch.equal, by_ids, generated)) and len(by_ids) > 2


def test_a_penalty_that_ships_with_the_model_is_left_out_as_elsewhere() -> None:
    target = tiny_target(max_new_tokens=10)
    one, some = attack(initial=["please explain the"], steps=1, step_size=1e-30), prompts(*TEXTS)
    wanted = [answers[0].text for answers in one.answers(target, some)]
    target.model.generation_config.repetition_penalty = 50.0
    assert [answers[0].text for answers in one.answers(target, some)] == wanted


@contextmanager
def seen_positions(target: Target) -> Iterator[list[Tensor]]:
    """The position ids of every pass, (B, T)."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_ids"])

    with hooks([backbone(target.model).register_forward_pre_hook(keep, with_kwargs=True)]):
        yield seen


def test_only_target_positions_get_logits() -> None:
    target, one = tiny_target(), attack(steps=1)
    rows = one.rows(target, prompts(*TEXTS))
    seen: list[int] = []
    head = causal_lm(target.model).get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: seen.append(out[..., 0].numel()))
    one.fit(target, prompts(*TEXTS), 0)
    handle.remove()
    assert seen == 2 * [sum(len(row.target) for row in rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_same_answers(dtype: torch.dtype) -> None:
    more = {"inits": 2, "generations": 2, "steps": 3}
    runs = []
    for number in range(2):
        torch.manual_seed(number)  # the global generator is not the attack's
        runs.append(attack(**more).answers(tiny_target(dtype=dtype), prompts(*TEXTS[:2])))
    assert runs[0] == runs[1]
    assert [answer.sample for answer in runs[0][0]] == [0, 1, 2, 3]
    assert attack(**more).start(tiny_target(dtype=dtype), 1).dtype == torch.float32
    other = attack(**more).start(tiny_target(seed=5), 1)
    assert not torch.equal(other, attack(**more).start(tiny_target(), 1))


def test_universal_is_one_prompt_for_all_and_better_than_its_start() -> None:
    target, one = tiny_target(), attack(universal=True, steps=30, batch=2, inits=2)
    one.prepare(target)
    assert len(one.shared) == 2 and one.shared[0].shape == one.start(target, 0).shape
    batch = embeddings.layout(target.model, one.rows(target, prompts(*TEXTS)), 3, target.device)
    for init, soft in enumerate(one.shared):
        before, after = (
            one.objective(target)(batch, s.expand(4, -1, -1)).mean()
            for s in (one.start(target, init), soft)
        )
        assert after < before
    trials = one.summary()["trials"]
    assert [trial["init"] for trial in trials] == [0, 1]
    assert all(0 <= trial["useful"] <= 1 for trial in trials)
    assert len(one.answers(target, prompts("steal"))[0]) == 2


def test_the_probe_term_makes_states_look_harmless() -> None:
    settings = {"weight": 0.1, "layers": [2], "rounds": 1, "prompts": 4}
    target, one = tiny_target(), attack(steps=25, obfuscated=settings)
    one.prepare(target)
    (round_0,) = one.summary()["rounds"]
    assert set(round_0) == {"round", "fooled", "accuracy_after"}
    found = one.fit(target, prompts(*TEXTS), 0)
    one.settings.obfuscated = None
    blind = one.fit(target, prompts(*TEXTS), 0)
    batch = embeddings.layout(target.model, one.rows(target, prompts(*TEXTS)), 3, target.device)
    logits = []
    for soft in (found.soft, blind.soft):
        with torch.no_grad(), tapped(target.model, [2], lambda h: h[:, batch.width - 1]) as kept:
            embeddings.target_losses(target.model, batch, batch.filled(soft))
        logits.append(one.probes[2].logit(kept[2]).mean())
    assert logits[0] < logits[1]


def test_model_is_left_as_it_was_also_after_an_exception() -> None:
    target = tiny_target()
    target.model.train()
    target.model.model.layers[1].eval()
    next(target.model.parameters()).requires_grad_(False)
    before = state_of(target.model)
    one = attack(obfuscated={"layers": [1], "rounds": 1, "prompts": 2})
    one.prepare(target)
    one.answers(target, prompts(*TEXTS))
    assert state_of(target.model) == before
    with failing_head(target.model), pytest.raises(RuntimeError, match="head"):
        one.answers(target, prompts(*TEXTS))
    assert state_of(target.model) == before


def test_nan_rows_are_dropped_and_keep_their_start() -> None:
    target, one = tiny_target(), attack()
    rows, start = one.rows(target, prompts(*TEXTS)), one.start(target, 0).expand(4, -1, -1)
    found = fit_rows(
        target.model,
        lambda batch, soft: soft.sum((1, 2)) * torch.nan,
        rows,
        start,
        Steps("sign", 0.1, start),
        0.0,
        range(3),
    )
    assert torch.equal(found.soft, start)


@pytest.mark.parametrize(
    ("more", "word"), [({"target": " "}, "target"), ({"initial": [" "]}, "initial")]
)
def test_text_without_tokens_is_a_mistake(more: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        attack(**more).answers(tiny_target(), prompts(TEXTS[0]))
