"""Artifacts: jailbreak prompts that others have found, matched to the held-out prompts.

Searches such as PAIR, GCG on other models, AutoDAN or human red teams leave prompts behind; asking
them here costs one answer each. `path` names a file, in one of two forms:

    JSON of JailbreakBench   {"parameters": ..., "jailbreaks": [{"goal", "prompt", ...}, ...]}
    rows (JSON Lines, CSV)   `goal` (or `prompt`): the request;  `attack`: what is asked instead

What is asked may also be a conversation, `[{role, content}]`, ending with a user turn. A row whose
prompt is null (the search had failed) is skipped. Goals are compared as prompts are everywhere
here: case, white space and closing punctuation do not count (`normalise_prompt`).

A prompt may have several artifacts: all are asked. One that has none is asked plainly, so that
rates are over the same prompts as those of other attacks; `parameters.artifact` tells the two
apart, and the report says how many prompts had one. Artifacts are tuned to the models they come
from: a low rate on another model says little.

Source of the form: Chao et al. 2024, "JailbreakBench" (arXiv 2404.01318).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, computed_field

from es2fast.attacks.base import Answer, Attack, AttackSettings, Cost, Target
from es2fast.attacks.prompts.rows import Row, ask, table
from es2fast.data import Prompt, normalise_prompt
from es2fast.errors import UserError
from es2fast.run.files import digest

Messages = tuple[dict[str, str], ...]


class ArtifactsSettings(AttackSettings):
    path: str = Field(description="JailbreakBench's JSON, or rows of `goal` and `attack`")

    @computed_field
    def content(self) -> str | None:
        """Hash of the file."""
        return digest(self.path)


class Artifacts(Attack):
    """Asks imported jailbreak prompts."""

    name = "artifacts"
    Settings = ArtifactsSettings
    settings: ArtifactsSettings

    def __init__(self, settings: ArtifactsSettings):
        super().__init__(settings)
        self._found: dict[str, list[Messages]] | None = None

    @property
    def found(self) -> dict[str, list[Messages]]:
        """Normalised goal -> what is asked, read when it is first needed."""
        if self._found is None:
            self._found = read_artifacts(self.settings.path)
        return self._found

    def coverage(self, prompts: Sequence[Prompt]) -> dict[str, int]:
        """How many prompts have an artifact.

        Raises:
            UserError: none has; see `read_artifacts`.
        """
        count = sum(normalise_prompt(prompt.text) in self.found for prompt in prompts)
        if not count:
            raise UserError(
                f"artifacts.path: {self.settings.path!r} has {len(self.found)} goals, none of them "
                "a held-out harmful prompt; give the file whose goals are those prompts"
            )
        return {"prompts_with_artifact": count}

    def cost(self, target: Target, prompts: int) -> Cost:
        mean = sum(map(len, self.found.values())) / len(self.found)
        return Cost(prompts * mean)

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        return ask(target, [self.rows(target, prompt) for prompt in prompts])

    def rows(self, target: Target, prompt: Prompt) -> list[Row]:
        """What is asked for one prompt: a row per artifact, or else the prompt itself."""
        made = [Prompt(messages) for messages in self.found.get(normalise_prompt(prompt.text), [])]
        ids = target.formatter.prompt_ids
        return [
            Row(ids(asked), {"artifact": True}, sample) for sample, asked in enumerate(made)
        ] or [Row(ids(prompt), {"artifact": False})]


def read_artifacts(path: str) -> dict[str, list[Messages]]:
    """Normalised goal -> what is asked instead, in the order of the file.

    Raises:
        UserError: a file that cannot be read; a row without goal, or whose prompt is neither text
            nor a conversation; no row with a prompt.
    """
    found: dict[str, list[Messages]] = {}
    for number, row in enumerate(table(path, "artifacts.path").rows, 1):
        goal = row.get("goal", row.get("prompt"))
        asked = row.get("attack" if "attack" in row else "prompt")
        where = f"artifacts.path: {path!r} row {number}"
        complete = "attack" in row or {"goal", "prompt"} <= row.keys()
        if not complete or not isinstance(goal, str):
            raise UserError(f"{where}: expected `goal` and `prompt`, or `goal` and `attack`")
        if asked is None or asked == "":
            continue
        found.setdefault(normalise_prompt(goal), []).append(_messages(asked, where))
    if not found:
        raise UserError(f"artifacts.path: {path!r} has no row with a prompt; give another file")
    return found


def _messages(asked: Any, where: str) -> Messages:
    if isinstance(asked, str):
        return ({"role": "user", "content": asked},)
    turns = asked if isinstance(asked, list) else []
    good = all(
        isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and "role" in turn
        for turn in turns
    )
    if not turns or not good or turns[-1]["role"] != "user":
        raise UserError(
            f"{where}: what is asked must be text, or messages of the form {{role, content}} that "
            "end with a user turn"
        )
    return tuple(dict(turn) for turn in turns)
