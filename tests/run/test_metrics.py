"""Metrics go to their file and to the trackers that were asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from es2fast.config import parse_config
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import MetricsWriter, read_metrics


class Tracker(ModuleType):
    """What W&B and trackio offer, writing down what it is asked; the real ones need an account or
    a server."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []

    def init(self, *, project: str, name: str, config: dict[str, Any]) -> None:
        self.calls.append(("init", project, name, config["train"]["lr"]))

    def log(self, row: dict[str, Any], *, step: int) -> None:
        self.calls.append(("log", step, row))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    train = {"report_to": [name], "lr": 3e-4}
    config = parse_config({"model": {"name": "m"}, "train": train})
    folder = RunFolder(tmp_path / "mine")
    folder.path.mkdir()
    writer = MetricsWriter(folder, config, main=True, steps=2)
    for step, kl in ((1, 0.5), (2, float("nan"))):
        writer.log({"step": step, "kl": kl})
    writer.close()
    assert tracker.calls == [
        ("init", "es2fast", "mine", 3e-4), ("log", 1, {"kl": 0.5}), ("log", 2, {"kl": None}),
        ("finish",),
    ]  # fmt: skip
    assert read_metrics(folder.metrics) == [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, parse_config({"model": {"name": "m"}}), main=False, steps=1)
    writer.log({"step": 1, "kl": 0.5})
    writer.close()
    assert not folder.metrics.exists()
