"""The configuration in words, made from its model: docs/configuration.md, and a file to start from.

python -m es2fast.reference > docs/configuration.md
"""

from __future__ import annotations

import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from es2fast.config import Config, DataSource
from es2fast.data.prompts import OTHER_RESPONSE_COLUMNS, PROMPT_COLUMNS, RESPONSE_COLUMN
from es2fast.data.sources import LABEL_COLUMN, SIDES

HEAD = """# Configuration reference

One YAML file is one run. `es2fast init run.yaml` writes one to start from, `es2fast validate
run.yaml` checks it, and every key can be overridden on the command line as `key=value`
(`train.lr=1e-4`, `layers=8,16`, `data.harmful.0.limit=500`). Unknown keys are errors. This page is
made from `es2fast/config/` by `python -m es2fast.reference`.
"""
_LIMITS = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))
REQUIRED = "required"


def sections(
    model: type[BaseModel] = Config, path: str = ""
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Each section's dotted path ("" for the whole) and model, parents before their children."""
    yield path, model
    for name, field in model.model_fields.items():
        if (inner := section_of(field)) is not None:
            yield from sections(inner, f"{path}.{name}".lstrip("."))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds; None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def markdown() -> str:
    """docs/configuration.md."""
    parts = [HEAD]
    for path, model in sections():
        plain = {n: f for n, f in model.model_fields.items() if section_of(f) is None}
        if plain:
            parts.append(f"## {f'`{path}`' if path else 'Top level'}\n")
            parts.append(_table(plain, f"{path}." if path else ""))
    parts.append(_sources_head())
    parts.append(_table(DataSource.model_fields, "data.harmful."))
    return "\n".join(parts)


def _sources_head() -> str:
    known = ", ".join(f"`{name}`" for name in PROMPT_COLUMNS)
    others = ", ".join(f"`{name}`" for name in OTHER_RESPONSE_COLUMNS)
    labels = "; ".join(
        f"{', '.join(f'`{label}`' for label in sorted(SIDES[side]))} ({side})"
        for side in ("harmful", "harmless")
    )
    return f"""## A source of prompts

A plain string is short for `{{source: ...}}`. Files are CSV, TSV, JSON Lines, JSON, Parquet, or
text with one prompt a line.

- **Prompt**: the column that `column` names, else the first of {known}
  that is there (with `input` appended, where an `instruction` has one). A cell is text or a
  conversation, a list of `{{role, content}}`, which is cut after its last user turn.
- **Response** of a harmless prompt: `{RESPONSE_COLUMN}`, else the only one of {others},
  else the assistant turn behind a conversation's last user turn. The base model writes the others.
- **Label**: `{LABEL_COLUMN}`, any of {labels}.
  Read in `data.labelled`, and where `side` says what is wanted.
"""


def template() -> str:
    """A run file with all keys: what has to be given stands there, the defaults are comments."""
    lines = ["# A run of es2fast. #key: value is a default; take the # away to change it.",
             "# What each key means in full: docs/configuration.md"]  # fmt: skip
    for name, field in Config.model_fields.items():
        inner = section_of(field)
        lines += ["", f"{name}:"] if inner else ["", *_entry(name, field, "")]
        lines += _section(inner, "  ") if inner else []
    return "\n".join(lines) + "\n"


_GIVEN = {
    "name": "MODEL  # a folder or a Hugging Face id",
    "harmful": "harmful.jsonl",
    "harmless": "harmless.jsonl",
    "eval_harmful": "eval_harmful.jsonl",
    "eval_harmless": "eval_harmless.jsonl",
}


def _section(model: type[BaseModel], indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            lines += [f"{indent}#{name}:", *_commented(_section(inner, indent + "  "), indent)]
        else:
            lines += _entry(name, field, indent)
    return lines


def _entry(name: str, field: FieldInfo, indent: str) -> list[str]:
    words = textwrap.wrap(
        field.description or "", 96 - len(indent), initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}#   ", break_on_hyphens=False,
    )  # fmt: skip
    if indent and name in _GIVEN:
        return [*words, f"{indent}{name}: {_GIVEN[name]}"]
    return [*words, f"{indent}#{name}: {_plain(field)}"]


def _commented(lines: list[str], indent: str) -> list[str]:
    """Lines of a section that is itself a comment."""
    return [line if line.lstrip().startswith("#") else f"{indent}#{line.strip()}" for line in lines]


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = ["| key | default | values | meaning |", "|:--|:--|:--|:--|"]
    for name, field in fields.items():
        words = " ".join((field.description or "").split()).replace("|", "\\|")
        default = _plain(field)
        default = default if default == REQUIRED else f"`{default}`"
        rows.append(f"| `{prefix}{name}` | {default} | {_values(field)} | {words} |")
    return "\n".join(rows) + "\n"


def _plain(field: FieldInfo) -> str:
    """The default as YAML has it."""
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True, validated_data={})
    text = json.dumps(value, ensure_ascii=False)
    return text if not isinstance(value, str) or not value or ":" in value else value


def _values(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for kind, name, sign in _LIMITS
        if isinstance(item, kind)
    ]
    limits += ["not empty" for item in field.metadata if isinstance(item, MinLen)]
    return ", ".join([_kind(field.annotation), *limits])


def _kind(annotation: Any) -> str:
    """A type in words a user of YAML knows."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        if inner[0] is DataSource:
            return "sources"
        return (
            f"list of {_kind(inner[0])}" if origin is list else f"[{', '.join(map(_kind, inner))}]"
        )
    if origin is dict or annotation is dict:
        return "mapping"
    if inner:  # a union
        return " or ".join(_kind(item) for item in inner)
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything",
             type(None): "null"}  # fmt: skip
    return names[annotation]


if __name__ == "__main__":
    print(markdown(), end="")
