"""One optimizer step, and a look at the KL without one.

`gradient_accumulation` micro-batches, each one engine forward and one backward, and then one small
all-reduce: of the step's metrics, so that every rank has the same numbers to decide from, together
with the number of tokens of the step after it, which that one's losses are divided by.

So that a GPU has work while the host prepares, the rows of the next step are made ready behind the
forward of a step's first micro-batch, and the numbers of the step before are read there. (What that
buys has not been measured on one.) Nothing here makes the host wait for a GPU, but a head in parts
does (`train.zero3_head: sharded`), for how many tokens each rank has, in every micro-batch; and
DeepSpeed, for the gradients' norm in `engine.step`, by which a step is left out, and under ZeRO 2
and 3 in `engine.backward` too; and transformers, about rows that are padded and not packed, whether
their mask hides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from es2fast.data import MicroBatch
from es2fast.data.packing import Packed
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.taps import Intervention, Where, causal_lm
from es2fast.training.micro_batch import objective_inputs, packed_form, sent
from es2fast.training.refusals import refusal_counts
from es2fast.transfer import to_device

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


@dataclass(frozen=True)
class StepInputs:
    """One rank's rows of an optimizer step.

    micro_batches: of each the arguments of `ES2Objective.forward` that it decides, on the CPU;
    counts: (len(COUNTS),) fp64, this rank's, on the device; shared: all ranks', once they are
    known.
    """

    micro_batches: list[dict[str, Any]]
    counts: Tensor
    shared: Tensor | None = None


class StepNumbers:
    """The numbers of an optimizer step, the same on every rank, on their way to the host."""

    def __init__(self, names: Sequence[str], values: Tensor):
        self._names, self._values = names, values
        self._there: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def wait(self) -> dict[str, float]:
        """By name, see `train_step`; when the device has computed them."""
        if self._there is not None:
            self._there.synchronize()
        return dict(zip(self._names, self._values.tolist()))


def step_inputs(
    engine: Any,
    batches: Sequence[MicroBatch],
    device: torch.device,
    attack: Where | None = None,
    anchored: bool = True,
) -> StepInputs:
    """Makes a step's rows ready; no rank waits for another one.

    Args:
        engine: of an `ES2Objective`.
        batches: this rank's micro-batches, on the CPU.
        device: of the engine.
        attack: where a simulated one may act.
        anchored: with the refusals that the batches hold.
    """
    objective = engine.module
    wanted, model = objective.config.train.packing, causal_lm(objective.student).config
    packings = [packed_form(batch, model, wanted, attack) for batch in batches]
    own = [_counts(batch, packed) for batch, packed in zip(batches, packings)]
    inputs = [
        objective_inputs(batch, packed, anchored, attack)
        for batch, packed in zip(batches, packings)
    ]
    counts = torch.tensor(own, dtype=torch.float64).sum(0)
    return StepInputs(inputs, to_device(counts, device))


def _counts(batch: MicroBatch, packed: Packed | None) -> tuple[float, ...]:
    """COUNTS of a micro-batch."""
    return (
        float(batch.kl_weights.sum()),
        batch.num_tokens,
        batch.num_tokens if packed is None else packed.tokens,
        batch.input_ids.numel() if packed is None else packed.tokens,
        len(batch.input_ids),
        *refusal_counts(batch),
    )


def train_step(
    engine: Any,
    inputs: StepInputs,
    kl_weight: float,
    runtime: Runtime,
    attack: Intervention | None = None,
    observe: Callable[[dict[int, Tensor], int], None] | None = None,
    margin: float | None = None,
    asked_to_stop: Callable[[], bool] | None = None,
    skipped: Callable[[list[Tensor]], None] | None = None,
    meanwhile: Callable[[], StepInputs | None] | None = None,
) -> tuple[StepNumbers, StepInputs | None]:
    """One optimizer step over this rank's micro-batches.

    A step whose gradients are no finite numbers on some rank changes nothing: neither weights nor
    optimizer, schedule, bank or what `observe` gathers.

    Args:
        inputs: this rank's rows.
        attack: a simulated attack on the harmful states, where `inputs` were told.
        observe: gets the block outputs (layer -> (n + m, H)) and n of each clean micro-batch.
        margin: of this step, in place of the configured one.
        asked_to_stop: this rank; asked once, at the end of the step.
        skipped: called on every rank when the step was left out, with (n + m,) booleans per
            micro-batch: the row's tapped states are finite.
        meanwhile: called behind the first forward; it returns the rows of the next step, if there
            is one. What it raises ends the step without an update.

    Returns:
        the step's numbers, and what `meanwhile` returned, with the counts of all ranks. The numbers
        are sums over ranks and micro-batches, `kl_sum`, with an anchor the rest of SUMS, and
        COUNTS; means of the objective's other metrics; `grad_norm` before clipping; `stop`, above 0
        when any rank was asked to stop; `skipped`, 1 when the step was left out.
    """
    shared = runtime.sum(inputs.counts.clone()) if inputs.shared is None else inputs.shared
    counts = shared.float()
    following: StepInputs | None = None
    metrics: dict[str, Tensor] = {}
    bank = engine.module.bank
    if bank is not None:
        bank.mark()
    seen: list[dict[int, Tensor]] = []
    finite: list[Tensor] = []
    for number, own in enumerate(inputs.micro_batches):
        loss, found = _forward(
            engine, own, kl_weight, counts, len(inputs.micro_batches), runtime, attack, margin
        )
        if number == 0 and meanwhile is not None:
            following = meanwhile()
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
        for own, outputs in zip(inputs.micro_batches, seen):
            observe(outputs, own["num_harmful"])
    stop = asked_to_stop is not None and asked_to_stop()
    flags = torch.tensor([not applied, stop], dtype=torch.float32)
    norm = engine.get_global_grad_norm()
    norm = torch.as_tensor(0.0 if norm is None else norm).float()
    sums = {key: metrics[key] for key in SUMS if key in metrics}
    means = {key: v / len(inputs.micro_batches) for key, v in metrics.items() if key not in SUMS}
    means["grad_norm"] = to_device(norm, runtime.device)
    means |= dict(zip(("skipped", "stop"), to_device(flags, runtime.device)))
    shares = [value / runtime.world_size for value in means.values()]
    # in fp64, so that no other order of the sums, behind a checkpoint, gives other counts
    given = [torch.stack([*sums.values(), *shares]).double()]
    if following is not None:
        given.append(following.counts)
    values, *upcoming = runtime.sum(torch.cat(given)).split([len(one) for one in given])
    if following is not None:
        following = replace(following, shared=upcoming[0])
    numbers = StepNumbers([*sums, *means, *COUNTS], torch.cat([values, shared]))
    return numbers, following


def _forward(
    engine: Any,
    inputs: dict[str, Any],
    kl_weight: float,
    counts: Tensor,
    accumulation: int,
    runtime: Runtime,
    attack: Intervention | None = None,
    margin: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective on one micro-batch."""
    return engine(
        **sent(inputs, runtime.device),
        attack=attack,
        refusal_weights=counts[COUNTS.index("refusal_weights")],
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
        inputs = step_inputs(engine, batches, runtime.device, anchored=False)
        counts = runtime.sum(inputs.counts).float()
        for own in inputs.micro_batches:
            _, found = _forward(engine, own, 0.0, counts, len(batches), runtime)
            total[0] += found["kl_sum"]
        total[1] += counts[0] / runtime.world_size
    engine.train()
    kl_sum, tokens = runtime.sum(total).tolist()
    return kl_sum / tokens
