"""Groups of ranks, one after the other: `reshard_ranks.py '[[RANKS, STOPS, [CONFIG, ...]], ...]'`.

Each group does what `resume_worker.py` does. Its ranks are forked from this process, which has
imported everything, since that is most of what a launch of tiny models takes.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import deepspeed  # noqa: F401
import peft  # noqa: F401
from resume_worker import main

import es2fast.training.run  # noqa: F401
from es2fast.distributed.launch import free_port


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
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


for ranks, stops, paths in json.loads(sys.argv[1]):
    port = free_port()
    alive = {start(rank, ranks, port, stops, paths) for rank in range(ranks)}
    while alive:
        process, status = os.wait()
        alive.discard(process)
        if status:
            for other in alive:
                os.kill(other, 9)
            sys.exit(1)
