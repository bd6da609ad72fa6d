"""GCG: an adversarial suffix of real tokens behind the user's text, by greedy coordinate gradient.

Legend: K suffix tokens, L target tokens, V vocabulary, H hidden size, C candidates.

    loss(suffix) = -1/L sum log p(target_i | prompt with suffix, target_<i)

Each step: the gradient with respect to a one-hot suffix, (K, V), says to first order what each
replacement would do; `width` candidates replace one token each, at a random position, by a random
one of the `top_k` most promising tokens there; the losses of all are computed, and the best one is
kept if it is lower than what there is. (Zou et al. 2023, "Universal and Transferable Adversarial
Attacks on Aligned Language Models", move to the best candidate even if it is worse.) The defaults
are theirs but for the steps: 250, 512, 256, twenty "x".

The attack is on text: a candidate counts only if its ids are what the tokenizer makes of the text.
Candidates whose suffix does not survive decoding and encoding are dropped before their losses are
computed, and the winner is checked within the whole prompt. Tokens are printable ASCII by default.

What stands before the suffix is the same for all candidates and is read once: its keys and values
are a cache that each batch of `batch` candidates repeats. The one-hot gradient is g E^T, g (K, H)
being the gradient by the suffix's embeddings, so no (K, V) one-hot suffix goes through the model.

Prompts are attacked one after the other, so a suffix does not depend on what its prompt shares a
batch with; `data.max_length` does not cut prompts here, which would cut the suffix. It is costly: a
step is `width` forward passes over suffix and target.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import GRADIENT_PASSES, Answer, Attack, Cost, Target
from es2fast.attacks.prompts.embeddings import (
    Row,
    TargetSettings,
    embed,
    free_dtype,
    frozen,
    label_losses,
    plain_ids,
    target_ids,
)
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, causal_lm

SLICE = 8192  # tokens of the vocabulary per matrix product
UNCUT = 1 << 20  # data.max_length while suffixes are fitted


class GcgSettings(TargetSettings):
    initial: str = Field(
        " ".join(20 * "x"), min_length=1, description="suffix to start from; its length stays"
    )
    steps: int = Field(250, ge=1)
    width: int = Field(512, ge=1, description="candidates per step")
    top_k: int = Field(256, ge=1, description="tokens per position that candidates draw from")
    batch: int = Field(64, ge=1, description="candidates per forward pass")
    stop: float = Field(
        0.0, ge=0, description="loss at which a prompt is done, nats per token; 0: never early"
    )
    ascii: bool = Field(True, description="printable ASCII tokens only")


@dataclass
class Suffix:
    """Ids of the suffix as it is, its loss, and how it got there."""

    ids: Tensor  # (K,) on the CPU
    loss: float
    curve: list[float]  # the loss at the start and after each step
    tried: int = 0  # candidates that were drawn
    kept: int = 0  # of them, those that survived the tokenizer


class Gcg(Attack):
    """Greedy coordinate gradient, one suffix per prompt; see the module."""

    name = "gcg"
    Settings = GcgSettings
    settings: GcgSettings

    def __init__(self, settings: GcgSettings | None = None):
        super().__init__(settings or self.Settings())

    def cost(self, target: Target, prompts: int) -> Cost:
        steps = prompts * self.settings.steps
        return Cost(prompts, steps * (self.settings.width + GRADIENT_PASSES))

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        found: list[Suffix] = []
        rows: list[list[int]] = []
        total = range(len(prompts) * self.settings.steps)
        with frozen(target.model), target.progress(total, f"{self.label}, suffixes", "step") as bar:
            allowed = self.allowed(target)
            for number, prompt in enumerate(prompts):
                text = SuffixText(target.formatter, prompt, self.settings.initial)
                found.append(self.fit(target, text, allowed, bar))
                rows.append(text.whole(found[-1].ids.tolist()))
                bar.update((number + 1) * self.settings.steps - bar.n)
        return [
            [Answer(text, info={"first_loss": one.curve[0], "loss": one.loss,
                                "steps": len(one.curve) - 1,
                                "surviving": one.kept / max(one.tried, 1),
                                "suffix": target.formatter.decode(one.ids)})]
            for text, one in zip(target.generate_rows(rows), found)
        ]  # fmt: skip

    def allowed(self, target: Target) -> Tensor:
        """(n,) ids that may stand in a suffix, ascending."""
        ids = plain_ids(target)
        if not self.settings.ascii:
            return ids
        texts = target.formatter.tokenizer.batch_decode(ids[:, None].tolist())
        fine = [text.isascii() and text.isprintable() for text in texts]
        return ids[torch.tensor(fine)]

    def fit(self, target: Target, text: SuffixText, allowed: Tensor, bar: Any = None) -> Suffix:
        """The suffix of one prompt. The model must be `frozen`.

        Args:
            text: the prompt with its initial suffix.
            allowed: (n,) ids that may be put in.
            bar: a progress bar, one step each.
        """
        wanted = target_ids(target.formatter, self.settings.target, text.prompt)
        losses = SuffixLoss(
            target.model, Row(text.before, text.after, wanted), target.device, self.settings.batch
        )
        noise = torch.Generator().manual_seed(target.seed)
        ids = torch.tensor(text.initial)
        first = float(losses(ids[None])[0])
        found = Suffix(ids, first, [first])
        for _ in range(self.settings.steps):
            if found.loss <= self.settings.stop:
                break
            self._step(found, text, losses, allowed, noise)
            found.curve.append(found.loss)
            if bar is not None:
                bar.set_postfix(loss=f"{found.loss:.3f}", refresh=False)
                bar.update()
        return found

    def _step(
        self,
        found: Suffix,
        text: SuffixText,
        losses: SuffixLoss,
        allowed: Tensor,
        noise: torch.Generator,
    ) -> None:
        """Replaces one token of `found` if a candidate is better that survives the tokenizer."""
        scores = token_scores(losses.model, losses.gradient(found.ids), allowed)
        best = scores.topk(min(self.settings.top_k, len(allowed)), largest=False).indices
        drawn = candidates(found.ids, allowed[best.cpu()], self.settings.width, noise)
        found.tried += len(drawn)
        drawn = drawn[torch.tensor(text.survivors(drawn.tolist()), dtype=torch.bool)]
        found.kept += len(drawn)
        if not len(drawn):
            return
        values = losses(drawn)
        for number in values.argsort(stable=True).tolist():
            if not float(values[number]) < found.loss:
                return
            if text.fits(drawn[number].tolist()):
                found.ids, found.loss = drawn[number], float(values[number])
                return


class SuffixText:
    """One prompt with a suffix, as text and as ids.

    Attributes:
        before, after: ids around the suffix.
        initial: ids of the initial suffix.

    Raises:
        UserError: the initial suffix cannot be told from the text around it once tokenized.
    """

    def __init__(self, formatter: Formatter, prompt: Prompt, initial: str):
        data = formatter.data.model_copy(update={"max_length": UNCUT})
        self._formatter = Formatter(formatter.tokenizer, data)
        self.prompt = prompt
        plain, whole = self._ids(""), self._ids(f" {initial}")
        tail = self._formatter.tail_length(whole)
        start = _common_prefix(plain[: len(plain) - tail], whole)
        self.before, self.after = whole[:start], whole[len(whole) - tail :]
        self.initial = whole[start : len(whole) - tail]
        self._joint = ""  # what stands between the prompt's text and the decoded suffix
        if not self.fits(self.initial):
            self._joint = " "
        if not self.initial or not self.fits(self.initial):
            raise UserError(
                f"evaluate.attacks: gcg.initial: {initial!r} does not come back from the tokenizer "
                "as it was; use other words"
            )

    def whole(self, suffix: Sequence[int]) -> list[int]:
        """Ids of the prompt with a suffix."""
        return [*self.before, *suffix, *self.after]

    def fits(self, suffix: Sequence[int]) -> bool:
        """Whether the tokenizer makes these ids of the prompt's text with the suffix's text."""
        text = self._joint + self._formatter.decode(suffix)
        return self._ids(text) == self.whole(suffix)

    def survivors(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Which suffixes come back alone from decoding and encoding."""
        texts = [self._formatter.decode(suffix) for suffix in suffixes]
        again = self._formatter.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [list(new) == list(old) for new, old in zip(again, suffixes)]

    def _ids(self, suffix: str) -> list[int]:
        *rest, last = self.prompt.messages
        turn = {**last, "content": last["content"] + suffix}
        return self._formatter.prompt_ids(Prompt((*rest, turn)))


