"""What attacks on the prompt share: rows of ids to ask, their answers, and files of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from es2fast.attacks.base import Answer, Target
from es2fast.config import DataSource
from es2fast.data import Prompt
from es2fast.data.sources import Table, read_table
from es2fast.errors import UserError

PLACE = "{prompt}"  # in a text: where the request goes


@dataclass(frozen=True)
class Row:
    """One thing to ask: token ids, template and all, and what the answer will carry (see `Answer`).

    shown: how many of the last ids are part of the answer's text.
    """

    ids: Sequence[int]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)
    shown: int = 0


def ask(target: Target, rows: Sequence[Sequence[Row]]) -> list[list[Answer]]:
    """The greedy answers to every row, in the form of `rows`: one list per prompt.

    Rows of like length share a batch, whichever prompt they belong to.
    """
    flat = [row for some in rows for row in some]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i].ids))
    texts = target.generate_rows([flat[i].ids for i in order], shown=[flat[i].shown for i in order])
    by_row = dict(zip(order, texts))
    answers = iter(
        Answer(by_row[i], row.parameters, row.sample, row.info) for i, row in enumerate(flat)
    )
    return [[next(answers) for _ in some] for some in rows]


def with_request(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text in its last user turn."""
    turn = {"role": "user", "content": text}
    return Prompt((*prompt.messages[:-1], turn), prompt.response)


def table(path: str | Path, field: str) -> Table:
    """All rows of a file. Raises UserError, beginning with `field`: it cannot be read."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"{field}: there is no file {str(path)!r}; give one that exists")
    return read_table(DataSource(source=str(path)), field, lambda name: True)
