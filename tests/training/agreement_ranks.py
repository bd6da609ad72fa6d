"""Real processes that may have been started with different runs; started by test_agreement.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from es2fast.config import load_config
from es2fast.distributed.runtime import Runtime, stop
from es2fast.errors import UserError
from es2fast.training.agreement import check_agreement
from es2fast.training.plan import make_plan


def worker(rank: int, cases: list[list[str]], folder: str) -> None:
    """Plans run.yaml of FOLDER/cases[i][rank], as on a node of its own, for one case after the
    other; what is said goes to FOLDER/rank.txt, a line per case."""
    torch.set_num_threads(1)
    ranks = len(cases[0])
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    runtime = Runtime(rank=rank, world_size=ranks, device=torch.device("cpu"), dtype="fp32")
    said = []
    for nodes in cases:
        os.chdir(Path(folder) / nodes[rank])
        try:
            check_agreement(make_plan(load_config("run.yaml"), world_size=ranks), runtime)
            said.append("agreed")
        except UserError as error:
            said.append(str(error))
    Path(f"{folder}/{rank}.txt").write_text("\n".join(said))
    stop()
