"""Where numbers go while training: metrics.jsonl always, trackers when asked, a bar on rank 0; and
how they are read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es2fast.config import Config, TrainConfig
from es2fast.errors import UserError
from es2fast.progress import tqdm
from es2fast.run.files import append_line, read_lines, write_text
from es2fast.run.folder import RunFolder


class MetricsWriter:
    """Rank 0's record of a run; on other ranks every call does nothing.

    Args:
        folder, config: of the run.
        main: this is rank 0.
        steps: optimizer steps in all.
        done: those before this process, in a run that goes on.

    Raises:
        UserError: a tracker of `train.report_to` cannot be imported.
    """

    def __init__(self, folder: RunFolder, config: Config, *, main: bool, steps: int, done: int = 0):
        self._main = main
        self._path = folder.metrics
        self._trackers: list[Any] = []
        if not main:
            return
        self._bar = tqdm(total=steps, initial=done, desc="es2", unit="step", dynamic_ncols=True)
        self._trackers = [_tracker(name, folder, config) for name in config.train.report_to]

    def log(self, row: dict[str, Any]) -> None:
        """One optimizer step's numbers; `step` counts from 1."""
        if not self._main:
            return
        clean = {k: None if _is_broken(v) else v for k, v in row.items()}
        append_line(self._path, clean)
        for tracker in self._trackers:
            tracker.log(clean)

    def tick(self, row: dict[str, Any]) -> None:
        """Moves the bar by one step."""
        if self._main:
            words = f"loss {row['loss']:.3g} sep {row['sep']:.3g} kl {row['kl']:.2g}"
            if "refusal" in row:
                words += f" refusal {row['refusal']:.2g}"
            if "refusal_top1" in row:
                words += f" ({row['refusal_top1']:.0%} first tokens)"
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update()

    def close(self) -> None:
        if not self._main:
            return
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, ascending by step; empty when there is no such file. Those of a mean
    of runs (`es2fast average`) have the `seed` of the run that each is of.

    A line cut off by a crash is skipped, and a step that a resumed run logged again counts once,
    with its last values.
    """
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for index, row in enumerate(read_lines(Path(path))):
        step, seed = row.get("step"), row.get("seed", 0)
        rows[step if isinstance(step, int) else index, seed if isinstance(seed, int) else 0] = row
    return [rows[place] for place in sorted(rows)]


def metrics_of_parts(parts: Mapping[int, Path]) -> str:
    """What the metrics.jsonl of a mean holds: the rows of its runs, whose files are given by seed,
    each with its seed; nothing of a run whose file is gone."""
    rows = [{"seed": seed, **row} for seed, path in parts.items() for row in read_metrics(path)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def cut_metrics(path: Path, step: int) -> None:
    """Leaves the rows up to a step, each once, where a run goes on after it."""
    if path.is_file():
        rows = [row for row in read_metrics(path) if row.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _is_broken(value: Any) -> bool:
    """JSON has no NaN and no infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def check_trackers(train: TrainConfig) -> None:
    """UserError when a tracker of `train.report_to` cannot be imported."""
    from importlib import import_module

    for name in train.report_to:
        try:
            import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except Exception as error:  # of an old one or of what it needs: any
            raise UserError(
                f"train.report_to: {name!r} cannot be imported ({error}); pip install -U {name}"
            ) from error


class _TensorBoard:
    def __init__(self, folder: RunFolder):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.tensorboard))

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _WandbLike:
    """W&B, and trackio, which has the same calls."""

    def __init__(self, module: Any, folder: RunFolder, config: Config):
        self._module = module
        module.init(project="es2fast", name=folder.path.name, config=config.model_dump(mode="json"))

    def log(self, row: dict[str, Any]) -> None:
        self._module.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self._module.finish()


def _tracker(name: str, folder: RunFolder, config: Config) -> Any:
    if name == "tensorboard":
        return _TensorBoard(folder)
    import importlib

    return _WandbLike(importlib.import_module(name), folder, config)
