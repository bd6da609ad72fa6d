"""Transcript: a conversation that went well stands before the request.

Fixed turns of user and assistant are put before the prompt (behind a system message of its own), as
if the model had said them; the request comes last. The built-in lead-ins (`lead_ins.jsonl`) are
neutral: a conversation on daily matters, an assistant that agrees to be thorough, and one that has
promised to answer the next question. Each is a variant.

`path` names a file of the reader's own: rows of `name` and `messages` (`[{role, content}]`, ending
with an assistant turn; `{prompt}` stands for the request). Attacks that search for such
conversations (PAIR, Crescendo) are imported this way; they are not run here.

`data.max_length` drops the oldest exchanges of what does not fit; a lead-in of which nothing is
left is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, computed_field

from es2fast.attacks.base import Answer, Attack, AttackSettings, Cost, Target
from es2fast.attacks.prompts.rows import PLACE, Row, ask, table
from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.run.files import digest

BUILT_IN = Path(__file__).with_name("lead_ins.jsonl")
Turns = list[dict[str, str]]


class TranscriptSettings(AttackSettings):
    path: str | None = Field(
        None, description="rows of `name` and `messages`; default: the built-in lead-ins"
    )

    @computed_field
    def content(self) -> str | None:
        """Hash of the file."""
        return digest(self.path or BUILT_IN)


class Transcript(Attack):
    """Asks the request at the end of each conversation of a list."""

    name = "transcript"
    Settings = TranscriptSettings
    settings: TranscriptSettings

    def __init__(self, settings: TranscriptSettings | None = None):
        super().__init__(settings or self.Settings())
        self.transcripts: dict[str, Turns] = {}

    def cost(self, target: Target, prompts: int) -> Cost:
        return Cost(prompts * len(read_transcripts(self.settings.path)))

    def prepare(self, target: Target) -> None:
        """Reads the transcripts and keeps those that fit before a training prompt.

        Raises:
            UserError: see `read_transcripts`; none fits, or the template writes no earlier turns.
        """
        prompt, formatter = target.harmful[0], target.formatter
        plain = formatter.prompt_ids(prompt)
        self.transcripts = {
            name: turns
            for name, turns in read_transcripts(self.settings.path).items()
            if formatter.prompt_ids(continued(turns, prompt)) != plain
        }
        if not self.transcripts:
            raise UserError(
                "transcript: nothing of any transcript is left before a prompt within "
                f"data.max_length {formatter.data.max_length}; set a larger one"
            )

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        return ask(target, [self.rows(target, prompt) for prompt in prompts])

    def rows(self, target: Target, prompt: Prompt) -> list[Row]:
        """What is asked for one prompt: a row per transcript."""
        return [
            Row(target.formatter.prompt_ids(continued(turns, prompt)), {"transcript": name})
            for name, turns in self.transcripts.items()
        ]

    def summary(self) -> dict[str, Any]:
        return {"transcripts": list(self.transcripts)}


def continued(turns: Sequence[dict[str, str]], prompt: Prompt) -> Prompt:
    """The prompt after some turns; a system message of its own stays first."""
    system = [turn for turn in prompt.messages[:1] if turn["role"] == "system"]
    filled = [{**turn, "content": turn["content"].replace(PLACE, prompt.text)} for turn in turns]
    return Prompt((*system, *filled, *prompt.messages[len(system) :]), prompt.response)


def read_transcripts(path: str | None = None) -> dict[str, Turns]:
    """Name -> turns, of which the last is the assistant's.

    Raises:
        UserError: a file that cannot be read; a row without name or messages, or whose messages are
            no conversation of user and assistant in turn; a name that occurs twice.
    """
    found: dict[str, Turns] = {}
    where = f"transcript.path: {str(path or BUILT_IN)!r}"
    for number, row in enumerate(table(path or BUILT_IN, "transcript.path").rows, 1):
        name, turns = row.get("name"), row.get("messages")
        if not isinstance(name, str) or not isinstance(turns, list) or not _alternates(turns):
            raise UserError(
                f"{where} row {number}: expected `name` and `messages`, user and assistant in turn "
                "and the assistant last"
            )
        if name in found:
            raise UserError(f"{where} row {number}: {name!r} occurs twice; rename one")
        found[name] = turns
    return found


def _alternates(turns: list[Any]) -> bool:
    """User first, assistant last, both with text."""
    return (
        len(turns) > 0
        and len(turns) % 2 == 0
        and all(
            isinstance(turn, dict)
            and turn.get("role") == ("user", "assistant")[place % 2]
            and isinstance(turn.get("content"), str)
            for place, turn in enumerate(turns)
        )
    )
