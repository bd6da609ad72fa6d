"""`deepspeed: auto`: the lowest ZeRO stage whose estimated memory fits, and why it is that one.

Stage 3 gathers every weight for each pass and for each token that the base model writes, so it is
taken only where stage 2 does not fit. Stages 0 and 1 are never taken: stage 0 tells no gradient
norm, which the safeguards watch, and stage 1 saves nothing that stage 2 does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from es2fast.config import Config
from es2fast.distributed.deepspeed_config import build_deepspeed
from es2fast.distributed.memory import memory_per_rank
from es2fast.modeling.load import DTYPES
from es2fast.training.memory import GB, PROCESS, Estimate, estimate, model_sizes

FILLED = 0.8  # share of the memory that an estimate may fill


@dataclass(frozen=True)
class Choice:
    """deepspeed: the complete mapping; line: the stage in it and the reason."""

    deepspeed: dict[str, Any]
    line: str


def choose_stage(
    config: Config, model: Any, *, world_size: int, device: str, dtype: str, longest: int
) -> Choice:
    """Stage 2 or 3 for a run with `deepspeed: auto`, the same on every rank.

    Args:
        config: the run.
        model: its transformers config.
        world_size: ranks. In a process group the call is collective.
        device: "cpu" or "cuda".
        dtype: "bf16" or "fp32".
        longest: tokens of the longest row.

    Raises:
        UserError: see `memory.model_sizes`.
    """
    sizes = model_sizes(config, model)
    mappings, estimates = {}, {}
    for stage in (2, 3):
        mappings[stage] = build_deepspeed(
            config, world_size=world_size, dtype=dtype, model_config=model, preset=f"zero{stage}"
        )
        estimates[stage] = estimate(
            config, sizes, mappings[stage]["zero_optimization"],
            world_size=world_size, device=device, dtype=dtype, longest=longest,
        )  # fmt: skip
    memory = memory_per_rank(device, world_size)
    stage, reason = pick(estimates[2], estimates[3], memory, world_size)
    return Choice(mappings[stage], f"deepspeed: auto picks ZeRO stage {stage}: {reason}")


def base_fits(config: Config, model: Any, *, world_size: int, device: str, dtype: str) -> bool:
    """Each rank has room for the whole base model, with a quarter of it for its passes. In a
    process group the call is collective.

    Args: as `choose_stage`.
    """
    memory = memory_per_rank(device, world_size)
    needed = PROCESS[device] + 1.25 * DTYPES[dtype].itemsize * model_sizes(config, model).total
    return memory is not None and needed <= FILLED * memory


def pick(two: Estimate, three: Estimate, memory: int | None, ranks: int) -> tuple[int, str]:
    """The stage and why.

    Args:
        two: what stage 2 needs.
        three: what stage 3 needs.
        memory: bytes that a rank has; None: not known.
        ranks: a single one has nobody to share its weights with, so it stays at stage 2.
    """
    least = three if ranks > 1 and three.total < two.total else two
    if memory is None:
        reason = f"how much memory is free is not known here; {_needs(least)}"
        return least.stage, f"{reason} ({least.parts()})"
    limit = FILLED * memory
    fits = two.total <= limit
    chosen = two if fits else least
    reason = f"{_needs(chosen)} of {memory / GB:.3g} GB ({chosen.parts()})"
    if chosen is three:
        reason = f"stage 2 would need {_needs(two)}, stage 3 {reason}"
    if chosen.total > limit:
        reason += (
            f"; that is above {FILLED:.0%} and may fail: train.trainable=lora, a smaller "
            "train.micro_batch_size or, on a GPU, deepspeed=zero3_offload need less"
        )
    return chosen.stage, reason


def _needs(found: Estimate) -> str:
    return f"{found.total / GB:.3g} GB per rank"
