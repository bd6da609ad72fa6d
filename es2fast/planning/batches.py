"""What the micro-batches of a run look like: tokens of rows, padding, tokens that count."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from es2fast.planning.flops import Work
from es2fast.training.plan import Plan
from es2fast.training.refusals import wants_answers

STEPS = 32  # of which batches are looked at


@dataclass(frozen=True)
class Rows:
    """Tokens of every training row: harmful ones; of harmless ones prompts and responses. A
    response that is not written yet counts with its longest length."""

    harmful: list[int]
    prompts: list[int]
    responses: list[int]
    unwritten: int

    @property
    def longest(self) -> int:
        return max([*self.harmful, *(p + r for p, r in zip(self.prompts, self.responses))])


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
    )


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
