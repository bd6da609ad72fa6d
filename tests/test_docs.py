"""The guides say what is so: quoted messages occur in the files that print them, named files and
links exist."""

from __future__ import annotations

import ast
import functools
import mmap
import re
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
INSTALLED = Path(sysconfig.get_paths()["purelib"])
VARIES = "…"


def quoted_messages() -> list[tuple[str, str]]:
    """(message, file) of every row of docs/troubleshooting.md."""
    found = []
    for line in (DOCS / "troubleshooting.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and cells[1].startswith("`"):
            found += [(text, cells[1].strip("`")) for text in re.findall(r"`([^`]+)`", cells[0])]
    return found


@functools.cache
def literals(path: Path) -> tuple[str, ...]:
    """The string literals of a Python file, implicit concatenations joined, `VARIES` in f-strings
    for what is put in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else VARIES for p in node.values)
            found.append("".join(map(str, parts)))
    return tuple(" ".join(text.split()) for text in found)


def printed_by(message: str, path: Path) -> bool:
    """The parts of a message between `VARIES` occur in one literal of the file, in order."""
    parts = [part for part in message.split(VARIES) if part.strip()]
    if path.suffix == ".py":
        pattern = re.compile(".*".join(re.escape(" ".join(part.split())) for part in parts))
        return any(pattern.search(text) for text in literals(path))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return all(data.find(part.strip().encode()) >= 0 for part in parts)


def test_every_section_of_the_guide_is_read() -> None:
    assert len(quoted_messages()) > 50
    assert not printed_by("no such words are printed", ROOT / "es2fast/run/claim.py")


@pytest.mark.parametrize(("message", "file"), quoted_messages())
def test_a_quoted_message_is_printed_by_that_file(message: str, file: str) -> None:
    ours = file.startswith("es2fast/")
    path = (ROOT if ours else INSTALLED) / file
    if path.suffix == ".so" and "cuda" in path.name and not path.is_file():
        pytest.skip("torch was built without CUDA")
    assert printed_by(message, path)


def test_files_that_the_architecture_names_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    named |= {f"{name}.py" for name in re.findall(r"(?<=[ ,])[a-z_]+/[a-z_]+(?=[ ,])", text)}
    assert len(named) > 15
    folders = [ROOT, *(path.parent for path in (ROOT / "es2fast").rglob("*.py"))]
    assert not {name for name in named if not any((folder / name).exists() for folder in folders)}
