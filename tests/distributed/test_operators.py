"""Locks that killed builders of operators leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
)
def test_a_builder_outside_of_the_container_is_seen(locks: list[Path]) -> None:
    locks[1].touch()
    with locks[0].open("xb"):
        look = "from es2fast.distributed.operators import *; print(drop_stale_locks())"
        done = subprocess.run(
            ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", look],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == "[]\n", done.stderr
        assert [lock.exists() for lock in locks] == [True, False]


def test_ranks_that_look_at_once_do_not_take_each_other_for_a_builder(locks: list[Path]) -> None:
    for lock in locks:
        lock.touch()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: drop_stale_locks(), range(8))) == [[]] * 8
    assert not any(lock.exists() for lock in locks)


def test_where_other_machines_may_build_they_stay(
    locks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "LOCAL", set())
    locks[0].touch()
    assert drop_stale_locks() == [locks[0]] and locks[0].exists()
