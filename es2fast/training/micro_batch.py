"""What the objective gets of one micro-batch: padded rows, or the same rows packed.

All of it follows from the rows alone, so it can be made while a GPU is at the step before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from es2fast.data import MicroBatch
from es2fast.data.packing import Packed, pack, pays
from es2fast.modeling.packing import attends_by_rows, takes_packed
from es2fast.modeling.taps import Where, attacked_positions
from es2fast.ops.moments.cache import TENSORS, TeacherMoments
from es2fast.training.refusals import RefusalTokens
from es2fast.transfer import to_device


def packed_form(
    batch: MicroBatch, model: Any, wanted: bool, attack: Where | None = None
) -> Packed | None:
    """A micro-batch packed, where that is wanted, computed right, and cheaper.

    Args:
        batch: on the CPU.
        model: transformers' config.
        wanted: `train.packing`.
        attack: where one may act on the harmful rows. One that changes every token changes the
            prefix of each, which then has no part in the common one.
    """
    rows, width = batch.input_ids.shape
    if not wanted or not takes_packed(model, width):
        return None
    packed = pack(batch, apart=attack == "all")
    hidden = model.get_text_config().hidden_size
    cheaper = attends_by_rows(model) or pays(rows, width, packed.tokens, hidden)
    return packed if cheaper else None


def objective_inputs(
    batch: MicroBatch,
    packed: Packed | None,
    anchored: bool = True,
    attack: Where | None = None,
) -> dict[str, Any]:
    """Arguments of `ES2Objective.forward` that a micro-batch decides, on the CPU.

    Args:
        batch: on the CPU.
        packed: it, see `packed_form`.
        anchored: with the refusals that the batch holds.
        attack: where one may act on the harmful rows.
    """
    index = batch.kl_weights.flatten().nonzero().squeeze(1)
    weights = batch.kl_weights.flatten()[index]
    target, last = batch.teacher, batch.prompt_last
    refusal = RefusalTokens.of(batch) if anchored else None
    attacked = None if attack is None else _attacked(batch, packed, attack)
    if packed is not None:
        index, weights, first = _once(_harmless_places(batch, packed)[index], weights)
        target = None if target is None else target[first]
        last = packed.place[range(len(last)), last]
        if refusal is not None:
            refusal = _replaced(refusal, batch, packed)
    return {
        "input_ids": (batch if packed is None else packed).input_ids,
        "attention_mask": batch.attention_mask if packed is None else None,
        "prompt_last": last,
        "kl_index": index,
        "kl_weights": weights,
        "num_harmful": batch.num_harmful,
        "refusal": refusal,
        "target": target,
        "packed": packed,
        "attacked": attacked,
    }


def sent(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same inputs on `device`, for whose tensors the host does not wait."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return to_device(value, device)
        if isinstance(value, tuple):
            return tuple(map(one, value))
        if isinstance(value, TeacherMoments):
            return dataclasses.replace(value, **{k: one(getattr(value, k)) for k in TENSORS})
        return value.to(device) if isinstance(value, Packed | RefusalTokens) else value

    return {name: one(value) for name, value in inputs.items()}


def _attacked(
    batch: MicroBatch, packed: Packed | None, attack: Where
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the states that an attack changes, each once, and the place among the
    step's of the harmful row that each belongs to."""
    n, width = batch.num_harmful, batch.input_ids.shape[1]
    rows, columns = attacked_positions(attack, batch.prompt_last[:n], width)
    owner = torch.tensor(range(n) if batch.places is None else batch.places)[rows]
    if packed is None:
        return rows, columns, owner
    real = batch.attention_mask[rows, columns].bool()
    places = packed.place[rows, columns][real]
    return torch.zeros_like(places), places, owner[real]


def _harmless_places(batch: MicroBatch, packed: Packed) -> Tensor:
    """(m T,) places of the harmless tokens behind the harmful suffixes."""
    return packed.place[batch.num_harmful :].flatten() - packed.harmful


def _once(places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each place once, with the sum of its weights, and where it comes first in `places`."""
    unique, which = places.unique(return_inverse=True)
    total = torch.zeros(len(unique), dtype=weights.dtype).index_add_(0, which, weights)
    first = torch.full_like(unique, len(places))
    first.scatter_reduce_(0, which, torch.arange(len(places)), "amin")
    return unique, total, first


def _replaced(refusal: RefusalTokens, batch: MicroBatch, packed: Packed) -> RefusalTokens:
    """The refusal's positions as places. A refusal follows its prompt, so each is in a suffix."""
    harmful = packed.place[: batch.num_harmful].flatten()
    return dataclasses.replace(
        refusal,
        index=harmful[refusal.index],
        watch=_harmless_places(batch, packed)[refusal.watch],
    )
