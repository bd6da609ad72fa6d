"""What tests of attacks share: a tiny model as a target, a judge that is told what counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_models import OBJECTS, tiny_model, tokenizer
from torch import nn

from es2fast.attacks.base import Target
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.judges.base import Item, Judge, Verdict
from es2fast.modeling.taps import blocks

HARMFUL = [Prompt.of(f"{verb} the {thing} .") for thing in OBJECTS for verb in ("break", "steal")]
HARMLESS = [Prompt.of(f"{verb} a {thing} .") for thing in OBJECTS for verb in ("paint", "draw")]


class Says(Judge):
    """Useful where the answer satisfies `counts`, else refused."""

    name = "says"

    def __init__(self, counts: Callable[[str], bool]):
        self.counts = counts

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        return ["useful" if self.counts(answer) else "refused" for _, answer, _ in items]


def small_target(model: nn.Module | None = None, **options: Any) -> Target:
    """A random model of 4 blocks of width 32 (llama) with 16 + 16 training prompts."""
    chosen = tiny_model("llama") if model is None else model
    known = {"judge": Says(lambda text: "sure" in text), "max_new_tokens": 5, "batch_size": 8}
    formatter = Formatter(tokenizer(), DataConfig())
    return Target(chosen, formatter, HARMFUL, HARMLESS, **(known | options))


def padded(target: Target) -> dict[str, Any]:
    """Inputs of four prompts of different lengths, padded on the left."""
    texts = ["break the car .", "paint", "steal a boat please", "draw the house here is some text"]
    return target.formatter.prompt_batches([Prompt.of(text) for text in texts], 4)[0]


@torch.no_grad()
def logits(target: Target) -> torch.Tensor:
    """The model's logits on `padded`, (4, T, V)."""
    return target.model(**padded(target)).logits


def hook_count(model: nn.Module) -> int:
    """Hooks anywhere in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all tensors."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """All tensors are bitwise those of `snapshot`, and there is no hook."""
    now = model.state_dict()
    same = now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)
    return same and hook_count(model) == 0 and len(blocks(model)) > 0
