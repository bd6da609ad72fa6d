"""Roleplay: the request inside a fixed wrapper, as anybody would write it.

A short list of our own (`wrappers.jsonl`): role play, fiction, translation, a hypothetical case,
research, a ban on refusals. It is a cheap stand-in for searches such as AutoDAN: what such a list
breaks needs no attacker. Each wrapper is a variant, so the report says which of them worked.

`path` names a file of the reader's own: rows of `name` and `text`, `{prompt}` in the text where the
request goes. Longer wrappers need room in `data.max_length`, which cuts the request's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, computed_field

from es2fast.attacks.base import Answer, Attack, AttackSettings, Cost, Target
from es2fast.attacks.prompts.rows import PLACE, Row, ask, table, with_request
from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.run.files import digest

BUILT_IN = Path(__file__).with_name("wrappers.jsonl")


class RoleplaySettings(AttackSettings):
    path: str | None = Field(
        None, description="rows of `name` and `text` with {prompt} in it; default: the built-in"
    )

    @computed_field
    def content(self) -> str | None:
        """Hash of the file."""
        return digest(self.path or BUILT_IN)


class Roleplay(Attack):
    """Asks the request in each wrapper of a list."""

    name = "roleplay"
    Settings = RoleplaySettings
    settings: RoleplaySettings

    def __init__(self, settings: RoleplaySettings | None = None):
        super().__init__(settings or self.Settings())
        self.wrappers: dict[str, str] = {}

    def cost(self, target: Target, prompts: int) -> Cost:
        return Cost(prompts * len(read_wrappers(self.settings.path)))

    def prepare(self, target: Target) -> None:
        """Reads the wrappers.

        Raises:
            UserError: see `read_wrappers`.
        """
        self.wrappers = read_wrappers(self.settings.path)

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        return ask(target, [self.rows(target, prompt) for prompt in prompts])

    def rows(self, target: Target, prompt: Prompt) -> list[Row]:
        """What is asked for one prompt: a row per wrapper."""
        asked = {name: text.replace(PLACE, prompt.text) for name, text in self.wrappers.items()}
        return [
            Row(target.formatter.prompt_ids(with_request(prompt, text)), {"wrapper": name})
            for name, text in asked.items()
        ]


def read_wrappers(path: str | None = None) -> dict[str, str]:
    """Name -> text with `{prompt}` in it.

    Raises:
        UserError: a file that cannot be read; a row without name, text or place for the request;
            a name that occurs twice.
    """
    found: dict[str, str] = {}
    where = f"roleplay.path: {str(path or BUILT_IN)!r}"
    for number, row in enumerate(table(path or BUILT_IN, "roleplay.path").rows, 1):
        name, text = row.get("name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str) or PLACE not in text:
            raise UserError(
                f"{where} row {number}: expected `name` and `text`, with {PLACE} in the text"
            )
        if name in found:
            raise UserError(f"{where} row {number}: {name!r} occurs twice; rename one")
        found[name] = text
    return found
