"""The configuration in words says what the model says."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import yaml
from typer.testing import CliRunner

from es2fast.cli import app
from es2fast.config import Config, load_config, parse_config
from es2fast.reference import markdown, sections, template

ROOT = Path(__file__).resolve().parents[1]


def test_the_document_is_made_from_the_model() -> None:
    path = ROOT / "docs/configuration.md"
    assert path.read_text() == markdown(), "run python -m es2fast.reference > docs/configuration.md"


def test_every_key_stands_in_the_document_and_has_a_meaning_in_the_model() -> None:
    text = markdown()
    known = {path for path, _ in sections()}
    for path, model in sections():
        for name in model.model_fields:
            key = f"{path}.{name}".lstrip(".")
            assert key in known or f"| `{key}` |" in text, key


def test_the_written_file_holds_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    done = CliRunner().invoke(app, ["init", str(path)])
    assert done.exit_code == 0 and "es2fast validate" in done.output
    found = load_config(path)
    given = {name: f"{name}.jsonl" for name in ("harmful", "harmless")}
    given |= {f"eval_{name}": f"eval_{name}.jsonl" for name in ("harmful", "harmless")}
    assert found == parse_config({"model": {"name": "MODEL"}, "data": given})


def test_a_key_of_every_section_can_be_overridden(tmp_path: Path) -> None:
    """Although all keys of most sections are comments."""
    path = tmp_path / "run.yaml"
    path.write_text(template())
    given = {"train.steps": 5, "kl.weight": 3.0, "evaluate.limit": 9, "separation.margin": 2.5,
             "separation.robust.probability": 0.5, "train.lora.r": 4}  # fmt: skip
    found = load_config(path, [f"{key}={value}" for key, value in given.items()])
    for key, value in given.items():
        assert attrgetter(key)(found) == value


def test_what_stands_behind_a_comment_sign_is_the_default() -> None:
    """All of them taken away, the file is the same run."""
    key = re.compile(r"^( *)#([a-z_0-9]+:)( .*)?$")
    lines = [key.sub(r"\1\2\3", line) for line in template().splitlines()]
    held = yaml.safe_load("\n".join(lines))
    assert held.keys() == Config.model_fields.keys()
    plain = load_config(None, ["model.name=MODEL"])
    found = parse_config(held)
    assert found.model_copy(update={"data": plain.data}) == plain
    assert held["train"]["lora"]["r"] == plain.train.lora.r


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    done = CliRunner().invoke(app, ["init", str(path)])
    assert "exists already" in str(done.exception) and path.read_text() == "mine"
