"""Paired micro-batches: harmful prompts and harmless conversations in one tensor.

Legend: n harmful rows, m harmless rows, T columns. Every row is padded on the left and ends in
column T - 1, so that one forward serves both terms: the separation reads `prompt_last`, the KL
reads the harmless rows n..n+m-1 where `kl_weights` is 1. With a refusal anchor a harmful row goes
on behind its prompt, with an opening (or none) and a refusal; `refusal_weights` says at which
columns the next token is one of the refusal's that is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from es2fast.data.format import Formatter
from es2fast.data.prompts import Prompt
from es2fast.data.sources import one_line
from es2fast.errors import UserError

POSITIONS = ("all", "response", "last")


@dataclass(frozen=True)
class Refusal:
    """Ids that follow a harmful prompt: a compliant opening, not learned, and a refusal."""

    opening: list[int] = field(default_factory=list)
    refusal: list[int] = field(default_factory=list)


@dataclass
class MicroBatch:
    """What one rank computes on in one forward."""

    input_ids: Tensor  # (n + m, T) int64, harmful rows first
    attention_mask: Tensor  # (n + m, T) int64
    prompt_last: Tensor  # (n + m,) int64, column of the last prompt token
    kl_weights: Tensor  # (m, T) float32, above 0 where next-token distributions are compared
    num_harmful: int  # n
    num_tokens: int  # non-padding tokens of all rows
    refusal_weights: Tensor | None = None  # (n, T) float32, of the prediction made at a column
    places: Sequence[int] | None = None  # of the harmful rows among the step's, of all ranks; 0 ..
    teacher: Any = None  # what a cache holds of the tokens whose kl_weights are above 0, row by row

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            prompt_last=self.prompt_last.to(device),
            kl_weights=self.kl_weights.to(device),
            refusal_weights=None
            if self.refusal_weights is None
            else self.refusal_weights.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
        )


def collate(
    formatter: Formatter,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    positions: str,
    refusals: Sequence[Refusal] | None = None,
    decay: float = 1.0,
    first: tuple[Sequence[float], int] | None = None,
) -> MicroBatch:
    """Builds a micro-batch: harmful rows are prompts, harmless rows prompt + response.

    Args:
        formatter: chat template and lengths.
        harmful: at least one prompt.
        harmless: at least one prompt, every one with its `response`.
        positions: harmless positions with weight 1. `all`: every non-padding token; `response`:
            those that predict a response token, that is the last prompt token up to the one before
            the last response token; `last`: the last prompt token. A row without room for any
            response keeps its last prompt token under `response`, so no row has weight 0.
        refusals: what follows each harmful prompt; None: nothing does.
        decay: a refusal's tokens are learned with the weights 1, decay, decay^2, ...
        first: per harmless prompt the weight of the positions that predict its response's first
            tokens, and how many these are; other positions keep 1.

    Raises:
        UserError: an empty group, a missing response, or unknown `positions`.
        ValueError: another number of refusals than of harmful prompts.
    """
    if positions not in POSITIONS:
        raise UserError(f"kl.positions: {positions!r} is unknown; use {', '.join(POSITIONS)}")
    if not harmful or not harmless:
        raise UserError("micro-batch: needs at least one harmful and one harmless prompt")
    follow = [Refusal()] * len(harmful) if refusals is None else refusals
    pairs = [
        (formatter.prompt_ids(prompt), [*after.opening, *after.refusal])
        for prompt, after in zip(harmful, follow, strict=True)
    ]
    for prompt in harmless:
        if prompt.response is None:
            raise UserError(
                f"data.harmless: the prompt {one_line(prompt.text, 40)!r} has no response; "
                "have the base model write it first"
            )
        pairs.append(formatter.conversation_ids(prompt, prompt.response))
    padded = formatter.pad([ids + answer for ids, answer in pairs])
    width = padded["input_ids"].shape[1]
    prompt_last = torch.tensor([width - 1 - len(answer) for _, answer in pairs])
    n = len(harmful)
    return MicroBatch(
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        prompt_last=prompt_last,
        kl_weights=_kl_weights(padded["attention_mask"][n:], prompt_last[n:], positions, first),
        num_harmful=n,
        num_tokens=int(padded["attention_mask"].sum()),
        refusal_weights=None if refusals is None else _refusal_weights(refusals, width, decay),
    )


def _refusal_weights(refusals: Sequence[Refusal], width: int, decay: float) -> Tensor:
    """(n, T) float32: rows end with their refusal, whose tokens are predicted one column before."""
    weights = torch.zeros(len(refusals), width)
    for row, after in zip(weights, refusals):
        count = len(after.refusal)
        row[width - 1 - count : width - 1] = decay ** torch.arange(count)
    return weights


def _kl_weights(
    mask: Tensor, prompt_last: Tensor, positions: str, first: tuple[Sequence[float], int] | None
) -> Tensor:
    """(m, T) float32 from the harmless rows' mask (m, T) and last prompt columns (m,)."""
    column = torch.arange(mask.shape[1])
    last = prompt_last[:, None]
    if positions == "all":
        seen = mask.float()
    elif positions == "last":
        seen = (column == last).float()
    else:
        end = (last + 1).clamp_min(mask.shape[1] - 1)  # T - 1, and T for a row without response
        seen = ((column >= last) & (column < end)).float()
    if first is None:
        return seen
    weights, count = torch.tensor(first[0])[:, None], first[1]
    return torch.where((column >= last) & (column < last + count), weights * seen, seen)


def kl_span(prompt: int, answer: int, positions: str) -> tuple[int, int]:
    """First token of a harmless row that the KL sees, and the first behind them: the columns that
    `collate` gives a weight, counted from the row's start.

    Args:
        prompt: tokens of the prompt.
        answer: tokens of the response.
        positions: see `collate`.
    """
    if positions == "all":
        return 0, prompt + answer
    return prompt - 1, prompt if positions == "last" else max(prompt, prompt + answer - 1)
