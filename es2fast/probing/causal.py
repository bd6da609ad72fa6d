"""Whether the model itself uses a block: what a push there takes from its refusal.

A probe finds what is linearly there, which the blocks above may never read. So the harmful prompts'
states after block l are moved by the groups' own gap, mean harmless - mean harmful, at the last
prompt token, and the next token is looked at:

    effect_l = log-odds(refusal start) - log-odds(refusal start | pushed at block l),  nats

where a refusal starts with the first token of one of the base model's own refusals or, where these
are not known, of a refusal phrase in the first person. One forward pass per block over a few dozen
prompts; the prompts' batches are shared among the ranks, each of which makes the same number of
passes, as ZeRO-3 needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.judges.rules import refusal_phrases
from es2fast.modeling.taps import blocks, causal_lm, hidden_of, hooks, position_ids, with_hidden
from es2fast.progress import tqdm

BATCH = 8  # prompts per pass: logits of a large vocabulary may come for every position
FIRST_PERSON = ("i", "sorry", "my", "as")  # first words of phrases that an answer starts with


def refusal_starts(
    formatter: Formatter, prompt: Prompt, refusals: Sequence[str] | None = None
) -> list[int]:
    """Ids with which a refusal starts, ascending; empty where the tokenizer knows none of them.

    Args:
        formatter: the model's chat format.
        prompt: any; the first token of an answer may depend on what the template ends with.
        refusals: the model's own; default: the rules' phrases, with a capital.
    """
    if refusals is None:
        refusals = [
            phrase[0].upper() + phrase[1:]
            for phrase in refusal_phrases()
            if phrase.split()[0] in FIRST_PERSON
        ]
    found = [formatter.opening_ids(prompt, text, 1) for text in refusals if text.strip()]
    ids = {start[0] for start in found if start}  # a prompt of data.max_length leaves no room
    return sorted(ids - {formatter.tokenizer.unk_token_id})


def next_token_logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """(B, V) logits after the last position; only these are made where the family can do so."""
    inner = causal_lm(model)
    known = inspect.signature(inner.forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return inner(**inputs, use_cache=False, **keep).logits[:, -1]


@torch.no_grad()
def refusal_effects(
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    gaps: Mapping[int, Tensor],
    starts: Sequence[int],
    runtime: Runtime,
    *,
    forward: Callable[..., Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """What a push by the gap at each block takes from the refusal of each prompt.

    Call on every rank.

    Args:
        model: a causal language model in eval mode, on its device.
        formatter: its chat format.
        prompts: k harmful prompts, the same on every rank.
        gaps: block -> (H,) mean harmless - mean harmful state.
        starts: ids with which a refusal starts.
        runtime: the ranks that share the work.
        forward: what to call for (B, V) logits after the last position; default: the model.
        progress: show a bar on rank 0, one step per block and batch.

    Returns:
        (blocks, k) fp64 nats on the CPU, on every rank; positive where the push lowers the refusal.
    """
    run = forward or (lambda **inputs: next_token_logits(model, **inputs))
    rows = [formatter.prompt_ids(prompt) for prompt in prompts]
    starting = range(0, len(rows), BATCH)
    rounds = -(-len(starting) // runtime.world_size)
    own = [(i * runtime.world_size + runtime.rank) % len(starting) for i in range(rounds)]
    silent = not (progress and runtime.is_main)
    found: dict[int, Tensor] = {}
    with tqdm(total=rounds * len(gaps), desc="effect", unit="pass", disable=silent) as bar:
        for number in own:
            batch = formatter.pad(rows[starting[number] : starting[number] + BATCH])
            ids, mask = (batch[key].to(runtime.device) for key in ("input_ids", "attention_mask"))
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
            before = log_odds(run(**inputs), starts)
            effects = []
            for layer in sorted(gaps):
                with _pushed(model, layer, gaps[layer]):
                    effects.append(before - log_odds(run(**inputs), starts))
                bar.update()
            found[number] = torch.stack(effects).cpu()
    parts = {
        number: part for held in runtime.gather_objects(found) for number, part in held.items()
    }
    return torch.cat([parts[number] for number in range(len(starting))], dim=1)


def log_odds(logits: Tensor, starts: Sequence[int]) -> Tensor:
    """log P(one of `starts`) - log P(any other): (B, V) -> (B,) fp64."""
    inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    inside[list(starts)] = True
    exact = logits.double()
    return exact[:, inside].logsumexp(-1) - exact[:, ~inside].logsumexp(-1)


@contextmanager
def _pushed(model: nn.Module, layer: int, push: Tensor) -> Iterator[None]:
    """While it lasts, block `layer` adds push (H,) to its output at the last position."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output).clone()
        hidden[:, -1] += push.to(hidden)
        return with_hidden(output, hidden)

    with hooks([blocks(model)[layer].register_forward_hook(hook)]):
        yield
