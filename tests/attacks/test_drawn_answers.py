"""Drawn answers: as many as asked for, the same for the same seed, greedy ones when cold."""

from __future__ import annotations

import torch
from attacks.small import small_target
from tiny_models import tiny_model

from es2fast.attacks.prompts.sampling import Sampling, SamplingSettings
from es2fast.attacks.registry import make_attack
from es2fast.data import Prompt

ASKED = [Prompt.of("steal the lamp"), Prompt.of("break the big car .")]


def test_draws_are_those_of_their_seed() -> None:
    attack = make_attack(
        {"name": "sampling", "samples": 3, "temperatures": [0.7, 1.5], "top_p": [0.9]}
    )
    target = small_target(tiny_model("llama"), max_new_tokens=8)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, again = attack.answers(target, ASKED), attack.answers(target, ASKED)
    assert torch.equal(state, torch.random.get_rng_state())
    target.seed = 1
    other = attack.answers(target, ASKED)
    assert attack.cost(target, 2).answers == sum(map(len, first)) == 12
    texts, same, others = ([[one.text for one in row] for row in rows]
                           for rows in (first, again, other))  # fmt: skip
    assert texts == same != others
    assert len({text for row in texts for text in row}) > 6
    assert [one.sample for one in first[0]] == list(range(6))
    assert [one.parameters["temperature"] for one in first[1]] == [0.7] * 3 + [1.5] * 3


def test_cold_or_from_the_likeliest_token_alone_it_is_greedy() -> None:
    target = small_target(tiny_model("llama"), max_new_tokens=8)
    wanted = target.generate(ASKED)
    for settings in ({"temperatures": [1e-4]}, {"temperatures": [1.0], "top_p": [1e-6]}):
        attack = Sampling(SamplingSettings(samples=1, **settings))
        assert [row[0].text for row in attack.answers(target, ASKED)] == wanted


def test_a_batch_is_drawn_apart_from_the_next() -> None:
    target = small_target(tiny_model("llama"), max_new_tokens=8, batch_size=1)
    attack = Sampling(SamplingSettings(samples=1, temperatures=[2.0]))
    one, two = attack.answers(target, [ASKED[0], ASKED[0]])
    assert one[0].text != two[0].text
