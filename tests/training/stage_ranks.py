"""Real processes plan one run on machines of unequal memory; started by test_stage.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from es2fast.config import load_config
from es2fast.distributed import memory
from es2fast.distributed.runtime import stop
from es2fast.training.plan import make_plan


def worker(rank: int, available: list[int], folder: str) -> None:
    """Plans FOLDER/run.yaml where available[rank] bytes are free; stages to FOLDER/rank.json."""
    torch.set_num_threads(1)
    memory.MEMINFO = Path(folder) / f"meminfo-{rank}"
    memory.CONTAINER = ()  # this machine's own limit
    memory.MEMINFO.write_text(f"MemAvailable: {available[rank] // 1024} kB\n")
    config = load_config(f"{folder}/run.yaml")
    alone = make_plan(config, world_size=len(available)).zero_stage
    store = dist.FileStore(f"{folder}/store", len(available))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(available))
    plan = make_plan(config, world_size=len(available))
    found = {"alone": alone, "stage": plan.zero_stage, "line": plan.why_stage}
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    stop()
