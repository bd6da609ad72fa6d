"""What the micro-batches of a run look like: tokens of rows, padding, tokens that count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from es2fast.data.packing import common_prefix, pays
from es2fast.modeling.packing import attends_by_rows, takes_packed
from es2fast.modeling.skeleton import make_skeleton
from es2fast.modeling.teacher import resolve_teacher
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
    return common_prefix([plan.formatter.prompt_ids(prompt)[:-1] for prompt in prompts])


def largest(plan: Plan, rows: Rows) -> Tokens:
    """The micro-batch of rank 0 that keeps most, of the first steps.

    Args:
        plan: the run.
        rows: its rows.
    """
    found = [tokens for _, _, forms in _micro_batches(plan, rows) for _, tokens in forms]
    return max(found, key=lambda tokens: (tokens.lower, tokens.upper))


def _micro_batches(
    plan: Plan, rows: Rows
) -> Iterator[tuple[list[int], list[int], list[tuple[float, Tokens]]]]:
    """Harmful and harmless rows of rank 0's micro-batches of the first steps, and in which forms
    each is computed how often: padded or packed, and where an attack on every token is simulated
    packed with harmful rows that have no part in the prefix."""
    config = plan.config
    model: Any = make_skeleton(config.model, plan.model).config  # knows its attention
    hidden, robust = model.get_text_config().hidden_size, config.separation.robust
    everywhere = robust.probability * robust.attacks.count("ablation") / len(robust.attacks)
    by_rows = attends_by_rows(model)
    for step in range(min(STEPS, config.train.steps)):
        for harmful, harmless in plan.sampler(0).indices(step):
            short = [rows.harmful[i] for i in harmful]
            whole = [rows.prompts[i] + rows.responses[i] for i in harmless]
            count, width = len(short) + len(whole), max(*short, *whole)
            padded = Tokens.padded(len(short), len(whole), width)
            forms = []
            for share, apart in ((1 - everywhere, False), (everywhere, True)):
                packed = Tokens.packed(short, whole, rows.shared, by_rows, apart)
                taken = config.train.packing and takes_packed(model, width)
                cheaper = by_rows or pays(count, width, packed.lower, hidden)
                forms.append((share, packed if taken and cheaper else padded))
            yield harmful, harmless, [(share, tokens) for share, tokens in forms if share]


def works_of(plan: Plan, rows: Rows, ranks: int) -> tuple[list[tuple[float, Work]], float]:
    """The micro-batches of rank 0 of the first steps, with their shares, which add up to 1, and the
    share of padding among the tokens that are computed.

    Args:
        plan: the run.
        rows: its rows.
        ranks: of the run, whose embeddings are compared.
    """
    config, teacher = plan.config, resolve_teacher(plan.config.train)
    refusals = config.refusal.tokens if config.refusal.weight else 0
    found, padding, computed = [], 0.0, 0.0
    for harmful, harmless, forms in _micro_batches(plan, rows):
        counted = [_counted(config.kl.positions, rows, i) for i in harmless]
        real = sum(rows.harmful[i] for i in harmful)
        real += sum(rows.prompts[i] + rows.responses[i] for i in harmless)
        for share, tokens in forms:
            once = tokens.is_packed and config.kl.positions == "all"
            work = Work(
                tokens=tokens,
                harmful=len(harmful),
                harmless=len(harmless),
                kl_tokens=sum(counted) - (rows.shared * (len(harmless) - 1) if once else 0),
                refusal_tokens=refusals * len(harmful),
                anchored=config.refusal.weight > 0,
                teacher=teacher,
                ranks=ranks,
                layers=2 if config.layers == "auto" else len(config.layers),
            )
            found.append((share, work))
            padding += 0.0 if tokens.is_packed else share * (tokens.lower - real)
            computed += share * tokens.lower
    count = sum(share for share, _ in found)
    return [(share / count, work) for share, work in found], padding / computed


def _counted(positions: str, rows: Rows, row: int) -> int:
    """Tokens of a harmless row that the KL sees."""
    if positions == "all":
        return rows.prompts[row] + rows.responses[row]
    return max(rows.responses[row], 1) if positions == "response" else 1
