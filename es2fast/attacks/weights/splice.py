"""Splice: the base model's lower blocks under the tuned model's upper ones.

    embedding_base, block_0 .. block_K of the base | block_K+1 .. of the tuned model, its head

Whoever has the weights of both can do this, and it undoes all that a defence changed up to block
K: what is left is the ceiling of what any defence of this kind can do. K defaults to the block
below the deepest one that differs from the base, so that one changed block, and whatever was
changed in the final norm and the head, remains.

The base model is loaded once, beside the model under attack, which for that moment takes the memory
of both; afterwards only the blocks that are needed stay. They are put into the list of blocks while
the model answers, and the model's own blocks are put back: nothing is copied or overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import nn

from es2fast.attacks.base import Answer, Attack, AttackSettings, Target
from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, blocks


class SpliceSettings(AttackSettings):
    depth: int | None = Field(
        None,
        ge=0,
        description="K, the last block taken from the base; default: the one below the deepest "
        "block that differs",
    )


class Splice(Attack):
    """Answers with blocks 0..K and the embedding of the base model."""

    name = "splice"
    Settings = SpliceSettings
    settings: SpliceSettings
    needs_base = True

    def __init__(self, settings: SpliceSettings | None = None):
        super().__init__(settings or SpliceSettings())
        self._embedding: nn.Module | None = None
        self._lower: list[nn.Module] = []

    def prepare(self, target: Target) -> None:
        """Loads the base model and keeps its embedding and blocks 0..K.

        Raises:
            UserError: no base model; another architecture; nothing to splice.
        """
        if target.load_base is None:
            raise UserError(
                "splice: there is no base model to take blocks from; it applies to a tuned model "
                "that is evaluated with its base (--base)"
            )
        base = target.load_base()
        _check_same_shape(base, target.model)
        depth = self._depth(base, target.model)
        self._embedding = backbone(base).get_input_embeddings()
        self._lower = list(blocks(base))[: depth + 1]
        own = backbone(target.model).get_input_embeddings(), *blocks(target.model)
        if getattr(base, "hf_device_map", None) is None:  # else its parts stay where they are
            for part, place in zip((self._embedding, *self._lower), own):
                part.to(next(place.parameters()).device)
        del base  # the rest of it can go

    def state(self) -> None:
        """Nothing: every process has its own base model to take blocks from."""

    def restore(self, state: None, target: Target) -> None:
        self.prepare(target)

    def _depth(self, base: nn.Module, model: nn.Module) -> int:
        pairs = list(zip(blocks(base), blocks(model)))
        asked = self.settings.depth
        if asked is not None:
            if asked >= len(pairs):
                raise UserError(
                    f"evaluate.attacks: splice.depth: block {asked} is out of range; the model "
                    f"has blocks 0..{len(pairs) - 1}"
                )
            return asked
        different = [i for i, (ours, theirs) in enumerate(pairs) if not same_weights(ours, theirs)]
        if not different:
            raise UserError("splice: no block differs from the base model's")
        if different[-1] == 0:
            raise UserError(
                "splice: only block 0 differs from the base model's, so nothing lies below it; "
                "set splice.depth to replace it all the same"
            )
        return different[-1] - 1

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        with self.applied(target.model):
            return [[Answer(text)] for text in target.generate(prompts)]

    def summary(self) -> dict[str, Any]:
        return {"layers": list(range(len(self._lower)))}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The base's lower part in `model` while the context lasts."""
        assert self._embedding is not None, "prepare() comes first"
        decoder, every = backbone(model), blocks(model)
        own = decoder.get_input_embeddings(), list(every)
        parts = [self._embedding, *self._lower]
        modes = [part.training for part in parts]
        try:
            decoder.set_input_embeddings(self._embedding)
            for i, block in enumerate(self._lower):
                every[i] = block
            for part in parts:
                part.eval()
            yield
        finally:
            decoder.set_input_embeddings(own[0])
            for i, block in enumerate(own[1]):
                every[i] = block
            for part, mode in zip(parts, modes):
                part.train(mode)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Both modules have the same tensors, names and all."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.to(theirs[key].device), theirs[key]) for key, value in ours.items()
    )


def _check_same_shape(base: nn.Module, model: nn.Module) -> None:
    shapes = [
        (
            type(backbone(m)).__name__,
            len(blocks(m)),
            tuple(backbone(m).get_input_embeddings().weight.shape),
            next(m.parameters()).dtype,
        )
        for m in (base, model)
    ]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"splice: the base is a {_told(shapes[0])}, the model a {_told(shapes[1])}; "
            "blocks can only be exchanged between models of one architecture"
        )


def _told(shape: tuple[Any, ...]) -> str:
    name, count, table, dtype = shape
    return f"{name} of {count} blocks ({table[0]} x {table[1]} embedding, {dtype})"
