"""A micro-batch as one sequence: no padding, and what all its rows begin with is there once.

    [suffixes of the harmful rows | common prefix | suffixes of the harmless rows]        S tokens

Chat templates give every prompt the same beginning (of the 42 tokens of a short question to
Qwen2.5, 24 are). Causal states of it are the same in every row, so one copy serves all: a suffix
attends to itself and to the prefix, and gradients of all rows add up there, which is what the sum
over rows is. The harmful suffixes come first, so that they can be cut off after the deepest
separated block. Positions are those of the rows, so rotary and learned position embeddings are too.

Attention goes by rows (`attention_rows`) where the model takes that. Otherwise it is dense over
S x S, and one long sequence can cost more than padded rows: see `pays`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from es2fast.data.batches import MicroBatch
from es2fast.transfer import to_device


@dataclass(frozen=True)
class AttentionRows:
    """Where the rows of a packed sequence are.

    index: per group (R, W) int64, the places of each row's tokens, prefix first; behind a short
    row the place of its last token again. home: (S,) int64, where in the groups' flattened rows,
    one group after the other, a place is computed: of a prefix in the first row of the last group
    that has it. prefix: per group (P,) int64, the places of its prefix.
    """

    index: tuple[Tensor, ...]
    home: Tensor
    prefix: tuple[Tensor, ...]

    def without_first(self, count: int) -> AttentionRows:
        """The last group alone, of a sequence without its first `count` tokens."""
        skipped = sum(index.numel() for index in self.index[:-1])
        last = self.index[-1] - count
        return AttentionRows((last,), self.home[count:] - skipped, (self.prefix[-1] - count,))

    def to(self, device: torch.device | str) -> AttentionRows:
        """The same on `device`."""
        index = tuple(to_device(one, device) for one in self.index)
        prefix = tuple(to_device(one, device) for one in self.prefix)
        return AttentionRows(index, to_device(self.home, device), prefix)


@dataclass(frozen=True)
class Packed:
    """A micro-batch's tokens, packed; rows that share the prefix have the same places for it.

    input_ids, position_ids: (1, S) int64. segment_ids: (1, S) int64, 0 in the prefix, row + 1 in a
    suffix, -(row + 1) in a row that is whole beside a prefix. harmful: tokens of harmful rows
    alone. place: (n + m, T) int64, where a token of the padded batch is now; padding: undefined.
    rows: the harmful and the harmless ones, for attention.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    harmful: int
    place: Tensor
    rows: AttentionRows

    @property
    def tokens(self) -> int:
        """S."""
        return self.input_ids.shape[1]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(1, 1, S, S) to be added to attention scores of `dtype`: 0 where a token sees another."""
        segment, position = self.segment_ids[0], self.position_ids[0]
        own = (segment == segment[:, None]) | ((segment == 0) & (segment[:, None] > 0))
        hidden = ~(own & (position <= position[:, None]))
        scores = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return scores.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`; `place` stays where it is."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            position_ids=to_device(self.position_ids, device),
            segment_ids=to_device(self.segment_ids, device),
            rows=self.rows.to(device),
        )


def pack(batch: MicroBatch, apart: bool = False) -> Packed:
    """Packs a micro-batch on the CPU. The prefix ends before any row's last prompt token.

    Args:
        batch: n harmful and m harmless rows, padded on the left.
        apart: the harmful rows share no prefix, neither with the harmless ones nor among them.
    """
    ids, mask, n = batch.input_ids, batch.attention_mask.bool(), batch.num_harmful
    width = ids.shape[1]
    start = width - mask.sum(1)  # first real column of each row
    shared = _prefix(ids, start, int((batch.prompt_last - start).min()))
    begin = torch.full_like(start, shared)  # of each row's suffix, within the row
    if apart:
        begin[:n] = 0
    column = torch.arange(width)
    suffix = column >= (start + begin)[:, None]
    lengths = suffix.sum(1)
    harmful = int(lengths[:n].sum())
    before = lengths.cumsum(0) - lengths
    before[n:] += shared
    position = column - start[:, None]
    place = torch.where(suffix, (before - begin)[:, None] + position, position + harmful)
    rows, columns = suffix.nonzero(as_tuple=True)
    first = int(start[0])
    segment = torch.where(begin[rows] < shared, -1, 1) * (rows + 1)

    def joined(suffixes: Tensor, prefix: Tensor) -> Tensor:
        return torch.cat([suffixes[:harmful], prefix, suffixes[harmful:]])[None]

    prefix = torch.arange(shared)
    return Packed(
        input_ids=joined(ids[rows, columns], ids[0, first : first + shared]),
        position_ids=joined(position[rows, columns], prefix),
        segment_ids=joined(segment, torch.zeros_like(prefix)),
        harmful=harmful,
        place=place,
        rows=_attention_rows(place, lengths + begin, begin, n),
    )


def _attention_rows(place: Tensor, lengths: Tensor, begin: Tensor, n: int) -> AttentionRows:
    """Of rows padded on the left: place (R, T), lengths (R,), where their suffixes begin (R,), and
    the number of harmful rows."""
    width = place.shape[1]
    tokens = int(place[:, -1].max()) + 1
    index, prefixes, home, before = [], [], torch.zeros(tokens, dtype=torch.int64), 0
    for group in (slice(0, n), slice(n, None)):
        rows, length, shared = place[group], lengths[group], int(begin[group][0])
        column = torch.arange(int(length.max()))
        own = column < length[:, None]
        one = rows.gather(1, (width - length[:, None] + column).clamp_max(width - 1))
        suffix = own & (column >= shared)
        home[one[suffix]] = before + suffix.flatten().nonzero().squeeze(1)
        prefix = one[0, :shared]
        home[prefix] = before + torch.arange(shared)
        index.append(one)
        prefixes.append(prefix)
        before += one.numel()
    return AttentionRows(tuple(index), home, tuple(prefixes))


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with."""
    columns = zip(*rows)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _prefix(ids: Tensor, start: Tensor, most: int) -> int:
    """Tokens that all rows of ids (R, T) begin with from their column `start` (R,) on, at most
    `most`."""
    if most < 1:
        return 0
    heads = ids.gather(1, start[:, None] + torch.arange(most))
    same = (heads == heads[0]).all(0)
    return most if bool(same.all()) else int(same.int().argmin())


def pays(rows: int, width: int, tokens: int, hidden: int) -> bool:
    """One sequence of `tokens` under dense attention costs a block less than `rows` of `width`:
    24 H^2 flop per token for the products, 4 H per pair of tokens for attention, with H = `hidden`.
    """

    def work(sequences: int, length: int) -> int:
        return sequences * length * (6 * hidden + length)

    return work(1, tokens) < work(rows, width)
