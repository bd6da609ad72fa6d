"""Generation stops when every row has ended, and not before."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model, tokenizer

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.modeling.generate import generate_rows
from es2fast.modeling.taps import backbone

TEXTS = ("break the car", "paint a house please", "steal the lamp .")
LIMIT = 40
END = 26  # a token that this model writes in each of these answers, here and there


def greedy(model: torch.nn.Module, ids: list[int], steps: int) -> list[int]:
    """One row, without a cache and without a padding."""
    found: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *found]])).logits
        found.append(int(logits[0, -1].argmax()))
    return found


def test_it_stops_early_when_every_row_has_ended() -> None:
    model = tiny_model("llama", seed=4, max_position_embeddings=128)
    formatter = Formatter(tokenizer(), DataConfig())
    rows = [formatter.prompt_ids(Prompt.of(text)) for text in TEXTS]
    free = [greedy(model, row, LIMIT) for row in rows]
    formatter.stop_token_ids = [END]
    lengths = [tokens.index(END) + 1 for tokens in free]
    assert len(set(lengths)) == len(rows) and max(lengths) < LIMIT / 2
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = backbone(model).register_forward_hook(count)
    texts = generate_rows(
        model, formatter, rows, max_new_tokens=LIMIT, device=torch.device("cpu")
    )  # fmt: skip
    handle.remove()
    assert passes == max(lengths)
    kept = [tokens[:length] for tokens, length in zip(free, lengths)]
    assert [text.split() for text in texts] == [formatter.decode(ids).split() for ids in kept]
