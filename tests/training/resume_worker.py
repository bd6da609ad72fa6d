"""Runs configurations one after the other on the same ranks: `resume_worker.py CONFIG ...`.

One with checkpoint.every=0 is asked to stop after every step, and started again until it is done,
or left alone after STOPS times. LARGEST_FILE, in bytes, stands for a full disk.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys

from es2fast.config import load_config
from es2fast.distributed import runtime as runtimes
from es2fast.errors import RunInterrupted
from es2fast.run.folder import RunFolder
from es2fast.training.run import run_on


def main() -> None:
    paths = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
    runtime = runtimes.start(load_config(paths[0]))
    if "LARGEST_FILE" in os.environ:  # from here on: the operators that were built are larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]),) * 2)
    for path in paths:
        config = load_config(path)
        dtype = runtimes.resolve_dtype(config.model.dtype, runtime.device.type)
        runtime = dataclasses.replace(runtime, dtype=dtype)
        stop = RunFolder(config.output_dir).stop_file
        asked = config.checkpoint.every == 0  # to stop after every step
        starts = 1
        while True:
            if asked and runtime.is_main:
                stop.parent.mkdir(parents=True, exist_ok=True)
                stop.touch()
            try:
                run_on(runtime, config)
                break
            except RunInterrupted:
                if starts == int(os.environ.get("STOPS", "0")):
                    break
                starts += 1
        if runtime.is_main:
            print(f"{config.output_dir} took {starts} starts", flush=True)
    runtimes.stop()


if __name__ == "__main__":
    main()
