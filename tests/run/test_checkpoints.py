"""Checkpoints on disk: names, manifest, damage, what is pruned."""

from __future__ import annotations

from pathlib import Path

import pytest

from es2fast.run.checkpoints import CheckpointFolder, files_of, seal


def write(folder: CheckpointFolder, step: int) -> None:
    partial = folder.begin(step)
    (partial / "engine").mkdir()
    (partial / "engine/a.pt").write_bytes(b"weights %d" % step)
    (partial / "state.json").write_text("{}")
    folder.commit(step, seal(partial, files_of(partial)), {"ranks": 1})


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    found = CheckpointFolder(tmp_path / "checkpoints")
    for step in (2, 10, 100):
        write(found, step)
    return found


def newest(folder: CheckpointFolder) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    found = folder.newest(lines.append)
    return (None if found is None else found["step"]), lines


def test_the_newest_is_taken_and_as_many_stay_as_asked(folder: CheckpointFolder) -> None:
    assert folder.steps() == [100, 10, 2]
    assert newest(folder) == (100, [])
    folder.prune(2)
    assert folder.steps() == [100, 10]


@pytest.mark.parametrize("how", ["changed", "cut", "lost", "no manifest"])
def test_a_damaged_one_is_named_and_the_one_before_taken(
    folder: CheckpointFolder, how: str
) -> None:
    broken = folder.at(100) / "engine/a.pt"
    if how == "changed":
        broken.write_bytes(b"weights 101")
    elif how == "cut":
        broken.write_bytes(b"weights")
    elif how == "lost":
        broken.unlink()
    else:
        broken = folder.at(100) / "manifest.json"
        broken.write_text("{")
    step, lines = newest(folder)
    assert step == 10 and len(lines) == 1
    assert "step 100" in lines[0] and str(broken) in lines[0]
    if how in ("cut", "lost", "no manifest"):  # what sizes tell
        folder.prune(1)
        assert folder.steps() == [100, 10, 2]


def test_what_a_killed_writer_leaves_is_not_read(folder: CheckpointFolder) -> None:
    partial = folder.begin(200)
    (partial / "half").write_text("x")
    assert newest(folder)[0] == 100
    other = folder.begin(300)
    assert not partial.exists() and other.exists()
    folder.drop_unfinished()
    assert [p.name for p in folder.path.iterdir() if p.suffix] == []
