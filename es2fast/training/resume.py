"""When the loop saves a checkpoint, what a checkpoint belongs to, and where a run goes on.

See `checkpoint` for what is in one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from es2fast.data import Prompt
from es2fast.distributed.interrupt import StopWish
from es2fast.distributed.runtime import Runtime
from es2fast.errors import RunInterrupted, UserError
from es2fast.run.checkpoints import CheckpointFolder
from es2fast.run.claim import check_unchanged
from es2fast.training import checkpoint
from es2fast.training.plan import Plan
from es2fast.training.prepare import Prepared
from es2fast.training.refusals import AnchorTexts
from es2fast.training.same_run import changes, check_same_run, identity_of

WHITENING = "whitening.safetensors"


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A verified checkpoint: its folder, what its manifest says of the run, and what `prepare`
    returned for that run; changes: words on what is not as it was."""

    folder: Path
    about: dict[str, Any]
    changes: str
    prepared: Prepared
    harmless: list[Prompt]
    texts: AnchorTexts | None

    @property
    def step(self) -> int:
        """The optimizer step that it was written after."""
        return int(self.about["step"])


def find(plan: Plan, runtime: Runtime) -> Resumed | None:
    """The newest valid checkpoint of the run in the plan's folder; call on every rank.

    Raises:
        UserError: it is another run's, and `train.overwrite` is not set.
    """
    about = runtime.long_on_main(_newest, plan)  # it reads whole checkpoints
    if about is None:
        return None
    folder = CheckpointFolder(plan.folder.checkpoints).at(about["step"])
    raw = json.loads((folder / checkpoint.PREPARED).read_text(encoding="utf-8"))
    tensors = load_file(folder / WHITENING) if (folder / WHITENING).is_file() else {}
    harmless = [
        dataclasses.replace(prompt, response=response)
        for prompt, response in zip(plan.groups.harmless, raw["responses"], strict=True)
    ]
    texts = None if raw["anchor"] is None else AnchorTexts(**raw["anchor"])
    prepared = Prepared.of(raw["prepared"], tensors)
    return Resumed(folder, about, changes(about, plan), prepared, harmless, texts)


def _newest(plan: Plan) -> dict[str, Any] | None:
    found = CheckpointFolder(plan.folder.checkpoints).newest(
        lambda line: print(f"warning: {line}", flush=True)
    )
    try:
        if found is None:
            check_unchanged(plan.folder, plan.config)
            return None
        check_same_run(found, plan)
    except UserError:
        if plan.config.train.overwrite:
            return None
        raise
    return {key: value for key, value in found.items() if key != "files"}


class Checkpoints:
    """A training loop's checkpoints.

    Args:
        plan: the run.
        runtime: its ranks.
        prepared, harmless, texts: what `prepare` returned.
        wish: how this rank is asked to stop.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        prepared: Prepared,
        harmless: list[Prompt],
        texts: AnchorTexts | None,
        wish: StopWish | None = None,
    ):
        self.settings = plan.config.checkpoint
        self._folder = CheckpointFolder(plan.folder.checkpoints)
        self._stop_file = plan.folder.stop_file
        self._wish = wish
        self._runtime = runtime
        self._identity = runtime.on_main(identity_of, plan)
        self._prepared = prepared
        texts_state = checkpoint.texts_state([prompt.response for prompt in harmless], texts)
        plain = {"prepared": prepared.plain(), **texts_state}
        self._text = json.dumps(plain, default=float)

    def asked_to_stop(self) -> bool:
        """By a signal, or on rank 0 by the folder's STOP file."""
        if self._wish is not None and self._wish.wanted:
            return True
        return self._runtime.is_main and self._stop_file.exists()

    def due(self, step: int) -> bool:
        """It is time to save after optimizer step `step`."""
        return bool(self.settings.every) and step % self.settings.every == 0

    def save(
        self, engine: Any, parts: Mapping[str, Any], step: int, *, asked_to_stop: bool
    ) -> None:
        """Saves after optimizer step `step`; call on every rank.

        Raises:
            RunInterrupted: a rank was asked to stop, and the checkpoint is saved.
            UserError: likewise, and it could not be saved.
        """
        problem = checkpoint.save(
            engine,
            parts,
            step,
            folder=self._folder,
            keep=self.settings.keep,
            prepared=self._write,
            identity=self._identity,
            runtime=self._runtime,
        )
        if problem is not None:
            problem = self._runtime.on_main(checkpoint.failed_to_save, step, problem, self._folder)
            if asked_to_stop:
                raise UserError(f"checkpoint: asked to stop, but {problem}")
            if self._runtime.is_main:
                print(f"warning: {problem}", flush=True)
        elif asked_to_stop:
            if self._runtime.is_main:
                self._stop_file.unlink(missing_ok=True)
            raise RunInterrupted(
                f"stopped after step {step} as asked, with a checkpoint in "
                f"{str(self._folder.path)!r}; the same command again continues"
            )

    def _write(self, folder: Path) -> None:
        (folder / checkpoint.PREPARED).write_text(self._text, encoding="utf-8")
        if self._prepared.whitening:
            save_file(self._prepared.tensors(), folder / WHITENING)
