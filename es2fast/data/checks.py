"""What is wrong with groups of prompts for one model, said before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from es2fast.data.format import Formatter
from es2fast.data.groups import PromptGroups
from es2fast.data.prompts import Prompt
from es2fast.data.sources import one_line
from es2fast.errors import UserError

FEWEST = 2  # distinct prompts per group: a distance between states needs two


def prompt_lengths(groups: PromptGroups, formatter: Formatter, vocab_size: int) -> list[int]:
    """Tokens of every training prompt, harmful ones first.

    Raises:
        UserError: a group of a single prompt; a token that the model's embedding lacks.
    """
    lengths = []
    for name in ("harmful", "harmless"):
        prompts = getattr(groups, name)
        if len(prompts) < FEWEST:
            raise UserError(
                f"data.{name}: {len(prompts)} distinct prompt, and at least {FEWEST} are needed; "
                "give more"
            )
        for prompt in prompts:
            ids = formatter.prompt_ids(prompt)
            lengths.append(len(ids))
            known_tokens(ids, prompt, vocab_size)
    return lengths


def known_tokens(ids: Sequence[int], prompt: Prompt, vocab_size: int) -> None:
    """UserError where one of a prompt's tokens has no embedding."""
    if max(ids) >= vocab_size:
        raise UserError(
            f"model.name: the tokenizer writes token {max(ids)} for "
            f"{one_line(prompt.text, 40)!r}, but the model has {vocab_size} embeddings; give model "
            "and tokenizer that belong together"
        )
