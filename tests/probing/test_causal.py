"""The effect of a push on the refusal, against passes of one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import OBJECTS, REFUSAL, save_refusing, tiny_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.states import last_token_states
from es2fast.modeling.taps import blocks
from es2fast.probing.causal import refusal_effects, refusal_starts

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")
HARMFUL = [Prompt.of(f"break the {thing}" + " please" * (i % 3)) for i, thing in enumerate(OBJECTS)]
HARMFUL += HARMFUL[:3]  # more than one batch


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Formatter]:
    folder = save_refusing(tmp_path_factory.mktemp("refusing"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, Formatter(AutoTokenizer.from_pretrained(folder), DataConfig())


def gaps_of(model: Any, formatter: Formatter) -> dict[int, torch.Tensor]:
    """Mean state of "steal", which this model answers, less that of "break", which it refuses."""
    means = []
    for verb in ("break", "steal"):
        prompts = [Prompt.of(f"{verb} the {thing}") for thing in OBJECTS]
        found = last_token_states(model, formatter.prompt_batches(prompts, 8), range(4))
        means.append({layer: rows.mean(0) for layer, rows in found.items()})
    return {layer: means[1][layer] - means[0][layer] for layer in range(4)}


def plain(model: Any, ids: list[int], starts: list[int], layer: int, push: torch.Tensor) -> float:
    """Log-odds lost, by a copy of the blocks' loop that transformers' own hook mechanism serves."""

    def odds() -> float:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        p = logits.softmax(-1)[starts].sum()
        return (p / (1 - p)).log().item()

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        changed = torch.cat([hidden[:, :-1], hidden[:, -1:] + push], dim=1)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    with torch.no_grad():
        before = odds()
        handle = model.model.layers[layer].register_forward_hook(add)
        after = odds()
        handle.remove()
    return before - after


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_effects_are_those_of_single_prompts(family: str) -> None:
    model, formatter = tiny_model(family), Formatter(tokenizer(), DataConfig())
    noise = torch.Generator().manual_seed(0)
    gaps = {layer: torch.randn(32, generator=noise) for layer in range(4)}
    starts = [7, 9]
    found = refusal_effects(model, formatter, HARMFUL, gaps, starts, ALONE)
    assert found.shape == (4, len(HARMFUL))
    assert all(not block._forward_hooks for block in blocks(model))
    for column, prompt in enumerate(HARMFUL):
        ids = formatter.prompt_ids(prompt)
        wanted = [plain(model, ids, starts, layer, gaps[layer]) for layer in range(4)]
        assert found[:, column].tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_a_push_towards_what_is_answered_takes_the_refusal(refusing: Any) -> None:
    model, formatter = refusing
    starts = refusal_starts(formatter, HARMFUL[0], [REFUSAL])
    assert formatter.tokenizer.convert_ids_to_tokens(starts) == ["I"]
    gaps = gaps_of(model, formatter)
    prompts = [Prompt.of(f"break the {thing}") for thing in OBJECTS]
    towards = refusal_effects(model, formatter, prompts, gaps, starts, ALONE).mean(1)
    away = refusal_effects(
        model, formatter, prompts, {i: -gap for i, gap in gaps.items()}, starts, ALONE
    ).mean(1)
    assert towards[-1] > 2.0 and (towards > away).all()


def test_what_a_refusal_starts_with(refusing: Any) -> None:
    _, formatter = refusing
    words = formatter.tokenizer
    assert words.convert_ids_to_tokens(refusal_starts(formatter, HARMFUL[0])) == ["I"]
    plain_words = Formatter(tokenizer(), DataConfig())
    assert refusal_starts(plain_words, HARMFUL[0]) == []  # not in its vocabulary
    own = refusal_starts(plain_words, HARMFUL[0], ["please draw .", "sure .", "sure here"])
    assert words.convert_ids_to_tokens(own) == ["please", "sure"]
    full = Formatter(tokenizer(), DataConfig(max_length=8))
    assert refusal_starts(full, Prompt.of("draw " * 20), ["sure ."]) == []  # no room


class Stopped(Exception):
    """A rank that waits for the others."""


def test_ranks_share_the_batches() -> None:
    """Three ranks, two batches: the third repeats one, so that all make as many passes."""
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    gaps = {1: torch.ones(32)}
    whole = refusal_effects(model, formatter, HARMFUL, gaps, [7], ALONE)
    held: list[Any] = []

    class Rank(Runtime):
        def gather_objects(self, value: Any) -> list[Any]:
            held.append(value)
            if len(held) < 3:
                raise Stopped
            return held

    for rank in (0, 1):
        with pytest.raises(Stopped):
            refusal_effects(model, formatter, HARMFUL, gaps, [7], Rank(rank, 3, ALONE.device, ""))
    found = refusal_effects(model, formatter, HARMFUL, gaps, [7], Rank(2, 3, ALONE.device, ""))
    assert [sorted(part) for part in held] == [[0], [1], [0]]
    torch.testing.assert_close(found, whole)
