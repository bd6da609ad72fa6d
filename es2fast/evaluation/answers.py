"""answers.jsonl: every answer of an evaluation, appended as it comes; verdicts come later.

A line holds the model, group, attack, parameters, seed, prompt and text, and a key: a hash over
everything that the answer depends on. An evaluation that is started again takes the lines whose
keys it would write and goes on where it was stopped; one with other settings adds lines beside the
old ones, and reads only its own. Judging, and judging again, needs nothing but this file,
unless another judge decides: attacks that search chose by the verdicts of the one they were given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from es2fast.attacks.base import Answer
from es2fast.data import Prompt
from es2fast.run.files import append_line, read_lines

HARMFUL, HARMLESS, TRIAL = "harmful", "harmless", "trial"


@dataclass(frozen=True)
class Scope:
    """What the answers of one attack on one model depend on, apart from the prompt.

    model: its name in the report; fingerprint: of its weights and template; group: of the prompts;
    attack: its label; settings: name and settings of the attack, lengths; seed.
    """

    model: str
    fingerprint: str
    group: str
    attack: str
    settings: str
    seed: int

    def key(self, prompt: Prompt, parameters: Mapping[str, Any] | None = None) -> str:
        """Of the answers to `prompt`; parameters: of a trial."""
        parts = [self.fingerprint, self.group, self.attack, self.settings, self.seed]
        text = json.dumps([*parts, prompt.turns, parameters], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


_BEGINS = b'{"key": "'


def _is_answer(line: Mapping[str, Any]) -> bool:
    return {"key", "part", "of"} <= line.keys() and isinstance(line.get("text"), str)


def is_log(path: Path) -> bool:
    """The file is empty or holds answers, if only the first part of one, of a killed writer."""
    with path.open("rb") as file:
        begins = file.read(len(_BEGINS))
    return _BEGINS.startswith(begins) or any(map(_is_answer, read_lines(path)))


class AnswerLog:
    """The answers of a folder, in memory and on disk.

    Args:
        path: the file; made with the first answer.
        others: files that are read as well.
    """

    def __init__(self, path: Path, others: Sequence[Path] = ()):
        self._path = path
        self._found: dict[str, dict[int, dict[str, Any]]] = {}
        for line in chain.from_iterable(map(read_lines, (*others, path))):
            if _is_answer(line):
                self._found.setdefault(line["key"], {})[line["part"]] = line

    def get(self, key: str) -> list[Answer] | None:
        """All answers under a key; None when there are none, or not yet all of them."""
        lines = self._found.get(key)
        if not lines or len(lines) < next(iter(lines.values()))["of"]:
            return None
        return [
            Answer(line["text"], line["parameters"], line["sample"], line.get("info", {}))
            for _, line in sorted(lines.items())
        ]

    def put(self, scope: Scope, key: str, prompt: Prompt, answers: Sequence[Answer]) -> None:
        """Appends the answers to one prompt."""
        for part, answer in enumerate(answers):
            line = {
                "key": key,
                "part": part,
                "of": len(answers),
                "model": scope.model,
                "group": scope.group,
                "prompt_id": prompt_id(prompt),
                "attack": scope.attack,
                "parameters": dict(answer.parameters),
                "sample": answer.sample,
                "seed": scope.seed,
                "prompt": prompt.text,
                "text": answer.text,
            }
            if answer.info:
                line["info"] = dict(answer.info)
            append_line(self._path, line)
            self._found.setdefault(key, {})[part] = line


def prompt_id(prompt: Prompt) -> str:
    """Twelve hexadecimal digits that tell a prompt, whatever file it came from."""
    return hashlib.sha256(json.dumps(prompt.turns).encode()).hexdigest()[:12]
