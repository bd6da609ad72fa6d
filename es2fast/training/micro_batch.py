"""What the objective gets of one micro-batch: padded rows, or the same rows packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from es2fast.data import MicroBatch
from es2fast.data.packing import Packed, pack, pays
from es2fast.modeling.packing import attends_by_rows, takes_packed
from es2fast.modeling.taps import Intervention
from es2fast.training.refusals import RefusalTokens


def packed_form(
    batch: MicroBatch, model: Any, wanted: bool, attack: Intervention | None = None
) -> Packed | None:
    """A micro-batch packed, where that is wanted, computed right, and cheaper.

    Args:
        batch: on the CPU.
        model: transformers' config.
        wanted: `train.packing`.
        attack: on the harmful rows. One that changes every token changes their prefix, which is
            then apart.
    """
    rows, width = batch.input_ids.shape
    if not wanted or not takes_packed(model, width):
        return None
    packed = pack(batch, apart=attack is not None and attack.where == "all")
    hidden = model.get_text_config().hidden_size
    cheaper = attends_by_rows(model) or pays(rows, width, packed.tokens, hidden)
    return packed if cheaper else None


def objective_inputs(
    batch: MicroBatch,
    packed: Packed | None,
    refusal_total: Tensor,
    device: torch.device,
    anchored: bool = True,
    attack: Intervention | None = None,
) -> dict[str, Any]:
    """Arguments of `ES2Objective.forward` that a micro-batch decides.

    Args:
        batch: on the CPU.
        packed: it, see `packed_form`.
        refusal_total: sum of the refusal tokens' weights in the optimizer step.
        device: where the tensors go.
        anchored: with the refusals that the batch holds.
        attack: on the harmful rows.
    """
    index = batch.kl_weights.flatten().nonzero().squeeze(1)
    weights = batch.kl_weights.flatten()[index]
    target, last = batch.teacher, batch.prompt_last
    refusal = RefusalTokens.of(batch, refusal_total, device) if anchored else None
    attacked = None
    if packed is not None:
        index, weights, first = _once(_harmless_places(batch, packed)[index], weights)
        target = None if target is None else target[first]
        if attack is not None:
            attacked = _attacked_places(batch, packed, attack).to(device)
        last = packed.place[range(len(last)), last]
        if refusal is not None:
            refusal = _replaced(refusal, batch, packed, device)
    return {
        "input_ids": (batch if packed is None else packed).input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device) if packed is None else None,
        "prompt_last": last.to(device),
        "kl_index": index.to(device),
        "kl_weights": weights.to(device),
        "num_harmful": batch.num_harmful,
        "refusal": refusal,
        "target": None if target is None else target.to(device),
        "packed": None if packed is None else packed.to(device),
        "attack": attack,
        "attacked": attacked,
    }


def _attacked_places(batch: MicroBatch, packed: Packed, attack: Intervention) -> Tensor:
    """(k,) places of the states that an attack changes, each once."""
    n, width = batch.num_harmful, batch.input_ids.shape[1]
    rows, columns = attack.positions(batch.prompt_last[:n], width)
    real = batch.attention_mask[rows, columns].bool()
    return packed.place[rows, columns][real].unique()


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


def _replaced(
    refusal: RefusalTokens, batch: MicroBatch, packed: Packed, device: torch.device
) -> RefusalTokens:
    """The refusal's positions as places. A refusal follows its prompt, so each is in a suffix."""
    harmful = packed.place[: batch.num_harmful].flatten()
    return dataclasses.replace(
        refusal,
        index=harmful[refusal.index.cpu()].to(device),
        watch=_harmless_places(batch, packed)[refusal.watch.cpu()].to(device),
    )
