"""The family of attacks that add a push to hidden states: fit on the model under attack, then push.

Legend: B rows, T tokens, H hidden size, n prompts.

A push replaces, at the *last position only*, the output of decoder blocks while text is generated:
e <- e + push(e). Hooks sit on the blocks' outputs, the same tensor the states for `fit` come from,
and blocks run in ascending order, so layer l sees the already pushed input. With a KV cache the
prompt pass has T > 1 and every decoding step T = 1; `steps: prompt` pushes only in the former,
`steps: all` in both.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import Answer, Attack, AttackSettings, Target
from es2fast.data import Prompt
from es2fast.modeling.taps import blocks, hidden_of, hooks, with_hidden

TRIALS = 16  # training prompts on which an attacker compares blocks
CANDIDATES = 8  # blocks it tries at most


@dataclass
class Pushes:
    """Sums over all pushed (row, layer, step) triples."""

    count: int = 0
    total: float = 0.0  # of |push|
    relative: float = 0.0  # of |push| / |e|

    def add(self, push: Tensor, states: Tensor) -> None:
        """Counts the rows of push (B, H) that are not zero; states (B, H) before the push."""
        size = push.float().norm(dim=-1)
        norm = states.float().norm(dim=-1).clamp_min(1e-12)
        self.count += int((size > 0).sum())
        self.total += float(size.sum())
        self.relative += float((size / norm).sum())

    def merge(self, other: Pushes) -> None:
        """Adds another batch's sums."""
        self.count += other.count
        self.total += other.total
        self.relative += other.relative

    @property
    def mean(self) -> float:
        """Mean |push| where something was pushed, in units of the states; 0 without pushes."""
        return self.total / max(self.count, 1)

    @property
    def relative_push(self) -> float:
        """Mean |push| / |e| where something was pushed; 0 without pushes."""
        return self.relative / max(self.count, 1)


def total_of(answers: Sequence[Answer]) -> Pushes:
    """The pushes behind all of these answers."""
    total = Pushes()
    for answer in answers:
        if "pushes" in answer.info:
            total.merge(Pushes(**answer.info["pushes"]))
    return total


class PushSettings(AttackSettings):
    steps: Literal["all", "prompt"] = Field(
        "all", description="push at every decoding step, or only while the prompt is read"
    )


class PushAttack(Attack):
    """An attack that adds something to block outputs. Subclasses say what is fitted and pushed."""

    Settings = PushSettings
    settings: PushSettings

    def __init__(self, settings: PushSettings | None = None):
        super().__init__(settings or self.Settings())
        self.at: list[int] | None = None  # the attacker's choice of blocks, of those fitted
        self._trials: list[dict[str, Any]] = []

    @abstractmethod
    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """Learns from states of the model under attack: layer -> (n, H), last prompt token."""

    @abstractmethod
    def layers(self) -> list[int]:
        """Blocks that are pushed; known after `fit`."""

    @abstractmethod
    def push(self, layer: int, states: Tensor) -> Tensor:
        """What is added at `layer`: states (B, H) fp32 -> (B, H) fp32."""

    def candidates(self) -> list[int]:
        """Blocks of which the attacker picks one by trying; none: all of `layers` are pushed."""
        return []

    def prepare(self, target: Target) -> None:
        """Fits, and picks a block where there is a choice: the one at which most training prompts
        come out useful; ties go to the smaller push."""
        self.fit(*target.states)
        best: tuple[float, float] | None = None
        chosen: list[int] | None = None
        every = self.candidates()
        stride = max(1, math.ceil(len(every) / CANDIDATES))
        prompts = target.harmful[:TRIALS]
        for layer in target.progress(every[stride - 1 :: stride], f"{self.label}, choice", "block"):
            self.at = [layer]
            trial = target.trial(
                self.label,
                {"layer": layer},
                prompts,
                lambda: [found[0] for found in self._in_batches(target, prompts)],
            )
            push = total_of(trial.answers).relative_push
            self._trials.append(trial.parameters | {"useful": trial.useful, "relative_push": push})
            if best is None or (trial.useful, -push) > best:
                best, chosen = (trial.useful, -push), [layer]
        self.at = chosen

    def _in_batches(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        starts = range(0, len(prompts), target.batch_size)
        parts = [self.answers(target, prompts[i : i + target.batch_size]) for i in starts]
        return [found for part in parts for found in part]

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        with self.applied(target.model) as pushes:
            texts = target.generate(prompts)
        # the sums belong to the batch: its first answer carries them
        infos = [{"pushes": asdict(pushes)}, *({} for _ in texts[1:])]
        return [[Answer(text, info=info)] for text, info in zip(texts, infos)]

    def summary(self) -> dict[str, Any]:
        return {"layers": self.layers()} | ({"trials": self._trials} if self._trials else {})

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Pushes]:
        """Installs the pushes for as long as the context lasts; yields their statistics."""
        pushes = Pushes()
        all_blocks = blocks(model)
        with hooks(
            [all_blocks[i].register_forward_hook(self._hook(i, pushes)) for i in self.layers()]
        ):
            yield pushes

    def _hook(self, layer: int, pushes: Pushes) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if self.settings.steps == "prompt" and hidden.shape[1] == 1:
                return None
            states = hidden[:, -1].float()
            push = self.push(layer, states)
            pushes.add(push, states)
            hidden = hidden.clone()
            hidden[:, -1] = (states + push).to(hidden.dtype)
            return with_hidden(output, hidden)

        return hook
