"""The refusal anchor's texts: which refusal follows which harmful prompt, and after what.

Separation alone moves the states of harmful prompts to a place that the blocks above know nothing
about; the anchor teaches them what it means, by the cross-entropy of a refusal there. The best
words are the model's own, since they cost the least change: with `source: auto` the base model
answers the harmful prompts once, a prompt that it refuses keeps its own refusal, cut behind the
sentence that refuses, and one that it answers gets one of the refusals that it gave elsewhere. A
base model that refuses nothing learns `refusal.fallback`.

Which text a row gets is a function of (seed, row), the opening before it one of (seed, step, row):
the same on every rank and in every run.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.config import Config
from es2fast.data import Formatter, MicroBatch, Prompt, Refusal
from es2fast.data.sources import one_line
from es2fast.errors import UserError
from es2fast.judges.rules import is_refusal
from es2fast.modeling.head import CETask
from es2fast.transfer import to_device

ANSWER_TOKENS = 48  # of an answer to a harmful prompt: enough to see whether it refuses
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]|\n")


@dataclass(frozen=True)
class AnchorTexts:
    """Per harmful prompt its refusal, and the base model's answer where that is none; `borrowed`
    says that the base model refused nothing and the refusals are `refusal.fallback`'s."""

    refusals: list[str]
    answers: list[str | None]
    borrowed: bool = False


def check_refusals(config: Config, harmful: Sequence[Prompt]) -> None:
    """What can be known before the base model has answered.

    Raises:
        UserError: `source: column` and a prompt without a response.
    """
    if not config.refusal.weight or config.refusal.source != "column":
        return
    for number, prompt in enumerate(harmful):
        if prompt.response is None:
            raise UserError(
                f"refusal.source: column, but harmful prompt {number + 1}, "
                f"{one_line(prompt.text, 40)!r}, has no response; fill the column or use "
                "refusal.source=auto"
            )


def wants_answers(config: Config) -> bool:
    """The base model has to answer the harmful prompts."""
    return bool(config.refusal.weight) and config.refusal.source == "auto"


def answer_tokens(config: Config) -> int:
    """At which the base model's answers to the harmful prompts are cut."""
    return max(config.refusal.tokens, ANSWER_TOKENS)


def anchor_texts(
    config: Config, harmful: Sequence[Prompt], answers: Sequence[str] | None = None
) -> AnchorTexts | None:
    """The texts of a run; None without an anchor.

    Args:
        config: the run.
        harmful: all harmful training prompts.
        answers: the base model's, one per prompt, for `source: auto`.

    Raises:
        UserError: the base model refuses none of the prompts and `refusal.fallback` is empty, or
            see `check_refusals`.
    """
    section = config.refusal
    if not section.weight:
        return None
    check_refusals(config, harmful)
    own: list[str | None] = [None] * len(harmful)
    if section.source == "column":
        return AnchorTexts([prompt.response or "" for prompt in harmful], own)
    pool, given = section.texts, own
    if section.source == "auto":
        assert answers is not None
        given = [first_refusal(answer) if is_refusal(answer) else None for answer in answers]
        own = [
            answer if text is None and answer.strip() else None
            for answer, text in zip(answers, given)
        ]
        pool = sorted({text for text in given if text is not None})
    borrowed = not pool
    pool = pool or section.fallback
    if not pool:
        raise UserError(
            f"refusal.source: auto, but the base model refuses none of the {len(harmful)} harmful "
            "prompts and refusal.fallback is empty; give refusals in refusal.fallback, or set "
            "refusal.source=list with refusal.texts"
        )
    seed = config.train.seed
    drawn = [random.Random(f"{seed}/refusal/{row}").choice(pool) for row in range(len(harmful))]
    return AnchorTexts([text or other for text, other in zip(given, drawn)], own, borrowed)


def first_refusal(answer: str) -> str:
    """The first sentences of an answer, up to the one that makes it a refusal."""
    text = answer.strip()
    for end in _SENTENCE_END.finditer(text):
        start = text[: end.end()].strip()
        if is_refusal(start):
            return start
    return text


class RefusalAnchor:
    """What follows a harmful prompt at a step, in token ids.

    Args:
        config: the run, with its `refusal` section.
        formatter: chat template and lengths.
        harmful: all harmful training prompts.
        texts: of `anchor_texts`.
        harmless: the harmless training prompts, of whose responses `refusal.prefill.words` are.
    """

    def __init__(
        self,
        config: Config,
        formatter: Formatter,
        harmful: Sequence[Prompt],
        texts: AnchorTexts,
        harmless: Sequence[Prompt] = (),
    ):
        self._section, self._seed = config.refusal, config.train.seed
        self._formatter, self._harmful, self._texts = formatter, harmful, texts
        self._responses = [
            prompt.response for prompt in harmless if (prompt.response or "").strip()
        ]

    @property
    def decay(self) -> float:
        """Weight of a token relative to that of the one before it."""
        return self._section.decay

    def row(self, step: int, row: int) -> Refusal:
        """Of harmful prompt `row` at optimizer step `step`, from 0.

        A prompt that fills `data.max_length` has no room for a refusal, and one that leaves little
        gets a shorter opening.
        """
        prompt = self._harmful[row]
        ids, answer = self._formatter.conversation_ids(prompt, self._texts.refusals[row])
        refusal = answer[: self._section.tokens]
        room = self._formatter.data.max_length - len(ids) - len(refusal)
        return Refusal(self._opening(step, row, room) if refusal else [], refusal)

    def _opening(self, step: int, row: int, room: int) -> list[int]:
        settings = self._section.prefill
        draw = random.Random(f"{self._seed}/prefill/{step}/{row}")
        if not draw.random() < settings.probability:
            return []
        text = draw.choice(settings.texts)
        own = self._texts.answers[row] if settings.own_answers else None
        most = max(min(settings.tokens, room), 0)
        if settings.words and self._responses and draw.random() < settings.words:
            return self._formatter.opening_ids(self._harmful[row], self._word(draw), most)
        ids = self._formatter.opening_ids(self._harmful[row], own or text, most)
        return ids[: draw.randint(1, len(ids))] if ids else []

    def _word(self, draw: random.Random) -> str:
        """Of some response, every other one as a sentence would begin with it."""
        response = draw.choice(self._responses)
        assert response is not None
        word = draw.choice(response.split())
        return word[:1].upper() + word[1:] if draw.random() < 0.5 else word


