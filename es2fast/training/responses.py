"""The base model's greedy answers: to the harmless prompts that come without a response, and, for
a refusal anchor of its own words, to the harmful ones.

It answers each prompt once; answers are cached on disk by model, template, lengths and prompt.
Ranks share the batches, prompts of like length together and the longest first, so that those that
need most memory come at once and the ranks of a round end alike. Where each rank holds the whole
model they generate on their own, in smaller batches where a GPU's memory does not suffice; where
ZeRO-3 has partitioned it, in lockstep (`synced_gpus`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from es2fast.config import Config
from es2fast.data import Formatter, Prompt, ResponseCache, model_fingerprint
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import partitioned
from es2fast.errors import UserError
from es2fast.judges.rules import is_refusal
from es2fast.modeling.batch_size import halving, starting_rows
from es2fast.modeling.generate import generate
from es2fast.progress import tqdm
from es2fast.training.plan import Plan

FIELD = "data.response_batch_size"


def fill_responses(plan: Plan, model: nn.Module, runtime: Runtime) -> list[Prompt]:
    """The harmless prompts in order, each with a response: its own, a cached one, or one written
    now by `model`, the base model in eval mode; call on every rank."""
    prompts = plan.groups.harmless
    bare = [prompt for prompt in prompts if prompt.response is None]
    tokens = plan.config.data.max_response_tokens
    answers = iter(base_answers(plan, model, runtime, bare, tokens, "harmless responses"))
    return [
        prompt
        if prompt.response is not None
        else dataclasses.replace(prompt, response=next(answers))
        for prompt in prompts
    ]


def trained_rows(config: Config, harmless: Sequence[Prompt]) -> list[int]:
    """The harmless prompts that training sees, each with its response, by `data.refused`.

    Raises:
        UserError: every response is a refusal.
    """
    if config.data.refused != "drop":
        return list(range(len(harmless)))
    rows = [i for i, prompt in enumerate(harmless) if not is_refusal(prompt.response or "")]
    if not rows:
        raise UserError(
            f"data.refused: drop leaves none of the {len(harmless)} harmless prompts, since every "
            "response is a refusal; give other prompts in data.harmless or use data.refused=keep"
        )
    return rows


def first_weights(config: Config, harmless: Sequence[Prompt]) -> list[float]:
    """Per harmless prompt, each with its response, the weight of its first tokens in the KL."""
    even = config.data.refused == "even"
    return [
        config.kl.refused_weight
        if even and is_refusal(prompt.response or "")
        else config.kl.first_weight
        for prompt in harmless
    ]


def base_answers(
    plan: Plan,
    model: nn.Module,
    runtime: Runtime,
    prompts: Sequence[Prompt],
    tokens: int,
    title: str,
) -> list[str]:
    """What the base model answers to each prompt, from the cache or written now.

    Args:
        plan: the run.
        model: the base model in eval mode; call on every rank.
        runtime: the ranks that share the work.
        prompts: answered in this order; responses that they bring are not looked at.
        tokens: length at which an answer is cut.
        title: of the progress bar.
    """
    if not prompts:
        return []
    formatter = plan.formatter
    prompts = without_responses(prompts)
    cache = response_cache(plan, tokens)
    missing = runtime.from_main(cache.missing(prompts))  # rank 0's view decides for all
    lengths = {prompt.turns: len(formatter.prompt_ids(prompt)) for prompt in missing}
    missing = sorted(missing, key=lambda prompt: -lengths[prompt.turns])
    world, synced = runtime.world_size, partitioned(model) and runtime.world_size > 1
    given = plan.config.data.response_batch_size
    longest = max(lengths.values(), default=0) + tokens
    if given == "auto":  # what every rank has memory for, and a share for each
        share = -(-len(missing) // world)
        size = max(1, min(share, *runtime.gather_objects(starting_rows(model, longest))))
    else:
        size = given
    chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
    write = partial(_write, model, formatter, tokens, runtime.device, synced)
    written: dict[str, str] = {}
    rows = size
    rounds = range(0, len(chunks), world)
    for first in tqdm(rounds, title, disable=not (runtime.is_main and chunks)):
        chunk = chunks[(first + runtime.rank) % len(chunks)]
        answers, rows = halving(
            partial(write, chunk),
            rows,
            automatic=given == "auto" and not synced,
            field=FIELD,
            fewer="a smaller number" if given == "auto" else f"{FIELD}=auto or a smaller number",
            at_one_row="a shorter data.max_response_tokens",
        )
        for pairs in runtime.gather_objects(list(zip(chunk, answers))):
            for prompt, answer in pairs:
                written[cache.key(prompt)] = answer
                if runtime.is_main and cache.get(prompt) is None:
                    cache.put(prompt, answer)
    known = runtime.from_main({cache.key(p): cache.get(p) for p in prompts})
    answers_by_key = {**known, **written}
    return [answers_by_key[cache.key(prompt)] for prompt in prompts]


def without_responses(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts, to be answered."""
    return [dataclasses.replace(prompt, response=None) for prompt in prompts]


def response_cache(plan: Plan, tokens: int) -> ResponseCache:
    """Where the base model's answers of a run are, those that are cut at so many tokens."""
    config = plan.config
    return ResponseCache(
        config.data.model_copy(update={"max_response_tokens": tokens}),
        fingerprint=model_fingerprint(config.model.name, config.model.revision),
        template_hash=plan.formatter.template_hash,
    )


def _write(
    model: nn.Module,
    formatter: Formatter,
    tokens: int,
    device: torch.device,
    synced: bool,
    chunk: Sequence[Prompt],
    rows: int,
) -> list[str]:
    """Answers to a batch's prompts, so many at a time."""
    parts = [chunk[start : start + rows] for start in range(0, len(chunk), rows)]
    return [
        answer
        for part in parts
        for answer in generate(
            model, formatter, part, max_new_tokens=tokens, device=device, synced=synced
        )
    ]
