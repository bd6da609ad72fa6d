"""States at the last prompt token: of a few batches, or of whole data sets in bounded memory.

The states are fp32, 4 n H bytes per block for n prompts; 10 000 + 10 000 prompts of an 8B model
(H 4096, 32 blocks) would take 10.5 GB. So `states_by_block` takes as many blocks at a time as fit
into `STATE_BYTES`, one pass over the prompts each. Prompts are batched by length, so hardly
anything is spent on padding.

Ranks share the batches, and rank 0 alone gets the result: what follows from the states is decided
there and broadcast. They travel as plain tensors, one block at a time; pickled, a list of views
would take the whole storage along with each of them. Every rank makes the same number of forward
passes, as ZeRO-3 needs: where batches run out a rank repeats one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, blocks, causal_lm, position_ids, tapped
from es2fast.progress import tqdm

STATE_BYTES = 2 << 30  # of fp32 states held at a time
BATCH = 32  # prompts per forward pass
PADDING_ERROR = 0.1  # of a state's norm: rounding in bf16, and experts that it chooses, stay below

Select = Callable[[Tensor], Tensor]  # of left-padded hidden states: (B, T, H) -> (B, K)


def last_position(hidden: Tensor) -> Tensor:
    """(B, T, H) -> (B, H): the last prompt token of left-padded rows."""
    return hidden[:, -1]


@torch.no_grad()
def last_token_states(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    layers: Sequence[int],
    forward: Callable[..., Any] | None = None,
    device: torch.device | None = None,
    space: str = "residual",
    select: Select = last_position,
) -> dict[int, Tensor]:
    """States at the last prompt token of some batches, on this rank.

    Args:
        model: a causal language model.
        batches: left-padded `input_ids`, `attention_mask` (B, T); the last column is the last
            prompt token of every row.
        layers: block numbers.
        forward: what to call for a pass; default: the model's backbone (no logits are made).
        device: where the inputs go; default: where the model's first parameter is.
        space: "residual" or "normed", see `taps.tap_points`.
        select: what is kept of a batch, if it is something else.

    Returns:
        layer -> (sum of B, H) fp32 tensor on the CPU, K for H with another `select`.
    """
    run = forward or backbone(model)
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    device = device or next(model.parameters()).device
    with ExitStack() as stack:
        states = stack.enter_context(tapped(model, layers, select, space))
        for batch in batches:
            mask = batch["attention_mask"].to(device)
            run(
                input_ids=batch["input_ids"].to(device),
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
            )
            for layer in layers:
                # a copy: a view would keep the block's whole (B, T, H) output alive
                kept[layer].append(states[layer].to("cpu", torch.float32, copy=True))
    return {layer: torch.cat(kept.pop(layer)) for layer in list(kept)}  # parts freed as it goes


def check_padding(
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    forward: Callable[..., Any] | None = None,
    device: torch.device | None = None,
) -> None:
    """That a prompt has the same states beside a longer row, where it is padded, as alone.

    Recurrent models that take an attention mask and ignore it (RWKV, xLSTM) would be trained and
    attacked on states of their padding.

    Args:
        model: a causal language model in eval mode; call on every rank.
        formatter: its chat format.
        prompts: at least one, of which the shortest is taken.
        forward, device: see `last_token_states`.

    Raises:
        UserError: they differ by more than `PADDING_ERROR` of their norm.
    """
    ids = min((formatter.prompt_ids(prompt) for prompt in prompts), key=len)
    batches = [formatter.pad([ids]), formatter.pad([ids, [*ids, *ids]])]
    last = len(blocks(model)) - 1
    alone, padded, _ = last_token_states(model, batches, [last], forward, device)[last]
    error = ((padded - alone).norm() / alone.norm()).item()
    if error > PADDING_ERROR:
        raise UserError(
            f"model.name: {type(causal_lm(model)).__name__} gives a prompt other states where it "
            f"is padded (they differ by {error:.0%}), so it does not heed the attention mask; take "
            "a model that does, rows are padded here"
        )


def states_by_block(
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    runtime: Runtime,
    *,
    layers: Sequence[int] | None = None,
    forward: Callable[..., Any] | None = None,
    space: str = "residual",
    memory: int = STATE_BYTES,
    progress: bool = False,
    select: Select = last_position,
    parts: int = 1,
    batch: int = BATCH,
) -> Iterator[dict[int, Tensor]]:
    """Last-prompt-token states, as many blocks at a time as `memory` bytes hold.

    Call and exhaust it on every rank.

    Args:
        model: a causal language model in eval mode, on its device.
        formatter: its chat format.
        prompts: n prompts, the same on every rank.
        runtime: the ranks that share the work.
        layers: block numbers; default: all.
        forward: what to call for a pass; default: the model's backbone.
        space: "residual" or "normed", see `taps.tap_points`.
        memory: bytes of states per yield; at least one block is taken whatever its size.
        progress: show a bar on rank 0, one step per batch.
        select: what is kept of a batch, if it is something else than the last prompt token.
        parts: K / H of what it keeps.
        batch: prompts per pass.

    Yields:
        block -> fp32 on the CPU, (n, H) on rank 0 in the order of `prompts`, (0, H) elsewhere; K
        for H with another `select`.
    """
    ids = [formatter.prompt_ids(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    rounds = -(-len(batches) // runtime.world_size)
    own = [batches[(i * runtime.world_size + runtime.rank) % len(batches)] for i in range(rounds)]
    width = causal_lm(model).config.get_text_config().hidden_size
    at_once = max(1, memory // (4 * len(prompts) * width * parts))
    every = list(range(len(blocks(model))) if layers is None else layers)
    for start in range(0, len(every), at_once):
        part = every[start : start + at_once]
        padded = (formatter.pad([ids[i] for i in some]) for some in own)
        title = f"states of blocks {part[0]}..{part[-1]}"
        silent = not (progress and runtime.is_main)
        bar = tqdm(padded, title, total=rounds, unit="batch", disable=silent)
        found = last_token_states(model, bar, part, forward, runtime.device, space, select)
        # one block at a time is held twice
        yield {layer: _on_main(found.pop(layer), order, rounds, batch, runtime) for layer in part}


def _on_main(own: Tensor, order: list[int], rounds: int, batch: int, runtime: Runtime) -> Tensor:
    """One block on rank 0, (n, H): the k-th row over batches is row `order[k]`; (0, H) elsewhere.

    Args:
        own: this rank's (rows, H), batch i of it being batch i * ranks + rank of all.
        order: prompt number per row, n of them.
        rounds: batches per rank.
        batch: rows per batch.
    """
    missing = rounds * batch - len(own)  # at the end: only the last batch of all is not full
    parts = runtime.gather_rows(nn.functional.pad(own, (0, 0, 0, missing)))
    if not parts:
        return own[:0].clone()
    stacked = torch.stack([part.view(rounds, batch, -1) for part in parts], dim=1)
    rows = torch.empty(len(order), own.shape[1])
    rows[torch.tensor(order)] = stacked.view(-1, own.shape[1])[: len(order)]
    return rows
