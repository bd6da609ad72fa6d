"""Starts `es2fast.train` under the real `deepspeed` launcher on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from es2fast.distributed.runtime import resolve_device
from es2fast.errors import STOPPED, RunStopped, UserError


def launch(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    ranks: int | None = None,
    device: str = "auto",
    log: Path | None = None,
) -> None:
    """Runs the training in `rank_count(ranks, device)` processes and waits.

    Args:
        config: YAML file of the run.
        overrides: `key=value`.
        ranks: processes; default: see `rank_count`.
        device: "auto", "cpu" or "cuda".
        log: file for what they print; default: here.

    Raises:
        UserError: more ranks than GPUs; the training failed (its own message is above, or in
            `log`).
        RunStopped: a safeguard ended it.
    """
    resolved = resolve_device(device)
    count = rank_count(ranks, device)
    environment = dict(os.environ)
    if resolved == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--log_level", "warning", "--num_gpus", str(count), "--master_port", str(free_port())),
        *("--module", "es2fast.train", "--config", str(config), *overrides),
    ]
    code = _run(command, environment, log)
    if code != 0:
        kind = RunStopped if code == STOPPED else UserError
        where = "above" if log is None else str(log)
        raise kind(f"train: the deepspeed launcher ended with code {code}; see {where}")


def _run(command: list[str], environment: dict[str, str], log: Path | None) -> int:
    if log is None:
        return subprocess.run(command, env=environment, check=False).returncode
    with log.open("wb") as file:
        done = subprocess.run(
            command, env=environment, check=False, stdout=file, stderr=subprocess.STDOUT
        )
    return done.returncode


def rank_count(wanted: int | None, device: str) -> int:
    """Processes to start: as wanted, else one per GPU, else up to 2 on a CPU.

    Raises:
        UserError: more than there are GPUs.
    """
    import torch

    if resolve_device(device) == "cpu":
        return wanted or min(2, _cores())
    available = torch.cuda.device_count()
    if wanted is not None and wanted > available:
        raise UserError(f"--ranks: {wanted} asked for, this machine has {available} GPUs")
    return wanted or available


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
