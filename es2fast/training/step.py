"""One optimizer step, and a look at the KL without one.

`gradient_accumulation` micro-batches, each one engine forward and one backward; one small
all-reduce before them (the number of tokens of the step) and one after them (the metrics), so that
every rank has the same numbers to decide from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from es2fast.data import MicroBatch
from es2fast.data.packing import Packed
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.taps import Intervention, causal_lm
from es2fast.training.micro_batch import objective_inputs, packed_form
from es2fast.training.refusals import refusal_counts

# of a step, all ranks; computed: tokens that are no padding, those that rows share counted once
COUNTS = (
    "kl_tokens",
    "tokens",
    "computed",
    "places",
    "rows",
    "refusal_weights",
    "refusals",
    "watched",
)
# of the objective's metrics; the rest are means
SUMS = ("kl_sum", "refusal_sum", "refusal_hits", "harmless_hits")


def train_step(
    engine: Any,
    batches: list[MicroBatch],
    kl_weight: float,
    runtime: Runtime,
    attack: Intervention | None = None,
    observe: Callable[[dict[int, Tensor], int], None] | None = None,
    margin: float | None = None,
    asked_to_stop: Callable[[], bool] | None = None,
    skipped: Callable[[list[Tensor]], None] | None = None,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches.

    A step whose gradients are no finite numbers on some rank changes nothing: neither weights nor
    optimizer, schedule, bank or what `observe` gathers.

    Args:
        attack: a simulated attack on the harmful states.
        observe: gets the block outputs (layer -> (n + m, H)) and n of each clean micro-batch.
        margin: of this step, in place of the configured one.
        asked_to_stop: this rank; asked once, at the end of the step.
        skipped: called on every rank when the step was left out, with (n + m,) booleans per
            micro-batch: the row's tapped states are finite.

    Returns:
        the same numbers on every rank: sums over ranks and micro-batches, `kl_sum`, with an anchor
        the rest of SUMS, and COUNTS; means of the objective's other metrics;
        `grad_norm` before clipping; `stop`, above 0 when any rank was asked to stop; `skipped`, 1
        when the step was left out.
    """
    packings = _packings(engine, batches, attack)
    counts = _counts(batches, packings, runtime)
    metrics: dict[str, Tensor] = {}
    bank = engine.module.bank
    if bank is not None:
        bank.mark()
    seen: list[dict[int, Tensor]] = []
    finite: list[Tensor] = []
    for batch, packed in zip(batches, packings):
        loss, found = _forward(
            engine, batch, packed, kl_weight, counts, len(batches), runtime, attack, margin
        )
        engine.backward(loss)
        engine.step()
        taps = engine.module.taps
        seen.append(dict(taps.outputs))
        finite.append(torch.stack([x.isfinite().all(-1) for x in taps.states.values()]).all(0))
        for key, value in found.items():
            metrics[key] = metrics.get(key, 0.0) + value.float()
    applied = engine.was_step_applied()
    if not applied:
        if bank is not None:
            bank.undo()
        if skipped is not None:
            skipped(finite)
    elif attack is None and observe is not None:
        for batch, outputs in zip(batches, seen):
            observe(outputs, batch.num_harmful)
    norm = engine.get_global_grad_norm()
    shared = {key: value / len(batches) for key, value in metrics.items() if key not in SUMS}
    shared["grad_norm"] = torch.as_tensor(
        0.0 if norm is None else norm, device=runtime.device
    ).float()
    stop = asked_to_stop is not None and asked_to_stop()
    shared["skipped"] = torch.tensor(float(not applied), device=runtime.device)
    shared["stop"] = torch.tensor(float(stop), device=runtime.device)
    summed = {key: metrics[key] for key in SUMS if key in metrics}
    sums = [*summed.values(), *(value / runtime.world_size for value in shared.values())]
    values = torch.cat([runtime.sum(torch.stack(sums)), counts]).tolist()
    return dict(zip([*summed, *shared, *COUNTS], values))


def _packings(
    engine: Any, batches: list[MicroBatch], attack: Intervention | None
) -> list[Packed | None]:
    """The micro-batches' packed forms."""
    objective = engine.module
    wanted, model = objective.config.train.packing, causal_lm(objective.student).config
    return [packed_form(batch, model, wanted, attack) for batch in batches]


def _counts(
    batches: list[MicroBatch], packings: list[Packed | None], runtime: Runtime
) -> Tensor:  # fmt: skip
    """COUNTS over ranks and micro-batches."""
    own = [
        (
            float(b.kl_weights.sum()),
            b.num_tokens,
            b.num_tokens if packed is None else packed.tokens,
            b.input_ids.numel() if packed is None else packed.tokens,
            len(b.input_ids),
            *refusal_counts(b),
        )
        for b, packed in zip(batches, packings)
    ]
    return runtime.sum(torch.tensor(own, device=runtime.device).sum(0))


def _forward(
    engine: Any,
    batch: MicroBatch,
    packed: Packed | None,
    kl_weight: float,
    counts: Tensor,
    accumulation: int,
    runtime: Runtime,
    attack: Intervention | None = None,
    margin: float | None = None,
    anchored: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective on one micro-batch; without the refusals that it holds if not `anchored`."""
    anchor = counts[COUNTS.index("refusal_weights")]
    return engine(
        **objective_inputs(batch, packed, anchor, runtime.device, anchored, attack),
        kl_weight=kl_weight,
        kl_tokens=counts[0],
        accumulation=accumulation,
        margin=margin,
    )


@torch.no_grad()
def measure_kl(engine: Any, steps: list[list[MicroBatch]], runtime: Runtime) -> float:
    """KL in nats per token of the weights as they are, without a step.

    Args:
        steps: this rank's micro-batches of one or more optimizer steps.
    """
    engine.eval()
    total = torch.zeros(2, device=runtime.device)
    for batches in steps:
        packings = _packings(engine, batches, None)
        counts = _counts(batches, packings, runtime)
        for batch, packed in zip(batches, packings):
            _, found = _forward(
                engine, batch, packed, 0.0, counts, len(batches), runtime, anchored=False
            )
            total[0] += found["kl_sum"]
        total[1] += counts[0] / runtime.world_size
    engine.train()
    kl_sum, tokens = runtime.sum(total).tolist()
    return kl_sum / tokens