class SuffixLoss:
    """Losses of suffixes between a fixed beginning and end, `batch` of them per pass.

    Args:
        model: `frozen`.
        row: what stands before and after the suffix, and the target.
    """

    def __init__(self, model: nn.Module, row: Row, device: torch.device, batch: int):
        self.model, self._row, self._device, self._batch = model, row, device, batch

    @torch.no_grad()
    def __call__(self, suffixes: Tensor) -> Tensor:
        """(C, K) ids -> (C,) losses on the CPU."""
        after = torch.tensor([*self._row.after, *self._row.target[:-1]], dtype=torch.int64)
        found = []
        for part in suffixes.split(self._batch):
            ids = torch.cat([part, after.expand(len(part), -1)], dim=1).to(self._device)
            found.append(self._losses(embed(self.model, ids)).cpu())
        return torch.cat(found)

    def gradient(self, suffix: Tensor) -> Tensor:
        """Of the loss by the suffix's embeddings: (K,) ids -> (K, H)."""
        after = torch.tensor([*self._row.after, *self._row.target[:-1]], dtype=torch.int64)
        rest = embed(self.model, after.to(self._device))
        free = embed(self.model, suffix.to(self._device)).to(free_dtype(self.model))
        free.requires_grad_()
        loss = self._losses(torch.cat([free.to(rest.dtype), rest])[None])[0]
        return torch.autograd.grad(loss, free)[0]

    def _losses(self, embeddings: Tensor) -> Tensor:
        """(C, T, H) of suffix, end of the prompt and target -> (C,)."""
        count, length = embeddings.shape[:2]
        start = len(self._row.before)
        labels = torch.tensor(self._row.target, device=self._device)
        hidden = backbone(self.model)(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(
                count, start + length, dtype=torch.int64, device=self._device
            ),
            position_ids=torch.arange(start, start + length, device=self._device).expand(count, -1),
            use_cache=start > 0,
            **self._cached(count),
        ).last_hidden_state
        return label_losses(self.model, hidden[:, -len(labels) :], labels.expand(count, -1))

    def _cached(self, count: int) -> dict[str, Any]:
        """A copy of the cache of what stands before the suffix, repeated, since a pass extends it;
        as an argument of the decoder."""
        if not self._row.before:
            return {}
        cache = copy.deepcopy(self._prefix)
        cache.batch_repeat_interleave(count)
        return {cache_argument(self.model): cache}

    @cached_property
    @torch.no_grad()
    def _prefix(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=causal_lm(self.model).config)
        ids = torch.tensor([list(self._row.before)], device=self._device)
        backbone(self.model)(input_ids=ids, use_cache=True, **{cache_argument(self.model): cache})
        return cache


def cache_argument(model: nn.Module) -> str:
    """What the decoder calls its cache: transformers renames `past_key_values` during 5.x."""
    known = inspect.signature(backbone(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


@torch.no_grad()
def token_scores(model: nn.Module, gradient: Tensor, allowed: Tensor) -> Tensor:
    """The loss's gradient by a one-hot suffix: (K, H) by embeddings -> (K, n) by allowed tokens.

    Lower is better: to first order, replacing token a by b changes the loss by score b - score a.
    """
    parts = allowed.to(gradient.device).split(SLICE)
    return torch.cat([gradient @ embed(model, ids).to(gradient.dtype).T for ids in parts], dim=1)


def candidates(ids: Tensor, best: Tensor, width: int, noise: torch.Generator) -> Tensor:
    """(K,) ids and (K, k) tokens per position -> (C, K), each with one token replaced.

    C is `width` less repetitions and what equals `ids`.
    """
    where = torch.randint(len(ids), (width,), generator=noise)
    which = torch.randint(best.shape[1], (width,), generator=noise)
    drawn = ids.repeat(width, 1)
    drawn[torch.arange(width), where] = best[where, which]
    drawn = torch.unique(drawn, dim=0)
    return drawn[(drawn != ids).any(dim=1)]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length
