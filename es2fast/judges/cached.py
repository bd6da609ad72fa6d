"""Verdicts that are kept: verdicts.jsonl in the run's folder, so that judging again costs nothing.

A verdict depends on the judge's identity, the prompt, the answer and its reference, and on nothing
else: the key is a hash over these. New verdicts are written every 64 answers, so a judge that
fails loses little; those that the judge did not understand are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from es2fast.judges.base import VERDICTS, Item, Judge, Verdict
from es2fast.run.files import append_line, read_lines

CHUNK = 64  # answers asked about between two writes


class CachedJudge(Judge):
    """Another judge, asked only about what it has not judged yet.

    Args:
        judge: the one who decides.
        path: the file; made with the first verdict.
    """

    def __init__(self, judge: Judge, path: Path):
        self._judge, self._path = judge, path
        self.name, self.slow = judge.name, judge.slow
        self._known: dict[str, Verdict] | None = None

    @property
    def identity(self) -> str:
        return self._judge.identity

    @property
    def unclear(self):  # type: ignore[override]
        return self._judge.unclear

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        known = self._read()
        keys = [self._key(item) for item in items]
        fresh: dict[str, Verdict] = {}
        missing = {key: item for key, item in zip(keys, items) if key not in known}
        left = list(missing.items())
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            made = self._judge.verdicts([item for _, item in chunk])
            for (key, item), verdict in zip(chunk, made):
                fresh[key] = verdict
                if item not in self._judge.unclear:
                    self._keep(key, item, verdict)
        return [known.get(key) or fresh[key] for key in keys]

    def close(self) -> None:
        self._judge.close()

    def notes(self) -> list[str]:
        return self._judge.notes()

    def _read(self) -> dict[str, Verdict]:
        if self._known is None:
            self._known = {
                line["key"]: line["verdict"]
                for line in read_lines(self._path)
                if line.get("verdict") in VERDICTS and "key" in line
            }
        return self._known

    def _keep(self, key: str, item: Item, verdict: Verdict) -> None:
        self._read()[key] = verdict
        answer = hashlib.sha256(item[1].encode()).hexdigest()[:12]
        line = {"key": key, "judge": self.name, "answer": answer, "verdict": verdict}
        append_line(self._path, line)

    def _key(self, item: Item) -> str:
        text = json.dumps([self.identity, *item])
        return hashlib.sha256(text.encode()).hexdigest()[:24]
