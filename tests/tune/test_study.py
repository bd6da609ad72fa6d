"""The study in a folder: what is refused, what a lost worker leaves, the front and a pick."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from es2fast.cli import app
from es2fast.config import parse_config, save_config
from es2fast.errors import UserError
from es2fast.tune.front import front, pick, print_front, save_front
from es2fast.tune.space import DEFAULT
from es2fast.tune.study import WORKER, StudyFolder, _begun, claim, open_study, place, requeue_lost
from es2fast.tune.trial import RECIPE

optuna = pytest.importorskip("optuna")
FOUND = {"attack": "prefill", "n": 20, "base_worst": 0.9, "refused": 0.1, "base_refused": 0.0,
         "kl": 0.01}  # fmt: skip


def add(study: Any, worst: float, damage: float) -> None:
    attributes = FOUND | {"worst": worst, "damage": damage}
    lr = {"train.lr": optuna.distributions.FloatDistribution(1e-5, 1.0)}
    made = optuna.trial.create_trial(
        params={"train.lr": 1e-3}, distributions=lr, values=[worst, damage], user_attrs=attributes
    )
    study.add_trial(made)


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lost_workers_trial_is_queued_again_and_counts_once(tmp_path: Path) -> None:
    study = open_study(StudyFolder(tmp_path), create=True)
    lost, alive = study.ask(), study.ask()
    value = lost.suggest_float("train.lr", 1e-5, 1e-3)
    lost.set_user_attr(WORKER, f"{socket.gethostname()}:{dead_process()}")
    alive.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
    again = open_study(StudyFolder(tmp_path))  # as the next call sees it
    assert _begun(again) == 2
    requeue_lost(again)
    assert [trial.state.name for trial in again.trials] == ["FAIL", "RUNNING", "WAITING"]
    assert _begun(again) == 1
    requeue_lost(again)
    assert len(again.trials) == 3
    taken = again.ask()
    assert taken.number == 2 and taken.suggest_float("train.lr", 1e-5, 1e-3) == value
    assert _begun(again) == 2
    taken.set_user_attr(WORKER, f"{socket.gethostname()}:{dead_process()}")  # lost once more
    requeue_lost(again)
    assert [place(trial) for trial in again.trials] == [0, 1, 0, 0]  # it goes on in its folder


def test_another_search_is_refused(tmp_path: Path) -> None:
    folder, space = StudyFolder(tmp_path / "out"), tmp_path / "space.yaml"
    space.write_text("train.lr: {low: 1, high: 2}\n")
    config = parse_config({"model": {"name": "m"}})
    claim(folder, config, space)
    claim(folder, config, space)
    with pytest.raises(UserError, match=r"another search \(tune\.yaml differs\)"):
        claim(folder, parse_config({"model": {"name": "other"}}), space)
    space.write_text("train.lr: {low: 1, high: 3}\n")
    with pytest.raises(UserError, match=r"another search \(space\.yaml differs\)"):
        claim(folder, config, space)


def test_the_front_is_what_nothing_beats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = StudyFolder(tmp_path)
    study = open_study(folder, create=True)
    for worst, damage in ((0.9, 0.1), (0.5, 0.5), (0.5, 0.8), (0.1, 3.0), (0.95, 0.2)):
        add(study, worst, damage)
    assert [trial.number for trial in front(study)] == [3, 1, 0]
    print_front(study)
    printed = capsys.readouterr().out
    assert "50 % [30–70] of 20" in printed and "5 complete" in printed and "0.80" not in printed
    assert "trial 3: train.lr=0.001" in printed
    save_front(study, folder.front)
    assert folder.front.read_bytes().startswith(b"\x89PNG")
    config = parse_config({"model": {"name": "m"}, "train": {"lr": 3e-4, "overwrite": True}})
    folder.trial(3).mkdir(parents=True)
    save_config(config, folder.trial(3) / RECIPE)
    picked = yaml.safe_load(pick(study, folder, 3).read_text())
    assert picked["train"]["lr"] == 3e-4 and picked["output_dir"] == str(tmp_path / "pick-3")
    assert picked["train"]["overwrite"] is False  # of the trials alone
    with pytest.raises(UserError, match=r"--pick: trial 9 has no result; those with one: 0, 1, 2"):
        pick(study, folder, 9)


def test_the_front_is_shown_without_options(tmp_path: Path) -> None:
    study = open_study(StudyFolder(tmp_path), create=True)
    add(study, 0.5, 0.5)
    shown = CliRunner().invoke(app, ["tune", str(tmp_path)])
    assert shown.exit_code == 0 and "1 complete" in shown.output
    for more in (["--steps", "3"], ["train.lr=1"], ["--harmful", "x.csv"]):
        refused = CliRunner().invoke(app, ["tune", str(tmp_path), *more])
        assert isinstance(refused.exception, UserError)
        assert "is the folder of a search" in str(refused.exception)


def test_a_folder_without_a_search(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no search"):
        open_study(StudyFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_journal_and_folders_of_others(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.journal.write_text("no journal\n")
    with pytest.raises(UserError, match=r"journal\.log' is damaged"):
        open_study(folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model or a run; choose another folder"):
        claim(folder, parse_config({"model": {"name": "m"}}), DEFAULT)
    assert not folder.config.exists()
