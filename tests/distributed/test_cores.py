"""Ranks on one machine share its cores."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from es2fast.distributed.cores import cores, ranks_here, settle, share

OWN = sorted(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(cores()) < 2, reason="needs two cores that this process may use")


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_logical_cpus_of_a_core_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5, 7})
    assert cores(tmp_path) == [[0, 4], [1, 5], [2], [3, 7]]
    assert cores(tmp_path / "unknown") == [[0], [1], [2], [3], [4], [5], [7]]


def test_ranks_share_no_core_and_have_as_many() -> None:
    every = [[i, i + 7] for i in range(7)]
    parts = [share(every, rank, 3) for rank in range(3)]
    assert parts == [every[:2], every[2:4], every[4:6]]
    assert share(every, 9, 10) == every


def test_ranks_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_here() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's
    assert ranks_here() == 4
    monkeypatch.setenv("LOCAL_SIZE", "2")  # DeepSpeed's
    assert ranks_here() == 2


def settled(
    rank: int, ranks: int, bind: bool = True, cpus: list[int] = OWN, threads: str = ""
) -> tuple[list[int], int]:
    """CPUs and threads of a process that settles as a rank, started on `cpus`."""

    def child(answers: Any) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads:
            os.environ["OMP_NUM_THREADS"] = threads
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(7)
        settle(rank, ranks, bind)
        answers.put((sorted(os.sched_getaffinity(0)), torch.get_num_threads()))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    process.join()
    return answers.get()


@several
def test_a_rank_is_bound_to_its_share_alone() -> None:
    half = len(cores()) // 2
    first, second = settled(0, 2), settled(1, 2)
    assert not set(first[0]) & set(second[0])
    assert set(first[0] + second[0]) <= set(OWN)
    assert first[1] == second[1] == half and len(first[0]) >= half
    assert settled(0, 1)[0] == OWN


@several
def test_what_is_said_elsewhere_counts() -> None:
    assert settled(1, 2, bind=False) == (OWN, len(cores()) // 2)
    assert settled(1, 2, threads="7")[1] == 7
    bound = settled(1, 2, cpus=OWN[:1])  # as `deepspeed --bind_cores_to_rank` does
    assert bound[0] == [OWN[0]]
    assert settled(0, len(OWN) + 1)[0] == OWN
