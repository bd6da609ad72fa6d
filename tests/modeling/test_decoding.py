"""Decoding without ended rows writes what transformers' own loop writes, and computes less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MORE_FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.modeling.decoding import decode
from es2fast.modeling.taps import blocks, hidden_of, hooks, position_ids

LIMIT, ROWS = 24, 12
REAL = [Path(path) for path in os.environ.get("ES2FAST_MODELS", "").split(os.pathsep) if path]
LONG_WINDOW = {"sliding_window": 6}  # shorter than most prompts with their answers
CASES = [
    *((family, {}) for family in [*FAMILIES, *MORE_FAMILIES]),
    *((family, LONG_WINDOW) for family in ("mistral", "gemma2", "gemma3_text", "mixtral")),
]


def batch_of(vocabulary: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Random ids (B, T) with 1 to T tokens a row, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, vocabulary, (rows, rows), generator=generator)
    mask = (torch.arange(rows) >= torch.arange(rows)[:, None]).long()
    return ids * mask, mask


def written(model: Any, ids: Tensor, mask: Tensor, stop: list[int], **options: Any) -> Tensor:
    """What `generate` adds to the ids."""
    settings: dict[str, Any] = {"max_new_tokens": LIMIT, "do_sample": False} | options
    out = model.generate(
        input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
        eos_token_id=stop or None, pad_token_id=0, **settings,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


def stop_tokens(free: Tensor) -> list[int]:
    """Two tokens that end most answers, which go on without them, after different lengths."""

    def spread(pair: Tensor) -> int:
        return int(torch.isin(free, pair).int().argmax(1).unique().numel())

    known = free.unique()
    pairs = [torch.stack([a, b]) for i, a in enumerate(known) for b in known[i + 1 :]]
    return [int(one) for one in max(pairs, key=spread)]


def lengths_of(answers: Tensor, stop: list[int]) -> Tensor:
    """(B,) tokens up to the stop token, or all of them."""
    ends = torch.isin(answers, torch.tensor(stop))
    return torch.where(ends.any(1), ends.int().argmax(1) + 1, answers.shape[1])


@contextmanager
def computed(model: Any) -> Iterator[list[int]]:
    """Rows of every pass, as a hook on the first block sees them."""
    rows: list[int] = []

    def count(module: Any, args: Any, output: Any) -> None:
        rows.append(len(hidden_of(output)))

    with hooks([blocks(model)[0].register_forward_hook(count)]):
        yield rows


@pytest.mark.parametrize(("family", "more"), CASES)
def test_tokens_are_those_of_transformers(family: str, more: dict[str, Any]) -> None:
    model = tiny_model(family, seed=1, **more)
    ids, mask = batch_of(model.config.vocab_size)
    stop = stop_tokens(written(model, ids, mask, []))
    for options in ({}, {"min_new_tokens": 3, "repetition_penalty": 1.3}):
        wanted = written(model, ids, mask, stop, **options)
        with computed(model) as rows:
            found = written(model, ids, mask, stop, custom_generate=decode, **options)
        assert torch.equal(found, wanted)
        lengths = lengths_of(wanted, stop)
        assert sum(rows) == lengths.sum() and rows[0] == ROWS
        if not options:
            assert len(lengths.unique()) > 1 and lengths.min() < LIMIT  # rows end apart


def test_a_recurrent_state_goes_through_transformers_loop() -> None:
    config = AutoConfig.for_model(
        "lfm2", vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, mask = batch_of(32)
    stop = stop_tokens(written(model, ids, mask, []))
    wanted = written(model, ids, mask, stop)
    with computed(model) as rows:
        found = written(model, ids, mask, stop, custom_generate=decode)
    assert torch.equal(found, wanted)
    assert set(rows) == {ROWS}


@pytest.mark.skipif(not REAL, reason="ES2FAST_MODELS names folders of chat models")
@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_a_real_model_answers_as_under_transformers_loop(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    formatter = Formatter(AutoTokenizer.from_pretrained(folder), DataConfig())
    asked = ("What is 2 + 2?", "Say yes.", "Name a river in Europe.", "What is a prime number?",
             "Write a poem about bread with many lines.")  # fmt: skip
    batch = formatter.pad([formatter.prompt_ids(Prompt.of(text)) for text in asked])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = written(model, ids, mask, formatter.stop_token_ids)
    with computed(model) as rows:
        found = written(model, ids, mask, formatter.stop_token_ids, custom_generate=decode)
    assert torch.equal(found, wanted)
    assert sum(rows) < len(asked) * wanted.shape[1]
