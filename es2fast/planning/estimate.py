"""A run's estimates for one machine and a number of ranks, as plain data with stable keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from es2fast.config import Config
from es2fast.distributed.deepspeed_config import AUTO, build_deepspeed
from es2fast.modeling.batch_size import rows_within
from es2fast.modeling.load import DTYPES
from es2fast.modeling.teacher import resolve_teacher
from es2fast.planning.batches import Rows, largest, rows_of, works_of
from es2fast.planning.communication import step_bytes
from es2fast.planning.fit import smallest_change
from es2fast.planning.flops import Flops, Work, filter_flop, mean_flops
from es2fast.planning.machines import Machine
from es2fast.planning.timing import step_time, writing_seconds
from es2fast.training.activations import Tokens
from es2fast.training.head_exchange import HeadExchange, choose_head, sharded_bytes
from es2fast.training.memory import Estimate, estimate, model_sizes
from es2fast.training.plan import Plan
from es2fast.training.shape import Shape
from es2fast.training.stage import FILLED, STAGES, lightest, pick
from es2fast.training.update_filter import ROWS as FILTER_ROWS

CPU_ROWS = 32  # answered at a time


class Estimator:
    """Everything that is estimated about a checked run on one kind of machine.

    Args:
        plan: the run.
        machine: one rank's.
        dtype: "bf16" or "fp32".
        pairs: `train.global_batch_size`, which the plan's own configuration leaves open.
    """

    def __init__(self, plan: Plan, machine: Machine, dtype: str, pairs: int | None):
        self._plan, self._machine, self._dtype = plan, machine, dtype
        self._pairs = pairs
        self._item = DTYPES[dtype].itemsize
        self._rows: Rows = rows_of(plan)
        self._shape: Callable[[str], Shape] = functools.cache(self._made)
        self._largest: Callable[[int], Tokens] = functools.cache(self._micro_batch)

    def _made(self, trainable: str) -> Shape:
        train = self._plan.config.train.model_copy(update={"trainable": trainable})
        config = self._plan.config.model_copy(update={"train": train})
        return model_sizes(config, self._plan.model)

    def _micro_batch(self, rows: int) -> Tokens:
        """The largest one with so many rows of each group."""
        train = self._plan.config.train.model_copy(update={"micro_batch_size": rows})
        config = self._plan.config.model_copy(update={"train": train})
        return largest(dataclasses.replace(self._plan, config=config), self._rows)

    def needs(self, config: Config, ranks: int) -> tuple[Estimate, dict[int, Estimate], str]:
        """What the run takes; what each ZeRO stage that is open to it takes; the choice's reason.

        Args:
            config: the run, possibly changed.
            ranks: of it.
        """
        auto = config.deepspeed == AUTO
        found: dict[int, Estimate] = {}
        for preset in [f"zero{stage}" for stage in STAGES] if auto else [None]:
            mapping = build_deepspeed(
                config, world_size=ranks, dtype=self._dtype, model_config=self._plan.model,
                preset=preset,
            )  # fmt: skip
            own = estimate(
                config, self._shape(config.train.trainable), mapping.get("zero_optimization", {}),
                world_size=ranks, device=self._machine.device, dtype=self._dtype,
                tokens=self._largest(config.train.micro_batch_size),
                sharded=config.train.zero3_head != "gathered"
                and self._head(config, ranks, mapping).sharded,
            )  # fmt: skip
            found[own.stage] = own
        if not auto:
            (own,) = found.values()
            return own, found, "named in deepspeed"
        memory = self._machine.memory_of_rank(ranks)
        light, why = lightest(
            ranks=ranks, device=self._machine.device, dtype=self._dtype,
            accumulation=config.train.gradient_accumulation,
        )  # fmt: skip
        stage, reason = pick(found, memory, ranks, light, why)
        return found[stage], found, reason

    def fits(self, config: Config, ranks: int) -> bool:
        memory = self._machine.memory_of_rank(ranks)
        return memory is None or self.needs(config, ranks)[0].total <= FILLED * memory

    def model(self) -> dict[str, Any]:
        """Parameters, and what trains."""
        shape = self._shape(self._plan.config.train.trainable)
        return {
            "parameters": shape.total,
            "trained": shape.trained,
            "trained_share": shape.trained / shape.total,
            "active_per_token": shape.active,
            "blocks": len(shape.blocks),
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "mixture_of_experts": shape.experts,
        }

    def on(self, ranks: int) -> dict[str, Any]:
        """The estimates for that many ranks."""
        config, machine = self._plan.config, self._machine
        shape = self._shape(config.train.trainable)
        own, stages, reason = self.needs(config, ranks)
        works, padding = works_of(self._plan, self._rows, ranks)
        recomputed = config.train.gradient_checkpointing
        counted = mean_flops(shape, works, checkpointed=recomputed)
        micro = config.train.gradient_accumulation
        head = self._head(config, ranks)
        sent = {
            stage: step_bytes(
                stage, total=shape.total, trained=shape.trained, item=self._item, ranks=ranks,
                micro_batches=micro,
                head=0 if shape.head_trained else shape.vocabulary * shape.hidden,
                tied=shape.tied,
                tokens=self._token_bytes(shape, works, ranks) if head.sharded else None,
            )
            for stage in STAGES
        }  # fmt: skip
        step = step_time(
            counted, sent[own.stage], trained=shape.trained, stage=own.stage, ranks=ranks,
            micro_batches=micro, machine=machine,
        )  # fmt: skip
        batch = config.train.micro_batch_size * micro * ranks
        kept = [
            self.needs(_checkpointed(config, value), ranks)[0].activations
            for value in (False, True)
        ]
        return {
            "ranks": ranks,
            "zero_stage": own.stage,
            "zero_reason": reason,
            "memory_bytes": own.bytes() | {"total": own.total},
            "activation_bytes": {"plain": kept[0], "checkpointed": kept[1]},
            "memory_bytes_by_stage": {str(stage): e.total for stage, e in stages.items()},
            "memory_available_bytes": machine.memory_of_rank(ranks),
            "fits": self.fits(config, ranks),
            "smallest_change": smallest_change(config, ranks, own.stage, self.fits),
            "pairs_per_step": batch,
            "global_batch_size_met": self._pairs in (None, batch),
            "padding_share": padding,
            "flop_per_step": _scaled(counted, micro),
            "zero3_head": "sharded" if head.sharded else "gathered",
            "bytes_sent_per_step": {str(stage): size for stage, size in sent.items()},
            "step_seconds": step.seconds,
            "step_parts_seconds": {
                "compute": step.compute, "exchange": step.exchange, "optimizer": step.optimizer,
            },
            "mfu": step.mfu,
            "stages": self._stages(shape, counted, own.stage, step.seconds, ranks),
        }  # fmt: skip

    def _token_bytes(self, shape: Shape, works: list[tuple[float, Work]], ranks: int) -> float:
        """What a micro-batch sends for the losses of a sharded head."""
        return sum(
            share
            * sharded_bytes(shape.hidden, self._item, ranks, work.kl_tokens, work.refusal_tokens)
            for share, work in works
        )

    def _head(
        self, config: Config, ranks: int, mapping: dict[str, Any] | None = None
    ) -> HeadExchange:
        """What a DeepSpeed configuration does with the LM head; None: ZeRO-3."""
        if mapping is None:
            mapping = build_deepspeed(
                config, world_size=ranks, dtype=self._dtype, model_config=self._plan.model,
                preset="zero3" if config.deepspeed == AUTO else None,
            )  # fmt: skip
        return choose_head(
            config, self._plan.model, mapping.get("zero_optimization", {}), world_size=ranks,
            device=self._machine.device, dtype=self._dtype, longest=self._plan.longest,
        )  # fmt: skip

    def _stages(
        self, shape: Shape, counted: Flops, stage: int, step: float, ranks: int
    ) -> dict[str, dict[str, float]]:
        """Tokens and hours of the stages; the cache is a pass of the teacher over all harmless
        rows, which a training without one does at every step."""
        config, rows, machine = self._plan.config, self._rows, self._machine
        item, harmless = self._item, len(rows.prompts)
        train = config.train
        steps, micro = train.steps, train.gradient_accumulation
        gathered = item * shape.total if stage == 3 and ranks > 1 else 0
        prompt = sum(rows.prompts) / harmless
        answer = config.data.max_response_tokens
        free = None
        if machine.memory is not None and machine.device == "cuda":
            free = max(int(machine.memory) - item * shape.total, 0)
        text = self._plan.model.get_text_config()

        def batch(given: int | str, tokens: int) -> int:
            if isinstance(given, int):
                return given
            return CPU_ROWS if free is None else rows_within(free, text, int(prompt) + tokens, item)

        written = writing_seconds(
            rows.unwritten, prompt, answer, active=shape.active, item=item,
            batch=batch(config.data.response_batch_size, answer), ranks=ranks, gathered=gathered,
            machine=machine,
        )  # fmt: skip
        tokens = sum(rows.prompts) + sum(rows.responses)
        once = 2 * shape.active * tokens / (machine.attainable * machine.peak * ranks)
        limit, longest = config.evaluate.limit, config.evaluate.max_new_tokens
        answers = 2 * limit * (len(config.evaluate.attacks) + 1)
        judged = writing_seconds(
            answers, prompt, longest, active=shape.active, item=item,
            batch=batch(config.evaluate.batch_size, longest), ranks=ranks, gathered=0,
            machine=machine,
        )  # fmt: skip
        rate = 2 * (sum(rows.harmful) / len(rows.harmful) + tokens / harmless) / 2
        seen = steps * micro * ranks * train.micro_batch_size * rate
        found = {
            "responses": {"tokens": rows.unwritten * answer, "hours": written / 3600},
            "teacher_cache": {"tokens": tokens, "hours": once / 3600},
            "train": {"tokens": seen, "hours": steps * step / 3600},
        }
        if train.update_filter:
            filtered = min(FILTER_ROWS, len(rows.harmful)) * sum(rows.harmful) / len(rows.harmful)
            filtered += min(FILTER_ROWS, harmless) * tokens / harmless
            seconds = filter_flop(shape, filtered) / (machine.attainable * machine.peak * ranks)
            found["update_filter"] = {"tokens": filtered, "hours": seconds / 3600}
        return found | {"evaluate": {"tokens": answers * longest, "hours": judged / 3600}}


def _checkpointed(config: Config, value: bool) -> Config:
    train = config.train.model_copy(update={"gradient_checkpointing": value})
    return config.model_copy(update={"train": train})


def _scaled(counted: Flops, micro_batches: int) -> dict[str, float]:
    parts = {name: value * micro_batches for name, value in dataclasses.asdict(counted).items()}
    return parts | {"total": counted.total * micro_batches}


def describe(
    plan: Plan, machine: Machine, dtype: str, counts: list[int], pairs: int | None = None
) -> dict[str, Any]:
    """The whole of `es2fast plan`, JSON-able: every number of it is an estimate.

    Args:
        plan: the run.
        machine: one rank's.
        dtype: "bf16" or "fp32".
        counts: of ranks.
        pairs: `train.global_batch_size`.
    """
    found = Estimator(plan, machine, dtype, pairs)
    return {
        "kind": "estimate",
        "machine": {
            "name": machine.name,
            "peak_flop_per_second": machine.peak,
            "peak_source": machine.source,
            "memory_bytes": machine.memory,
            "memory_bandwidth": machine.bandwidth,
            "assumed_attainable": machine.attainable,
            "assumed_link": machine.link,
            "assumed_network": machine.network,
        },
        "dtype": dtype,
        "teacher": resolve_teacher(plan.config.train),
        "trainable": plan.config.train.trainable,
        "model": found.model(),
        "ranks": [found.on(count) for count in counts],
    }
