"""Expected seconds: a step, and the stages around the training. All of it is an estimate.

    step      max(executed flop / (attainable x peak), bytes sent / link) + optimizer
    decoding  per token the larger of reading the weights once and 2 flop per weight and row

Exchanges are assumed to hide behind the computation; the optimizer moves 28 bytes per parameter of
its share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from es2fast.planning.flops import Flops
from es2fast.planning.machines import Machine

OPTIMIZER_BYTES = 28  # weight, gradient and two moments read, weight and moments written


@dataclass(frozen=True)
class Step:
    """compute, exchange, optimizer: seconds of the parts; mfu: share of the peak, counting no
    recomputation."""

    compute: float
    exchange: float
    optimizer: float
    mfu: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.exchange) + self.optimizer


def step_time(
    work: Flops, sent: float, *, trained: int, stage: int, ranks: int, micro_batches: int,
    machine: Machine,
) -> Step:  # fmt: skip
    """One optimizer step.

    Args:
        work: of a micro-batch.
        sent: bytes of a rank.
        trained: parameters that train.
        stage: of ZeRO; from 1 on the ranks share the optimizer's work.
        ranks: of the run.
        micro_batches: of a step and rank.
        machine: one rank's.
    """
    compute = micro_batches * work.executed / (machine.attainable * machine.peak)
    exchange = sent / machine.between(ranks)
    own = trained / ranks if stage else trained
    optimizer = OPTIMIZER_BYTES * own / machine.bandwidth
    seconds = max(compute, exchange) + optimizer
    return Step(compute, exchange, optimizer, micro_batches * work.total / seconds / machine.peak)


def writing_seconds(
    rows: int, prompt: float, tokens: int, *, active: float, item: int, batch: int, ranks: int,
    gathered: float, machine: Machine,
) -> float:  # fmt: skip
    """Answers of the base model, written in whole.

    Args:
        rows: prompts to answer.
        prompt: mean tokens of a prompt.
        tokens: of an answer.
        active: parameters that a token meets.
        item: bytes of one.
        batch: rows at a time and rank.
        ranks: that share the rows.
        gathered: bytes that a token's pass gathers (ZeRO-3).
        machine: one rank's.
    """
    rounds = math.ceil(rows / (batch * ranks))
    rate = machine.attainable * machine.peak
    size = min(batch, math.ceil(rows / ranks))
    read = 2 * active * size * prompt / rate
    step = max(item * active / machine.bandwidth, 2 * active * size / rate)
    return rounds * (read + tokens * (step + gathered / machine.between(ranks)))
