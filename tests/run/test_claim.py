"""Whose folder it is: nothing of the user's is replaced, and a run keeps others out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from es2fast.config import Config, parse_config, save_config
from es2fast.errors import UserError
from es2fast.run.claim import Lock, check_claim, check_unchanged
from es2fast.run.folder import RunFolder


def config_of(out: Path | str, **changes: Any) -> Config:
    return parse_config({"model": {"name": "m"}, "output_dir": str(out)} | changes)


def started(out: Path, **changes: Any) -> RunFolder:
    """A run that has begun."""
    folder = RunFolder(out)
    Lock(folder).release()
    save_config(config_of(out, **changes), folder.config)
    return folder


@pytest.mark.parametrize("name", ["report.json", "tensorboard", "train.json", "last_good", "model"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_users_folder_is_left_alone(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    config = config_of(tmp_path, train={"overwrite": overwrite})
    with pytest.raises(UserError, match=f"holds {name}, which no run of es2fast wrote"):
        check_claim(RunFolder(tmp_path), config)
    assert (tmp_path / name / "mine").read_text() == "mine"


def test_no_name_is_no_folder() -> None:
    with pytest.raises(UserError, match="output_dir: is blank; name a folder"):
        config_of("")


@pytest.mark.parametrize("place", ["", "model", "previous/model"])
def test_the_base_model_is_not_replaced(tmp_path: Path, place: str) -> None:
    folder = started(tmp_path / "run")
    (folder.path / place).mkdir(parents=True, exist_ok=True)
    config = config_of(folder.path, model={"name": str(folder.path / place)})
    with pytest.raises(UserError, match=r"holds model\.name"):
        check_claim(folder, config)


def test_unfinished_runs_go_on_when_they_are_the_same(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    assert check_claim(folder, config_of(folder.path, evaluate={"limit": 7}))
    with pytest.raises(UserError, match=r"another train.lr \(5e-05 there, 0.1 now\)"):
        check_claim(folder, config_of(folder.path, train={"lr": 0.1}))
    assert not check_claim(folder, config_of(folder.path, train={"lr": 0.1, "overwrite": True}))
    with pytest.raises(UserError, match="already holds a run"):
        check_claim(folder, config_of(folder.path, checkpoint={"resume": "never"}))
    folder.model.mkdir()
    folder.summary.write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        check_claim(folder, config_of(folder.path))


def test_an_unfinished_run_may_share_its_batches_otherwise(tmp_path: Path) -> None:
    """Whether it goes on is decided by its checkpoint; without one it does not."""
    folder = started(tmp_path / "run", deepspeed="zero2")
    other = config_of(
        folder.path,
        deepspeed="zero3",
        train={"micro_batch_size": 2, "gradient_accumulation": 2, "global_batch_size": 8},
    )
    assert check_claim(folder, other)
    with pytest.raises(UserError, match=r"another train\.micro_batch_size .*deepspeed \(zero2"):
        check_unchanged(folder, other)
    with pytest.raises(UserError, match=r"another deepspeed \(zero2 there, zero3_offload now\)"):
        check_claim(folder, config_of(folder.path, deepspeed="zero3_offload"))


def test_a_run_from_before_the_marker_is_ours(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_config(config_of(tmp_path), folder.config)
    folder.metrics.write_text("")
    assert check_claim(folder, config_of(tmp_path))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    lock = Lock(RunFolder(tmp_path))
    with pytest.raises(UserError, match="is in use by process"):
        Lock(RunFolder(tmp_path))
    lock.release()
    Lock(RunFolder(tmp_path)).release()


def test_a_claim_that_was_killed_loses_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.previous.with_suffix(".tmp") / "model").mkdir(parents=True)
    (folder.previous.with_suffix(".tmp") / "model/w").write_text("earlier")
    folder.summary.write_text("{}")
    folder.claim()
    assert (folder.previous / "model/w").read_text() == "earlier"
    assert (folder.previous / "train.json").is_file() and not folder.model.exists()
