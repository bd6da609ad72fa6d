"""`deepspeed: auto`: the ZeRO stage that suits a run of those whose estimated memory fits, and why.

    0   one rank, or fp32 on a CPU: nothing is partitioned, flattened or gathered
    1   several micro-batches a step: gradients are exchanged once per step
    2   otherwise
    3   only where 2 does not fit: it gathers every weight for each pass and for each token that
        the base model writes

With bf16 weights on several ranks stage 0 is left out: ZeRO's fp32 copies are shared there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from es2fast.config import Config
from es2fast.distributed.deepspeed_config import build_deepspeed
from es2fast.distributed.memory import memory_per_rank
from es2fast.modeling.load import DTYPES
from es2fast.training.activations import Tokens
from es2fast.training.head_exchange import choose_head
from es2fast.training.memory import GB, PROCESS, Estimate, estimate, model_sizes

STAGES = (0, 1, 2, 3)
FILLED = 0.8  # share of the memory that an estimate may fill


@dataclass(frozen=True)
class Choice:
    """deepspeed: the complete mapping; line: the stage in it and the reason."""

    deepspeed: dict[str, Any]
    line: str


def choose_stage(
    config: Config, model: Any, *, world_size: int, device: str, dtype: str, longest: int
) -> Choice:
    """The stage for a run with `deepspeed: auto`, the same on every rank.

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
    shape = model_sizes(config, model)
    rows = config.train.micro_batch_size
    tokens = Tokens.padded(rows, rows, longest)  # no micro-batch is larger, packed or not
    mappings, estimates = {}, {}
    for stage in STAGES:
        mappings[stage] = build_deepspeed(
            config, world_size=world_size, dtype=dtype, model_config=model, preset=f"zero{stage}"
        )
        zero = mappings[stage]["zero_optimization"]
        head = choose_head(
            config, model, zero, world_size=world_size, device=device, dtype=dtype, longest=longest
        )
        estimates[stage] = estimate(
            config, shape, zero, world_size=world_size, device=device, dtype=dtype, tokens=tokens,
            sharded=head.sharded,
        )  # fmt: skip
    memory = memory_per_rank(device, world_size)
    light, why = lightest(
        ranks=world_size, device=device, dtype=dtype,
        accumulation=config.train.gradient_accumulation,
    )  # fmt: skip
    stage, reason = pick(estimates, memory, world_size, light, why)
    return Choice(mappings[stage], f"deepspeed: auto picks ZeRO stage {stage}: {reason}")


def base_fits(config: Config, model: Any, *, world_size: int, device: str, dtype: str) -> bool:
    """Each rank has room for the whole base model, with a quarter of it for its passes. In a
    process group the call is collective.

    Args: as `choose_stage`.
    """
    memory = memory_per_rank(device, world_size)
    needed = PROCESS[device] + 1.25 * DTYPES[dtype].itemsize * model_sizes(config, model).total
    return memory is not None and needed <= FILLED * memory


def lightest(*, ranks: int, device: str, dtype: str, accumulation: int) -> tuple[int, str]:
    """The stage that costs least time where it fits, and why it does; 2 needs no reason."""
    if ranks == 1:
        return 0, "a single rank has nobody to share with"
    if dtype == "fp32" and device == "cpu":
        return 0, "nothing has to be partitioned"
    if ranks > 1 and accumulation > 1:
        return 1, "gradients are exchanged once per step, not per micro-batch"
    return 2, ""


def pick(
    estimates: dict[int, Estimate], memory: int | None, ranks: int, light: int = 2, why: str = ""
) -> tuple[int, str]:
    """The stage and why.

    Args:
        estimates: what each stage needs.
        memory: bytes that a rank has; None: not known.
        ranks: a single one has nobody to share its weights with, so it does not take stage 3.
        light: the stage to take where it fits.
        why: what speaks for it.
    """
    two, three = estimates[2], estimates[3]
    least = three if ranks > 1 and three.total < two.total else two
    if ranks == 1 and estimates[light].total < least.total:
        least = estimates[light]
    if memory is None:
        reason = f"how much memory is free is not known here; {_needs(least)}"
        return least.stage, f"{reason} ({least.parts()})"
    limit = FILLED * memory
    fitting = (estimates[stage] for stage in (light, 2) if estimates[stage].total <= limit)
    chosen = next(fitting, least)
    reason = f"{_needs(chosen)} of {memory / GB:.3g} GB ({chosen.parts()})"
    if chosen is three:
        reason = f"stage 2 would need {_needs(two)}, stage 3 {reason}"
    elif chosen.stage == light and why and chosen.total <= limit:
        reason = f"it fits and {why}; {reason}"
    if chosen.total > limit:
        reason += (
            f"; that is above {FILLED:.0%} and may fail: train.trainable=lora, a smaller "
            "train.micro_batch_size or, on a GPU, deepspeed=zero3_offload need less"
        )
    return chosen.stage, reason


def _needs(found: Estimate) -> str:
    return f"{found.total / GB:.3g} GB per rank"
