"""Locks that killed builders of operators leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from es2fast.distributed import operators
from es2fast.distributed.operators import drop_stale_locks

HOLD = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = [tmp_path / folder / "lock" for folder in ("shm", "py311_cpu/adam")]
    for lock in found:
        lock.parent.mkdir(parents=True)
    return found


def test_what_a_killed_builder_leaves_goes_and_a_living_ones_stays(locks: list[Path]) -> None:
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for lock in locks
    ]
    for builder in builders:
        assert builder.stdout is not None and builder.stdout.readline() == b"held\n"
    builders[0].kill()
    builders[0].wait()
    assert drop_stale_locks() == []
    assert [lock.exists() for lock in locks] == [False, True]
    builders[1].communicate()
    assert drop_stale_locks() == [] and not locks[1].exists()


def test_where_other_machines_may_build_they_stay(
    locks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "LOCAL", set())
    locks[0].touch()
    assert drop_stale_locks() == [locks[0]] and locks[0].exists()
