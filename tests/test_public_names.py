"""What users can name exists, says what it is, and answers for itself."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

import es2fast
from es2fast.cli import app
from es2fast.config import Config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# --- the library ----------------------------------------------------------------------------------


def callables(name: str) -> Iterator[tuple[str, Any]]:
    """The function of that name, or the class with its own public methods."""
    found = getattr(es2fast, name)
    yield name, found
    if inspect.isclass(found):
        for key, member in vars(found).items():
            member = getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(member):
                yield f"{name}.{key}", member


@pytest.mark.parametrize("name", es2fast.__all__)
def test_a_public_name_is_documented_and_annotated(name: str) -> None:
    for path, found in callables(name):
        assert inspect.getdoc(found), f"{path} has no docstring"
        signature = inspect.signature(found)
        bare = [
            key
            for key, parameter in signature.parameters.items()
            if parameter.annotation is inspect.Parameter.empty and key not in ("self", "cls")
        ]
        assert not bare, f"{path}: arguments without a type: {bare}"
        if not inspect.isclass(found):
            assert signature.return_annotation is not inspect.Signature.empty, path


def test_the_public_names_are_those_of_the_package() -> None:
    public = {
        name
        for name, value in vars(es2fast).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(es2fast.__all__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_calls_nothing_that_does_not_exist(path: Path) -> None:
    called = set(re.findall(r"\bes2fast\.(\w+)\(", path.read_text()))
    assert called <= set(es2fast.__all__)


# --- the commands ---------------------------------------------------------------------------------


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group, the root's being none."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


@pytest.mark.parametrize("words", commands(typer.main.get_command(app)), ids=" ".join)
def test_a_command_explains_itself(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage:" in done.output and "--help" in done.output


def test_the_cluster_entry_explains_itself() -> None:
    command = [sys.executable, "-m", "es2fast.train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


def test_the_version_is_that_of_pyproject() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output == f"es2fast {version[1]}\n"


# --- the configuration ----------------------------------------------------------------------------


def keys_in_tables(text: str) -> list[str]:
    """What stands in backquotes in the first column of tables that begin with `| key |`."""
    found, inside = [], False
    for line in text.splitlines():
        inside = line.startswith("| key |") or (inside and line.startswith("|"))
        if inside:
            found += re.findall(r"`([\w.]+)`", line.split("|")[1])
    return found


def has_key(section: Any, key: str) -> bool:
    """Whether a dotted key names a field; a section may be one of several types of a field."""
    if not key:
        return True
    head, _, rest = key.partition(".")
    if inspect.isclass(section) and issubclass(section, BaseModel):
        field = section.model_fields.get(head)
        return field is not None and has_key(field.annotation, rest)
    return any(has_key(part, key) for part in typing.get_args(section))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_key_in_a_document_exists(path: Path) -> None:
    keys = keys_in_tables(path.read_text())
    assert len(keys) > 10 or path.name != "README.md"
    unknown = [key for key in keys if not has_key(Config, key)]
    assert not unknown, f"{path.name} names keys that no configuration has: {unknown}"


def test_has_key_knows_a_missing_key() -> None:
    assert has_key(Config, "separation.robust.attacks") and has_key(Config, "data.harmful.source")
    assert not has_key(Config, "separation.kappa") and not has_key(Config, "layers.depth")
