"""Queries, and how a table's rows become them.

A row's prompt is a string or a conversation (a list of `{role, content}`). A conversation is cut
after its last user turn; the assistant turn that follows is its reference answer. Instructions
with an `input` column (the Alpaca form) get that input appended.

The reference answer comes from the column `response`, or else from whichever of `answer`,
`output`, `completion` exists alone and holds only text; two of them leave it open, and none is
used. The report names the columns that were chosen.

The source's `kind` and, where it is not read by its labels, columns `label` and `type` (XSTest has
both) say what kind of prompt a row is; refusals of harmless prompts are counted by them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from es2fast.config import DataSource
from es2fast.data.sources import (
    LABEL_COLUMN,
    SIDES,
    Table,
    one_line,
    read_table,
    says_sides,
)
from es2fast.errors import UserError

PROMPT_COLUMNS = (
    "prompt",
    "goal",  # before behavior: where a table has both, the latter is a short title
    "behavior",
    "forbidden_prompt",
    "instruction",
    "question",
    "text",
    "messages",
)
RESPONSE_COLUMN = "response"
OTHER_RESPONSE_COLUMNS = ("answer", "output", "completion")
KIND_COLUMNS = (LABEL_COLUMN, "type")
KIND = "kind"  # stands beside columns for what a source says of all its rows
MOST_KINDS = 40  # different values; a column with more names no kinds


@dataclass(frozen=True)
class Prompt:
    """One query: `messages` ends with a user turn; no configured system prompt is in it yet.

    `kinds` is what the source says the prompt is; it does not make it another prompt.
    """

    messages: tuple[dict[str, str], ...]
    response: str | None = None
    kinds: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (column, value)

    @classmethod
    def of(cls, text: str, response: str | None = None) -> Prompt:
        """A single user turn."""
        return cls(({"role": "user", "content": text},), response)

    @property
    def text(self) -> str:
        """Content of the last user turn."""
        return self.messages[-1]["content"]

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The messages as hashable (role, content) pairs."""
        return tuple((turn["role"], turn["content"]) for turn in self.messages)

    def __hash__(self) -> int:
        return hash((self.turns, self.response))

    @property
    def key(self) -> str:
        """What makes two prompts the same query: normalised turns, system messages left out."""
        return "\n".join(normalise_prompt(text) for role, text in self.turns if role != "system")


