"""A configuration read from YAML and the command line, checked, and written back."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from es2fast.config.data import DataSource
from es2fast.config.run import Config
from es2fast.errors import UserError
from es2fast.yaml_text import parse_yaml


def load_config(
    source: str | Path | dict[str, Any] | None, overrides: typing.Sequence[str] = ()
) -> Config:
    """Reads a YAML file, applies `key=value` overrides and validates.

    Args:
        source: YAML file, or the mapping that one holds; None starts from an empty mapping
            (overrides must then name the model).
        overrides: dotted `key=value` strings; values are parsed as YAML.

    Raises:
        UserError: missing file, malformed YAML or override, unknown key, value out of range.
    """
    raw = copy.deepcopy(source) if isinstance(source, dict) else read_yaml(source)
    for item in overrides:
        _apply_override(raw, item)
    return parse_config(raw)


def read_yaml(path: str | Path | None, name: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file; an empty one for None and for an empty file.

    Args:
        path: the file.
        name: what it is called in messages.

    Raises:
        UserError: missing file, malformed YAML, no mapping.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{name} {path}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name} {path}: not valid YAML ({reason})") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{name} {path}: expected a mapping of keys, found {type(raw).__name__}")
    return raw


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one, section by section; a value or a list of `high` replaces that of
    `low`."""
    result = dict(low)
    for key, value in high.items():
        below = result.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def parse_config(raw: dict[str, Any]) -> Config:
    """Validates a mapping; the first mistake becomes a one-line UserError."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved configuration, every default included; whole, or as it was."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    partial = Path(f"{path}.tmp")
    partial.write_text(text)
    partial.replace(path)


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {item!r}: expected key=value, for example train.lr=1e-4")
    value = _yaml_value(key, text)
    *parents, last = key.strip().split(".")
    node: Any = raw
    for part, following in zip(parents, [*parents[1:], last]):
        node = _inside(node, part, following, item)
    if isinstance(node, list):
        node[_place(node, last, item)] = value
    else:
        node[last] = value


def _inside(node: Any, part: str, following: str, item: str) -> Any:
    """What stands at `part`; a bare source of prompts becomes the mapping that it is short for."""
    place: Any = _place(node, part, item) if isinstance(node, list) else part
    child = node[place] if isinstance(node, list) else node.get(part)
    if child is None:  # not there, or a section all of whose keys are comments
        child = node[place] = {}
    if isinstance(child, str) and following in DataSource.model_fields:
        child = node[place] = {"source": child}
    elif following.isdecimal() and not isinstance(child, list) and child:
        child = node[place] = [child]
    if isinstance(child, list) and not following.isdecimal():
        raise UserError(
            f"override {item!r}: {part} is a list; name one of its entries, as in {part}.0."
            f"{following}"
        )
    if not isinstance(child, dict | list):
        raise UserError(f"override {item!r}: {part} is not a section")
    return child


def _place(entries: list[Any], part: str, item: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        raise UserError(
            f"override {item!r}: there is no entry {part}; there are {len(entries)}, counted from 0"
        )
    return int(part)


def _yaml_value(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: {text!r} is not a valid value") from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    unknown = [item for item in found if item["type"] == "extra_forbidden"]
    first = (unknown or found)[0]  # a misspelt key also shows up as a missing one
    path = ".".join(_shown(part) for part in first["loc"] if not _is_variant(part))
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, first["loc"])
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # of a pair
        return f"{path}: required and not given, found {first['input']!r}"
    if first["type"] == "missing":
        path = _first_required(path, first["loc"])
        return f"{path}: required and not given; set it in the YAML file or as {path}=..."
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return message
    if first["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, found {first['input']!r}"


def _shown(part: Any) -> str:
    """A key as it stands, or quoted where that would break the line."""
    text = str(part)
    return text if text.isprintable() else repr(text)


def _first_required(path: str, loc: tuple[Any, ...]) -> str:
    """A section that is missing stands for the first of its fields that has no default."""
    field = _section_at(loc[:-1]).model_fields[str(loc[-1])]
    section = _section_type(field.annotation)
    fields = section.model_fields if section else {}
    required = [name for name, below in fields.items() if below.is_required()]
    return f"{path}.{required[0]}" if required else path


def _is_variant(part: Any) -> bool:
    """pydantic names the union's branch in the location (`list[int]`, `literal['auto']`)."""
    return isinstance(part, str) and ("[" in part or part in {"str"})


_ALIASES = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "batch_size": "micro_batch_size",
    "lambda": "weight",
    "kappa": "margin",
    "model_name": "name",
    "path": "name",
}


def _unknown_key(path: str, loc: tuple[Any, ...]) -> str:
    names = list(_section_at(loc[:-1]).model_fields)
    alias = _ALIASES.get(str(loc[-1]))
    close = (
        [alias]
        if alias in names
        else difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    )
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}"
    return f"{path}: unknown key; {hint}"


def _section_at(loc: tuple[Any, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_type(section.model_fields[part].annotation) or section
    return section


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            found = _section_type(argument)
            if found is not None:
                return found
    return None