def anchor_line(config: Config, harmful: Sequence[Prompt]) -> str:
    """The anchor in words, for the plan."""
    section = config.refusal
    if not section.weight:
        return "refusal anchor: none"
    words = {
        "auto": "the base model's own refusals, written before training",
        "list": f"{len(section.texts)} given texts",
        "column": "the response column",
    }[section.source]
    if section.source == "column":
        known = sum(is_refusal(prompt.response or "") for prompt in harmful)
        words += f" ({known} of {len(harmful)} are refusals by the rules)"
    deep = section.prefill
    after = f"; {deep.probability:.0%} after up to {deep.tokens} tokens of an opening"
    return (
        f"refusal anchor: weight {section.weight:g}, {section.tokens} tokens, decay "
        f"{section.decay:g}, {words}{after if deep.probability else ''}"
    )


@dataclass(frozen=True)
class RefusalTokens:
    """The refusals' tokens of one micro-batch that are learned, and the harmless rows watched.

    index: (M,) positions in the flattened (n, T) harmful block that predict them.
    watch: (W,) positions in the flattened (m, T) harmless block: last prompt tokens of rows whose
        response begins otherwise than a refusal does.
    task: the tokens of both, with their weights (0 for those watched); a refusal's first token
        that is the likeliest counts among the first hits, on a watched row among the second.
    """

    index: Tensor
    watch: Tensor
    task: CETask

    @classmethod
    def of(cls, batch: MicroBatch) -> RefusalTokens | None:
        """From a batch on the CPU; None without an anchor."""
        weights = batch.refusal_weights
        if weights is None:
            return None
        width = weights.shape[1]
        rows, columns, first = _learned(weights)
        targets = batch.input_ids[rows, columns + 1]
        watch, openings = _watched(batch)
        task = CETask(
            torch.cat([targets, openings]),
            torch.cat([weights[rows, columns], torch.zeros(len(watch))]),
            torch.cat([first.long(), torch.full_like(watch, 2)]),
        )
        return cls(rows * width + columns, watch, task)

    def to(self, device: torch.device) -> RefusalTokens:
        """The same on `device`."""
        parts = (getattr(self.task, field.name) for field in dataclasses.fields(self.task))
        task = CETask(*(to_device(part, device) for part in parts))
        return RefusalTokens(to_device(self.index, device), to_device(self.watch, device), task)


def _learned(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of (n, T) at which a refusal's token is predicted, row by row, and whether
    it is the first of its row."""
    rows, columns = weights.nonzero(as_tuple=True)
    return rows, columns, rows.diff(prepend=rows.new_full((1,), -1)) != 0


def _watched(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Positions in the flattened harmless block of the rows that are watched, and the refusal's
    first token each is watched for: that of one of the batch's refusals."""
    weights, width = batch.refusal_weights, batch.input_ids.shape[1]
    assert weights is not None
    rows, columns, first = _learned(weights)
    if not len(rows):
        return rows, columns
    openings = batch.input_ids[rows[first], columns[first] + 1]
    last = batch.prompt_last[batch.num_harmful :]
    row = (last < width - 1).nonzero().squeeze(1)  # those with a response
    opening = openings[row % len(openings)]
    begins = batch.input_ids[batch.num_harmful + row, last[row] + 1]
    row, opening = row[begins != opening], opening[begins != opening]
    return row * width + last[row], opening


def refusal_counts(batch: MicroBatch) -> tuple[float, float, float]:
    """Sum of the weights of a batch's refusal tokens, its rows that have any, and the harmless rows
    watched."""
    weights = batch.refusal_weights
    if weights is None:
        return 0.0, 0.0, 0.0
    rows = float((weights > 0).any(-1).sum())
    return float(weights.sum()), rows, float(len(_watched(batch)[0]))


def refusal_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Of an optimizer step with an anchor; without one nothing.

    `refusal`: nats per token; `refusal_top1`: share of the refusals' first tokens that are the
    likeliest (left out where no prompt had room for a refusal); `harmless_refusal`: share of the
    watched harmless rows whose likeliest first token begins a refusal (left out where none was).
    """
    if "refusal_sum" not in sums:
        return {}
    row = {"refusal": sums["refusal_sum"] / max(sums["refusal_weights"], 1.0)}
    if sums["refusals"]:
        row["refusal_top1"] = sums["refusal_hits"] / sums["refusals"]
    if sums["watched"]:
        row["harmless_refusal"] = sums["harmless_hits"] / sums["watched"]
    return row
