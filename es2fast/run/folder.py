"""The folder of a run: the one place that knows which files it holds and what they are called.

A run folder is claimed before anything is written into it, so a finished model is never lost to a
second run: its files are set aside in `previous/` until the new run has a model of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from es2fast.errors import UserError
from es2fast.run.files import remove

_WRITTEN: dict[str, Any] = {"layers": list, "d0": dict, "steps": int, "seconds": (int, float)}


class RunFolder:
    """Names, claim and state of one run's folder; nothing is made until `claim` or a write.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"  # every default resolved
        self.metrics = self.path / "metrics.jsonl"  # a line per optimizer step
        self.tensorboard = self.path / "tensorboard"
        self.trace = self.path / "trace.json"  # of train.profile, and its page
        self.profile = self.path / "profile.txt"
        self.layers = self.path / "layers.json"  # what was measured on the base model
        self.whitening = self.path / "whitening.safetensors"
        self.model = self.path / "model"  # safetensors, tokenizer, model card
        self.summary = self.path / "train.json"  # how the training went
        self.last_good = self.path / "last_good"  # weights of a run that a safeguard stopped
        self.stopped = self.path / "stopped.json"  # why a safeguard stopped the run
        self.checkpoints = self.path / "checkpoints"  # of a run that is not finished
        self.answers = self.path / "answers.jsonl"  # every generated answer, as it came
        self.verdicts = (
            self.path / "verdicts.jsonl"
        )  # what slow judges said, so that they need not again
        self.measured = self.path / "measured"  # per model, what evaluation needs of it later
        self.report = self.path / "report.json"
        self.page = self.path / "report.html"
        self.previous = self.path / "previous"

    @property
    def stop_file(self) -> Path:
        """A file that a user makes to have the run save a checkpoint and stop."""
        return self.path / "STOP"

    @property
    def contents(self) -> tuple[Path, ...]:
        """Everything a run may have written, `previous` apart."""
        return tuple(path for name, path in vars(self).items() if name not in ("path", "previous"))

    @property
    def occupied(self) -> bool:
        """A training wrote here."""
        return any(path.exists() for path in (self.config, self.metrics, self.model))

    @property
    def finished(self) -> bool:
        """A training came to its end here."""
        return self.model.is_dir() and self.summary.is_file()

    def check_finished(self, command: str) -> None:
        """UserError, in the name of `command`, when there is no finished run here."""
        if not self.finished:
            raise UserError(f"{command}: {str(self.path)!r} holds no finished run; train it first")

    def read_summary(self) -> dict[str, Any]:
        """What train.json says of a finished training.

        Raises:
            UserError: it cannot be read, or lacks what every training writes there.
        """
        try:
            found = json.loads(self.summary.read_text(encoding="utf-8"))
            whole = isinstance(found, dict) and all(
                isinstance(found[key], kind) for key, kind in _WRITTEN.items()
            )
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            raise UserError(
                f"train.json: {str(self.summary)!r} is damaged; restore it, or train the run again"
            )
        return dict(found)

    def claim(self) -> None:
        """Makes room for a run. A finished model is set aside with its files, in `previous/`,
        until the new run has one of its own; of a run without a model nothing is kept, and an
        earlier `previous/` stays. A kill in between loses nothing: the next claim begins anew."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.previous.with_suffix(".tmp")
        if partial.is_dir():  # of a claim that was killed
            for path in partial.iterdir():
                path.rename(self.path / path.name)
            partial.rmdir()
        found = [path for path in self.contents if path.exists()]
        if not self.model.is_dir():
            for path in found:
                remove(path)
            return
        partial.mkdir()
        for path in found:
            path.rename(partial / path.name)
        remove(self.previous)
        partial.rename(self.previous)

    def drop_previous(self) -> None:
        """Removes the earlier run that `claim` set aside, and the checkpoints of this one."""
        remove(self.previous)
        remove(self.checkpoints)
