"""What the micro-batches of a run look like: tokens of rows, padding, tokens that count."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any

from es2fast.config import Config
from es2fast.data.packing import pays
from es2fast.modeling.packing import takes_packed
from es2fast.modeling.skeleton import make_skeleton
from es2fast.planning.flops import Work
from es2fast.training.activations import Tokens
from es2fast.training.plan import Plan
from es2fast.training.refusals import wants_answers

STEPS = 32  # of which batches are looked at
LOOKED_AT = 64  # rows of a group, for what all begin with


@dataclass(frozen=True)
class Rows:
    """Tokens of every training row: harmful ones; of harmless ones prompts and responses. A
    response that is not written yet counts with its longest length. shared: tokens that all of
    them begin with."""

    harmful: list[int]
    prompts: list[int]
    responses: list[int]
    unwritten: int
    shared: int


def rows_of(plan: Plan) -> Rows:
    """The rows of a checked run."""
    config, formatter = plan.config, plan.formatter
    count, longest = len(plan.groups.harmful), config.data.max_length
    after = config.refusal.tokens if config.refusal.weight else 0
    if after and config.refusal.prefill.probability:
        after += config.refusal.prefill.tokens
    prompts, responses = [], []
    for prompt, length in zip(plan.groups.harmless, plan.lengths[count:], strict=True):
        if prompt.response is None:
            prompts.append(length)
            responses.append(max(min(config.data.max_response_tokens, longest - length), 0))
        else:
            ids, answer = formatter.conversation_ids(prompt, prompt.response)
            prompts.append(len(ids))
            responses.append(len(answer))
    unwritten = sum(prompt.response is None for prompt in plan.groups.harmless)
    return Rows(
        harmful=[length + after for length in plan.lengths[:count]],
        prompts=prompts,
        responses=responses,
        unwritten=unwritten + (count if wants_answers(config) else 0),
        shared=_shared(plan),
    )


def _shared(plan: Plan) -> int:
    """Of the first rows of each group, the tokens that all begin with, the last of a prompt not
    counted: what `data.packing` keeps once."""
    prompts = [*plan.groups.harmful[:LOOKED_AT], *plan.groups.harmless[:LOOKED_AT]]
    columns = zip(*(plan.formatter.prompt_ids(prompt)[:-1] for prompt in prompts))
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def largest(plan: Plan, rows: Rows) -> Tokens:
    """The micro-batch of rank 0 that keeps most, of the first steps.

    Args:
        plan: the run.
        rows: its rows.
    """
    model = make_skeleton(plan.config.model, plan.model).config  # knows its attention
    steps = range(min(STEPS, plan.config.train.steps))
    batches = [batch for step in steps for batch in plan.sampler(0).indices(step)]
    found = [
        _tokens(
            plan.config,
            model,
            [rows.harmful[i] for i in harmful],
            [rows.prompts[i] + rows.responses[i] for i in harmless],
            rows.shared,
        )
        for harmful, harmless in batches
    ]
    return max(found, key=lambda tokens: (tokens.lower, tokens.upper))


def _tokens(
    config: Config, model: Any, harmful: list[int], harmless: list[int], shared: int
) -> Tokens:
    """Of a micro-batch with rows of so many tokens, as `training.micro_batch` packs it."""
    width = max(*harmful, *harmless)
    packed = Tokens.packed(
        sum(n - shared for n in harmful), shared, sum(n - shared for n in harmless)
    )
    count, hidden = len(harmful) + len(harmless), model.get_text_config().hidden_size
    attacked = config.separation.robust.probability > 0  # such steps are padded
    if (
        config.train.packing
        and not attacked
        and takes_packed(model, width)
        and pays(count, width, packed.lower, hidden)
    ):
        return packed
    return Tokens.padded(len(harmful), len(harmless), width)


def mean_work(plan: Plan, rows: Rows, ranks: int) -> tuple[Work, float]:
    """The mean micro-batch of the first steps of rank 0, and its share of padding.

    Args:
        plan: the run.
        rows: its rows.
        ranks: of the run, whose embeddings are compared.
    """
    config = plan.config
    positions, micro = config.kl.positions, config.train.micro_batch_size
    widths, counted, real = [], [], []
    for step in range(min(STEPS, config.train.steps)):
        for harmful, harmless in plan.sampler(0).indices(step):
            whole = [rows.prompts[i] + rows.responses[i] for i in harmless]
            short = [rows.harmful[i] for i in harmful]
            widths.append(max([*whole, *short]))
            real.append(sum(whole) + sum(short))
            if positions == "all":
                counted.append(sum(whole))
            else:
                ends = [
                    max(rows.responses[i], 1) if positions == "response" else 1 for i in harmless
                ]
                counted.append(sum(ends))
    width = fmean(widths)
    refusals = config.refusal.tokens * micro if config.refusal.weight else 0
    work = Work(
        harmful=micro,
        harmless=micro,
        length=width,
        kl_tokens=fmean(counted),
        refusal_tokens=refusals,
        anchored=config.refusal.weight > 0,
        ranks=ranks,
        layers=2 if config.layers == "auto" else len(config.layers),
    )
    return work, 1 - fmean(real) / (2 * micro * width)
