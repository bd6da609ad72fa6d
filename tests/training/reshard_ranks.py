"""Groups of ranks, one after the other: `reshard_ranks.py '[[RANKS, STOPS, [CONFIG, ...]], ...]'`.

Each group does what `resume_worker.py` does. Its ranks are forked from this process, which has
imported everything, since that is most of what a launch of tiny models takes. `[0, 0, [RUN, COPY]]`
copies an unfinished run of stage 0 without what its optimizer has gathered. `[-BYTES, 0, [CONFIG]]`
is one rank whose files may not be larger; what it says, and which checkpoints it leaves, goes to
`CONFIG.refused`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch
from resume_worker import main

import es2fast.training.run  # noqa: F401
from es2fast.config import load_config
from es2fast.distributed.launch import free_port
from es2fast.errors import UserError
from es2fast.run.checkpoints import CheckpointFolder, files_of, read_manifest, seal


def start(rank: int, ranks: int, port: int, stops: int, paths: list[str]) -> int:
    """The process id of one rank."""
    if child := os.fork():
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "STOPS": str(stops),
    }  # fmt: skip
    sys.argv[1:] = paths
    try:
        main()
    except BaseException as error:
        if not (isinstance(error, UserError) and "LARGEST_FILE" in os.environ):
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        folder = Path(load_config(paths[0]).output_dir) / "checkpoints"
        left = sorted(place.name for place in folder.iterdir())
        Path(f"{paths[0]}.refused").write_text(json.dumps([str(error), left]))
    sys.stdout.flush()
    os._exit(0)


def forget(run: Path, copy: Path) -> None:
    """The copy has a valid checkpoint with moments that are 0."""
    shutil.copytree(run, copy)
    folder = CheckpointFolder(copy / "checkpoints")
    step = folder.steps()[0]
    about = read_manifest(folder.at(step))
    partial = folder.at(step).rename(folder.at(step).with_suffix(".tmp"))
    path = partial / "engine" / "mp_rank_00_model_states.pt"
    held = torch.load(path, weights_only=False)
    for state in held["optimizer"]["state"].values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    torch.save(held, path)
    (partial / "manifest.json").unlink()
    folder.commit(step, seal(partial, files_of(partial)), about)


for ranks, stops, paths in json.loads(sys.argv[1]):
    if not ranks:
        forget(*map(Path, paths))
        continue
    os.environ.pop("LARGEST_FILE", None)
    if ranks < 0:
        os.environ["LARGEST_FILE"], ranks = str(-ranks), 1
    port = free_port()
    alive = {start(rank, ranks, port, stops, paths) for rank in range(ranks)}
    while alive:
        process, status = os.wait()
        alive.discard(process)
        if status:
            for other in alive:
                os.kill(other, 9)
            sys.exit(1)
