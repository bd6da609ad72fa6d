"""Devices, precision and the locks that make a launch hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from deepspeed.launcher import runner

from es2fast.distributed.launch import free_port, included
from es2fast.distributed.runtime import Runtime, resolve_device, resolve_dtype
from es2fast.errors import UserError


def test_devices_and_precision() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_dtype("auto", "cpu") == "fp32"
    assert resolve_dtype("auto", "cuda") == "bf16"
    assert resolve_dtype("bf16", "cpu") == "bf16"
    if not torch.cuda.is_available():
        assert resolve_device("auto") == "cpu"
        with pytest.raises(UserError, match=r"train\.device"):
            resolve_device("cuda")


def test_long_work_is_waited_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es2fast.distributed.runtime.MINUTE", 0.01)
    alone = Runtime(0, 1, torch.device("cpu"), "fp32")

    def work(seconds: float) -> str:
        time.sleep(seconds)
        if not seconds:
            raise UserError("no time")
        return "done"

    assert alone.long_on_main(work, 0.05) == "done"
    with pytest.raises(UserError, match="no time"):
        alone.long_on_main(work, 0.0)


@pytest.mark.parametrize(
    ("visible", "count", "places"),
    [("2,3", 2, ["--include", "localhost:2,3"]), ("5, 1,0", 2, ["--include", "localhost:5,1"])],
)
def test_ranks_go_to_the_gpus_that_are_visible(visible: str, count: int, places: list[str]) -> None:
    assert included(visible, count) == places
    given = runner.parse_args([*places, "train.py"])
    pool = runner.parse_inclusion_exclusion({"localhost": 8}, given.include, given.exclude)
    assert sorted(pool["localhost"]) == sorted(int(n) for n in visible.split(",")[:count])
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES: 'GPU-1f' names GPUs otherwise than"):
        included("GPU-1f", 1)


JOIN = """
import torch, torch.distributed as dist
from es2fast.config import parse_config
from es2fast.distributed.runtime import start, stop
runtime = start(parse_config({"model": {"name": "m"}, "train": {"device": "cpu"}}))
import deepspeed
total = torch.full((1000,), float(runtime.rank + 1))
deepspeed.comm.all_reduce(total)
assert total.eq(3.0).all()
stop()
"""


@pytest.mark.slow
def test_ranks_leave_no_shared_memory_behind() -> None:
    port = str(free_port())
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                                "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                                "LOCAL_SIZE": "2"}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "-c", JOIN], stderr=subprocess.PIPE, text=True,
                         env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert not [path for path in Path("/dev/shm").iterdir() if f"_{port}_" in path.name]
