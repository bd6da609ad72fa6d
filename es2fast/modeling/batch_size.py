"""How many prompts share a pass when nobody says so, and what happens when that is too many.

    CPU    32: more gain nothing there
    GPU    what fits into half of the free memory, a power of two up to 256

where a row takes the keys and values of all its tokens, the longest prompt and answer, and its last
logits in fp32. The other half is for what is not counted (activations, attention, an attack's
gradients). The count is a guess, so work that runs out of memory is done again with half as many.

What shares a batch changes an answer by rounding alone (and rounding may turn a greedy answer that
hangs by a thread), so it does not matter when in an evaluation the halving happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from es2fast.errors import UserError
from es2fast.modeling.taps import causal_lm
from es2fast.progress import tqdm

CPU_ROWS = 32
MOST_ROWS = 256
T = TypeVar("T")


def starting_rows(model: nn.Module, tokens: int) -> int:
    """Rows of `tokens` tokens to begin with, for a model on its devices; at least 1."""
    devices = {parameter.device for parameter in model.parameters()}
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return CPU_ROWS
    free = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    size = next(model.parameters()).element_size()
    return rows_within(free, causal_lm(model).config.get_text_config(), tokens, size)


def rows_within(free: int, config: Any, tokens: int, element_size: int) -> int:
    """How many rows half of `free` bytes hold: a power of two, 1..256.

    Args:
        config: transformers' text config.
        tokens: of a row, prompt and answer.
        element_size: bytes of a key's or value's element.
    """
    queries = getattr(config, "num_attention_heads", None) or 1  # state-space models have none
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    cache = 2 * config.num_hidden_layers * heads * width * element_size * tokens
    fitting = free // 2 // (cache + 4 * config.vocab_size)
    return min(MOST_ROWS, 1 << max(fitting.bit_length() - 1, 0))


def halving(
    work: Callable[[int], T],
    rows: int,
    *,
    automatic: bool,
    field: str = "evaluate.batch_size",
    fewer: str = "evaluate.batch_size=auto or a smaller number",
    at_one_row: str = "a shorter evaluate.max_new_tokens or evaluate.device_map=auto",
) -> tuple[T, int]:
    """`work(rows)`, done again with half as many rows as long as a GPU's memory does not suffice.

    Args:
        work: starts anew with every call.
        automatic: the number was not the user's.
        field: that the number stands in.
        fewer: what helps where the number is not halved.
        at_one_row: what helps where one row is too many.

    Returns:
        What `work` returned, and the rows with which it did.

    Raises:
        UserError: out of memory with the user's own number, or with a single row.
    """
    while True:
        try:
            return work(rows), rows
        except torch.OutOfMemoryError:  # left before trying again: it holds on to the tensors
            pass
        if rows == 1 or not automatic:
            remedy = at_one_row if rows == 1 else fewer
            raise UserError(f"{field}: out of memory with {rows} rows; use {remedy}")
        rows //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tqdm.write(f"note: out of memory; going on with {field}={rows}")