def normalise_prompt(text: str) -> str:
    """NFKC, case-folded, whitespace collapsed, trailing punctuation dropped."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    flat = " ".join(folded.split())
    end = len(flat)
    while end and (flat[end - 1] == " " or unicodedata.category(flat[end - 1]).startswith("P")):
        end -= 1
    return flat[:end] or flat


@dataclass
class SourceRows:
    """The prompts of one source, and what was found in it; cut: `limit` left some out."""

    prompts: list[Prompt]
    harmful: list[bool]  # one per prompt; empty unless the source is labelled
    rows: int
    blank: int
    column: str
    response_column: str | None
    labels: dict[str, int]
    cut: bool = False


def read_source(
    source: DataSource, field: str, labelled: bool = False, group: str | None = None
) -> SourceRows:
    """Reads one source into prompts.

    Args:
        source: what to read.
        field: configuration path for error messages.
        labelled: also read `label`; 1, true, harmful and unsafe mean harmful.
        group: "harmful" or "harmless", what the rows are to be: none may be labelled the other.

    Raises:
        UserError: unreadable source, no (such) column, a cell that is no text or conversation, an
            unknown label, rows labelled harmful among harmless ones or the reverse. Rows are
            counted from 1.
    """
    table = read_table(source, field, lambda name: name == source.column or _is_known(name))
    where = f"{field}: {source.source!r}"
    column = _prompt_column(table, source, where)
    if labelled and LABEL_COLUMN not in table.columns:
        raise UserError(
            f"{where} has no column {LABEL_COLUMN!r}; its columns are {_names(table.columns)}"
        )
    response = _response_column(table, column)
    if not labelled and group is not None:
        _check_labels(table, group, where, "eval_" if field.startswith("data.eval_") else "")
    label_of = _labels(table, where) if labelled else None
    kinds = [] if labelled else _kind_columns(table)
    found = SourceRows([], [], len(table.rows), 0, column, response, {}, table.cut)
    for number, row in enumerate(table.rows):
        prompt = _prompt(row, column, response, f"{where} row {number + 1}")
        if prompt is None:
            found.blank += 1
            continue
        known = tuple((name, str(row[name]).strip()) for name in kinds if row.get(name) is not None)
        known = ((KIND, source.kind), *known) if source.kind else known
        found.prompts.append(replace(prompt, kinds=known) if known else prompt)
        if label_of is not None:
            label = label_of[number]
            found.harmful.append(label in SIDES["harmful"])
            found.labels[label] = found.labels.get(label, 0) + 1
    if not found.prompts:
        raise UserError(f"{where} has only blank prompts in column {column!r}")
    return found


def _is_known(name: str) -> bool:
    known = (*PROMPT_COLUMNS, RESPONSE_COLUMN, *OTHER_RESPONSE_COLUMNS, *KIND_COLUMNS, "input")
    return name.lower() in known


def _names(columns: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in columns if name) or "(none)"


def _prompt_column(table: Table, source: DataSource, where: str) -> str:
    if source.column is not None:
        if source.column in table.columns:
            return source.column
        raise UserError(
            f"{where} has no column {source.column!r}; its columns are {_names(table.columns)}"
        )
    for wanted in PROMPT_COLUMNS:
        for name in sorted(table.columns, key=lambda name: name != wanted):
            if name.lower() == wanted:
                return name
    raise UserError(
        f"{where} has no column recognised as the prompt; set `column` to one of "
        f"{_names(table.columns)}"
    )


def _response_column(table: Table, prompt_column: str) -> str | None:
    if RESPONSE_COLUMN in table.columns and prompt_column != RESPONSE_COLUMN:
        return RESPONSE_COLUMN
    others = [n for n in OTHER_RESPONSE_COLUMNS if n in table.columns and n != prompt_column]
    if len(others) != 1:
        return None
    cells = [row.get(others[0]) for row in table.rows]
    readable = all(cell is None or isinstance(cell, str) or _is_turn(cell) for cell in cells)
    return others[0] if readable else None


def _is_turn(cell: Any) -> bool:
    """The conversational form of an answer, `[{role: assistant, content}]`."""
    return isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], dict)


def _kind_columns(table: Table) -> list[str]:
    """Columns that sort the rows into a few kinds."""
    found = []
    for name in KIND_COLUMNS:
        cells = [row[name] for row in table.rows if row.get(name) is not None]
        plain = all(isinstance(cell, str | int) for cell in cells)
        if plain and 1 < len(set(map(str, cells))) <= MOST_KINDS:
            found.append(name)
    return found


def _check_labels(table: Table, group: str, where: str, prefix: str) -> None:
    """Refuses rows whose column `label` says that they belong to the other group."""
    other = SIDES["harmless" if group == "harmful" else "harmful"]
    cells = [str(row.get(LABEL_COLUMN)).strip().casefold() for row in table.rows]
    if not says_sides(cells):
        return
    wrong = [cell for cell in cells if cell in other]
    if wrong:
        own = next((cell for cell in cells if cell in SIDES[group]), None)
        keep = f"where: {{{LABEL_COLUMN}: {own}}}, or read" if own else "read"
        raise UserError(
            f"{where} has {len(wrong)} of {len(cells)} rows labelled {wrong[0]!r} among the "
            f"{group} ones; keep the others with {keep} it as data.{prefix}labelled"
        )


def _labels(table: Table, where: str) -> list[str]:
    labels = [str(row.get(LABEL_COLUMN)).strip().casefold() for row in table.rows]
    unknown = sorted(set(labels) - SIDES["harmful"] - SIDES["harmless"])
    if unknown:
        shown = ", ".join(repr(one_line(label, 30)) for label in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"{where} column {LABEL_COLUMN!r} holds {shown}{more}; expected harmful/harmless, "
            "unsafe/safe, 1/0 or true/false"
        )
    return labels


def _prompt(
    row: Mapping[str, Any], column: str, response_column: str | None, where: str
) -> Prompt | None:
    """The row's prompt; None when it is blank."""
    cell = row.get(column)
    answer = (
        _response(row.get(response_column), response_column, where) if response_column else None
    )
    if isinstance(cell, list):
        prompt = _conversation(cell, column, where)
        return prompt if answer is None else Prompt(prompt.messages, answer)
    if not isinstance(cell, str) or column.lower() == "messages":
        wanted = "a list of messages" if column.lower() == "messages" else "text"
        raise UserError(f"{where}: column {column!r} holds {_kind(cell)}; expected {wanted}")
    if not cell.strip():
        return None
    if any("\ud800" <= character <= "\udfff" for character in cell):
        raise UserError(
            f"{where}: column {column!r} holds half of a character (a lone surrogate), which is no "
            "text; remove it"
        )
    extra = row.get("input") if column.lower() == "instruction" else None
    if isinstance(extra, str) and extra.strip():
        cell = f"{cell.strip()}\n\n{extra.strip()}"
    return Prompt.of(cell.strip(), answer)


def _kind(cell: Any) -> str:
    return "nothing" if cell is None else f"{one_line(repr(cell), 40)} ({type(cell).__name__})"


def _conversation(cell: list[Any], column: str, where: str) -> Prompt:
    turns = []
    for turn in cell:
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{where}: column {column!r} holds {one_line(repr(turn), 40)}; "
                "expected messages of the form {role, content}, both text"
            )
        turns.append({"role": role, "content": content})
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    if not users or not turns[users[-1]]["content"].strip():
        raise UserError(f"{where}: the conversation in {column!r} has no last user turn with text")
    last = users[-1]
    after = turns[last + 1] if last + 1 < len(turns) else None
    answer = after["content"] if after is not None and after["role"] == "assistant" else None
    return Prompt(tuple(turns[: last + 1]), answer if answer and answer.strip() else None)


def _response(cell: Any, column: str, where: str) -> str | None:
    """A reference answer: text, or `_is_turn`."""
    if _is_turn(cell):
        cell = cell[0].get("content")
    if cell is not None and not isinstance(cell, str):
        raise UserError(f"{where}: column {column!r} holds {_kind(cell)}; expected text")
    return cell if cell and cell.strip() else None
