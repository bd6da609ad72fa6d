"""Greedy decoding in which a row that has ended costs nothing any more.

transformers' own loop feeds padding to ended rows until the last one ends. Here a row leaves the
batch with its stop token: ids, mask, positions and the KV cache keep the other rows, in order. That
is done at once, since selecting rows copies the cache, as appending one token to it does anyway:
0.5 % of a step (0.5B model, 64 rows, CPU). Tokens are those of transformers' loop, apart from ties
that another batch size rounds otherwise. Hooks on the blocks see the whole batch while the prompt
is read and then the rows that go on.

`generate` of transformers prepares everything (cache, logits processors, stopping criteria) and
hands over to `decode` through its `custom_generate`, which is made for this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_BY_ROW = (DynamicLayer, DynamicSlidingWindowLayer)  # (B, heads, T, D), whatever the row


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **state: Any,
) -> Tensor:
    """A `custom_generate` of transformers' `generate`, which passes all of these arguments.

    Models whose state cannot be cut by rows (recurrent ones, static or quantized caches) go through
    transformers' own loop.

    Args:
        model: a decoder-only causal language model.
        input_ids: (B, T) prompts, padded on the left; (B, 0) where `state` has their embeddings.
        logits_processor: changes the scores (B, V) before the largest is taken.
        stopping_criteria: which rows (B,) have ended.
        generation_config: greedy; with a pad token where there is a stop token.
        state: further arguments of the model's forward, the cache among them.

    Returns:
        (B, T + n) ids; behind a row's stop token there is padding.
    """
    if not _cuttable(state, len(input_ids)):
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, **state
        )
    ids, rows = input_ids, torch.arange(len(input_ids), device=input_ids.device)
    first = True
    while len(rows):
        inputs = model.prepare_inputs_for_generation(
            ids[rows],
            next_sequence_length=None if first else 1,
            is_first_iteration=first,
            **state,
        )
        output = model(**inputs, return_dict=True)
        state = model._update_model_kwargs_for_generation(output, state)
        tokens = _largest(output.logits[:, -1], rows, ids, logits_processor)
        del output  # where a model makes them, logits of the whole prompt
        column = ids.new_full((len(ids), 1), generation_config.pad_token_id or 0)
        column[rows, 0] = tokens
        ids = torch.cat([ids, column], dim=1)
        going = (~stopping_criteria(ids, None))[rows].nonzero().flatten()
        if 0 < len(going) < len(rows):
            state = {name: _rows_of(value, going) for name, value in state.items()}
        rows, first = rows[going], False
    return ids


def _cuttable(state: dict[str, Any], rows: int) -> bool:
    """Whether each entry is a cache or a tensor by rows, or has nothing to do with them."""
    return any(isinstance(value, Cache) for value in state.values()) and all(
        all(type(layer) in _BY_ROW for layer in value.layers)
        if isinstance(value, Cache)
        else value is None
        or isinstance(value, (bool, int))
        or (isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows)
        for value in state.values()
    )


def _rows_of(value: Any, rows: Tensor) -> Any:
    """A value of the state for some of its rows; a cache is cut in place."""
    if isinstance(value, Cache):
        value.batch_select_indices(rows)
        return value
    return value[rows] if isinstance(value, Tensor) else value


def _largest(logits: Tensor, rows: Tensor, ids: Tensor, processors: Any) -> Tensor:
    """Per row the first token with the largest score.

    `max` and not `argmax`: of (64, 151936) bf16 logits on a CPU it takes 9 against 35 ms. Only for
    processors, which may know the rows of the batch by number, an fp32 copy of all rows is made.

    Args:
        logits: (b, V) of the rows that go on.
        rows: (b,) their numbers.
        ids: (B, T) of all rows.
        processors: transformers' list of what changes the scores.

    Returns:
        (b,) tokens.
    """
    if processors:
        scores = logits.new_zeros((len(ids), logits.shape[1]), dtype=torch.float32)
        scores[rows] = logits.float()
        logits = processors(ids, scores)[rows]
    return logits.max(dim=-1).indices
