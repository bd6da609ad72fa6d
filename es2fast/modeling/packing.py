"""Which models compute several rows right when they are one sequence.

A packed sequence needs attention that goes by its rows or takes a mask of its own, positions that
come from `position_ids`, and nothing else that goes from token to token. That is a matter of the
model's code, so these are the families with which it was tried (tests/modeling/test_packing.py).
GPT-2 is none of them: it gives its last states the shape of its ids, whatever was cut off.
"""

from __future__ import annotations

from typing import Any

from es2fast.modeling import packed_attention

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "phi", "olmo2",
    "gpt_neox", "granite", "cohere", "mixtral", "qwen3_moe",
)  # fmt: skip
BY_ROWS = ("sdpa", packed_attention.NAME)
DENSE = ("eager",)  # flash attention takes no mask


def takes_packed(config: Any, length: int) -> bool:
    """A model computes packed rows of at most `length` tokens as it computes them apart.

    Args:
        config: transformers' config.
        length: tokens of the longest row; a sliding window has to hold it.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    return (
        text.model_type in FAMILIES
        and getattr(config, "_attn_implementation", None) in BY_ROWS + DENSE
        and (window is None or window >= length)
    )


def attends_by_rows(config: Any) -> bool:
    """A model that takes packed rows attends within each alone; otherwise densely, under a mask."""
    return getattr(config, "_attn_implementation", None) in BY_ROWS
