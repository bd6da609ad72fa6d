"""Positions and weights of a micro-batch, against columns counted by hand."""

from __future__ import annotations

import pytest
import torch
from chat_tokenizers import chat_tokenizer, words

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt, collate
from es2fast.errors import UserError

HARMFUL = [Prompt.of("w1 w2"), Prompt.of("w3")]
# Prompt lengths 5 and 6, responses of 3 and 2 tokens with their end of turn.
HARMLESS = [Prompt.of("w4", "w5 w6"), Prompt.of("w7 w8", "w9")]


@pytest.fixture
def formatter():
    return Formatter(chat_tokenizer(), DataConfig(max_length=16))


def test_layout(formatter):
    batch = collate(formatter, HARMFUL, HARMLESS, "all")
    rows = [words(formatter.tokenizer, row) for row in batch.input_ids]
    assert rows == [
        "<pad> <pad> <s> <user> w1 w2 <end> <bot>",
        "<pad> <pad> <pad> <s> <user> w3 <end> <bot>",
        "<s> <user> w4 <end> <bot> w5 w6 <end>",
        "<s> <user> w7 w8 <end> <bot> w9 <end>",
    ]
    assert batch.attention_mask.sum(1).tolist() == [6, 5, 8, 8]
    assert batch.prompt_last.tolist() == [7, 7, 4, 5]
    assert batch.num_harmful == 2 and batch.num_tokens == 27
    ends = batch.input_ids[torch.arange(4), batch.prompt_last]
    assert words(formatter.tokenizer, ends) == "<bot> <bot> <bot> <bot>"
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.prompt_last.dtype == torch.int64 and batch.kl_weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("positions", "first", "expected"),
    [
        ("all", 1, [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]),
        ("response", 1, [[0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0]]),
        ("last", 1, [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]),
        ("all", 5, [[1, 1, 1, 1, 5, 5, 1, 1], [1, 1, 1, 1, 1, 5, 5, 1]]),
        ("response", 5, [[0, 0, 0, 0, 5, 5, 1, 0], [0, 0, 0, 0, 0, 5, 5, 0]]),
        ("last", 5, [[0, 0, 0, 0, 5, 0, 0, 0], [0, 0, 0, 0, 0, 5, 0, 0]]),
    ],
)
def test_kl_weights(formatter, positions, first, expected):
    """Two of a response's first tokens weigh `first`."""
    batch = collate(formatter, HARMFUL, HARMLESS, positions, first=([first] * len(HARMLESS), 2))
    assert batch.kl_weights.tolist() == expected


def test_all_leaves_padding_out(formatter):
    weights = collate(formatter, HARMFUL, [HARMLESS[0], Prompt.of("w1", "w2")], "all").kl_weights
    assert weights.tolist() == [[1] * 8, [0] + [1] * 7]


@pytest.mark.parametrize(("positions", "tokens"), [("all", 16), ("response", 1), ("last", 1)])
def test_a_row_without_room_for_a_response_keeps_a_weight(formatter, positions, tokens):
    full = Prompt.of(" ".join(["w1"] * 40), "w2")
    batch = collate(formatter, HARMFUL, [full], positions)
    assert batch.prompt_last[-1] == 15 and batch.kl_weights.sum() == tokens
    assert batch.kl_weights[0, 15] == 1


def test_to_moves_every_tensor(formatter):
    moved = collate(formatter, HARMFUL, HARMLESS, "all").to("meta")
    tensors = [moved.input_ids, moved.attention_mask, moved.prompt_last, moved.kl_weights]
    assert {t.device.type for t in tensors} == {"meta"} and moved.num_tokens == 27


def test_errors(formatter):
    with pytest.raises(UserError, match="'w4' has no response"):
        collate(formatter, HARMFUL, [Prompt.of("w4")], "all")
    with pytest.raises(UserError, match=r"kl\.positions: 'some' is unknown; use all, response"):
        collate(formatter, HARMFUL, HARMLESS, "some")
    with pytest.raises(UserError, match="at least one harmful and one harmless"):
        collate(formatter, [], HARMLESS, "all")
