"""The guides say what is so: quoted messages occur in the files that print them, named files and
links exist, commands and run files parse."""

from __future__ import annotations

import ast
import functools
import mmap
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import typer
import yaml
from deepspeed.launcher import runner

from es2fast.cli import app
from es2fast.config import load_config
from es2fast.harden.recipe import resolve
from es2fast.run.identity import differences

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
QUICKSTART = DOCS / "quickstart.md"
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


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            assert not (name := target.partition("#")[0]) or (page.parent / name).exists(), target


def code_blocks(page: Path) -> list[str]:
    """The fenced blocks of a page, without their fences."""
    return re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL)


def command_lines(page: Path, program: str) -> list[list[str]]:
    """The arguments of every line of a page's code blocks that runs a program."""
    found = []
    for block in code_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(rf"\s*(?:[A-Z_]+=\S+ )*{program} (.*)", line):
                found.append(shlex.split(match[1], comments=True))
    return found


def quickstart_run() -> dict[str, Any]:
    text = next(block for block in code_blocks(QUICKSTART) if block.startswith("# run.yaml"))
    return yaml.safe_load(text)


def check_es2fast(arguments: list[str]) -> None:
    """The command line's own parser takes them, and the overrides are keys of a run."""
    program: Any = typer.main.get_command(app)
    name, *rest = arguments
    parsed = program.commands[name].make_context(name, list(rest))
    given = [word for value in parsed.params.values() for word in
             (value if isinstance(value, list | tuple) else [])]  # fmt: skip
    load_config(quickstart_run(), [word for word in given if "=" in str(word)])


def test_the_run_file_is_what_harden_does() -> None:
    run = load_config(quickstart_run())
    names = list(differences(run, resolve(run.model.name, Path(run.output_dir))))
    assert all(name.startswith("data.") for name in names), names
    recipe = resolve(run.model.name, Path(run.output_dir)).data.harmless
    built_in = {one.source for one in recipe if one.source.startswith("builtin:")}
    assert built_in and built_in <= {one.source for one in run.data.harmless}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_commands_of_es2fast_parse(page: Path) -> None:
    found = command_lines(page, "es2fast")
    assert len(found) > 5 or page not in (QUICKSTART, ROOT / "README.md")
    for arguments in found:
        check_es2fast(arguments)


def test_launches_parse() -> None:
    launches = command_lines(QUICKSTART, "deepspeed")
    assert len(launches) == 5
    for arguments in launches:
        words = [word.replace("$SLURM_NODEID", "1") for word in arguments]
        parsed = runner.parse_args(words)
        assert parsed.module and parsed.user_script == "es2fast.train"
        assert parsed.user_args == ["--config", "run.yaml"]
    (words,) = command_lines(QUICKSTART, "torchrun")
    under = torch.distributed.run.get_args_parser().parse_args(words)
    assert under.module and under.training_script == "es2fast.cli"
    check_es2fast(under.training_script_args)


def test_hostfile_and_job_script_are_well_formed() -> None:
    blocks = code_blocks(QUICKSTART)
    hosts = next(block for block in blocks if block.startswith("# hostfile"))
    assert runner._parse_hostfile(hosts.splitlines()) == {"node1": 8, "node2": 8}
    script = next(block for block in blocks if "#SBATCH" in block)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
