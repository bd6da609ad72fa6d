"""The geometry at more tokens than the last one of the prompt.

A chat template writes some tokens after the user's words. arXiv 2507.11878 finds that models read
harmfulness at the last token of the instruction, and decide about refusing at the template's tokens
after it. A separation at the last prompt token alone may leave the first untouched. So distance and
probes are also given

    instruction   at the last token of the user's words,
    template      for the mean state over the template's tokens after it, the last one included.

States come a few blocks at a time and are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.states import BATCH, STATE_BYTES, states_by_block
from es2fast.probing.crossval import accuracy_interval, draws, held_out
from es2fast.probing.probes import mean_distance

INSTRUCTION, TEMPLATE = "instruction", "template"
PARTS = (INSTRUCTION, TEMPLATE)
Rows = dict[str, dict[str, Any]]  # position -> figures


def more_positions(
    model: nn.Module,
    formatter: Formatter,
    measured: Mapping[str, Sequence[Prompt]],
    fit: tuple[Sequence[Prompt], Sequence[Prompt]],
    base: Mapping[str, Any] | None,
    memory: int = STATE_BYTES,
    batch: int = BATCH,
) -> dict[str, Rows]:
    """Distances and cross-validated probes at the other positions, per block.

    Args:
        model: in eval mode on its device.
        formatter: its chat format.
        measured: held-out prompts of the groups `harmful` and `harmless`, for the distances.
        fit: training prompts, harmful and harmless, for the probes.
        base: the base model's `separation`; None when this is the base model.
        memory: bytes of states at a time.
        batch: prompts per pass.

    Returns:
        block -> position -> {distance, distance_over_base, probe_accuracy, probe_interval};
        distance_over_base is None where the base model has no such position. No position where the
        template writes nothing after the instruction, and no mean where it writes one token.
    """
    tail = formatter.template_tail()
    if tail == 0:
        return {}
    groups = [measured["harmful"], measured["harmless"], *fit]
    prompts = [prompt for group in groups for prompt in group]
    sizes = [len(group) for group in groups]
    alone = Runtime(0, 1, next(model.parameters()).device, "")
    weights = draws(sizes[2:])

    def select(hidden: Tensor) -> Tensor:
        instruction = hidden[:, -min(tail + 1, hidden.shape[1])].float()
        return torch.cat([instruction, hidden[:, -tail:].float().mean(1)], dim=-1)

    found: dict[str, Rows] = {}
    kept = PARTS if tail > 1 else PARTS[:1]
    for states in states_by_block(
        model,
        formatter,
        prompts,
        alone,
        memory=memory,
        select=select,
        parts=len(PARTS),
        batch=batch,
    ):
        for layer, rows in states.items():
            before = None if base is None else base.get(str(layer), {}).get("positions", {})
            found[str(layer)] = {
                name: _figures(
                    part.split(sizes), weights, None if before is None else before.get(name, {})
                )
                for name, part in zip(kept, rows.chunk(len(PARTS), dim=1))
            }
    return found


def _figures(
    groups: Sequence[Tensor], weights: Tensor, base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Of one block and position: groups held-out harmful, harmless, training harmful, harmless,
    each (n, H); base: what was found there on the base model, None when this is it."""
    a, b, fit_a, fit_b = groups
    distance = mean_distance(a, b).item()
    before = distance if base is None else base.get("distance")
    correct = held_out(fit_a, fit_b).correct
    return {
        "distance": distance,
        "distance_over_base": distance / before if before else None,
        "probe_accuracy": float(correct.mean()),
        "probe_interval": list(accuracy_interval(correct, weights)),
    }
