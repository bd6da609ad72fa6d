"""Starts processes on this machine: `es2fast.train` under the real `deepspeed` launcher, an
evaluation under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from es2fast.distributed.cores import cores
from es2fast.distributed.interrupt import LIFELINE, SIGNALS, lifeline
from es2fast.distributed.runtime import resolve_device
from es2fast.errors import STOPPED, RunInterrupted, RunStopped, UserError
from es2fast.run.folder import RunFolder

VISIBLE = "CUDA_VISIBLE_DEVICES"


def launch_to_end(config: Path, folder: RunFolder, **options: Any) -> None:
    """`launch`, for what goes on with the trained model.

    Args:
        config: YAML file of the run.
        folder: the run's, `output_dir`.
        options: of `launch`.

    Raises:
        RunInterrupted: the training was asked to stop before its end.
        UserError, RunStopped: see `launch`.
    """
    launch(config, **options)
    if not folder.finished:
        raise RunInterrupted(
            f"the training in {str(folder.path)!r} was asked to stop; the same command again "
            "continues"
        )


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
        RunInterrupted: the launcher was ended, as by Ctrl-C before it had started any rank.
    """
    resolved = resolve_device(device)
    count = rank_count(ranks, device)
    environment = dict(os.environ)
    if resolved == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(cores()) // count)))
    places = ["--num_gpus", str(count)]
    if resolved == "cuda" and (visible := environment.pop(VISIBLE, None)) is not None:
        places = included(visible, count)
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"),
        *(*places, "--master_port", str(free_port())),
        *("--module", "es2fast.train", "--config", str(config), *overrides),
    ]
    code = _run(command, environment, log)
    if code in (-signal.SIGINT, -signal.SIGTERM):
        raise RunInterrupted("train: the launcher was ended; the same command starts or continues")
    if code != 0:
        kind = RunStopped if code == STOPPED else UserError
        where = "above" if log is None else str(log)
        raise kind(f"train: the deepspeed launcher ended with code {code}; see {where}")


def included(visible: str, count: int) -> list[str]:
    """The launcher's options for the first `count` GPUs that the variable names. It would ignore
    the variable beside a number of GPUs, and take those that come first on the machine.

    Raises:
        UserError: they are not named by numbers.
    """
    chosen = [name.strip() for name in visible.split(",")][:count]
    if not all(name.isdigit() for name in chosen):
        raise UserError(
            f"{VISIBLE}: {visible!r} names GPUs otherwise than by numbers, which is all that the "
            "deepspeed launcher knows; give their numbers, as nvidia-smi -L lists them"
        )
    return ["--include", f"localhost:{','.join(chosen)}"]


def launch_evaluation(folder: Path, processes: int) -> None:
    """Attacks base and tuned model of a run in processes that share the prompts, and waits.

    Args:
        folder: of the finished run, where the report is written.
        processes: each with the whole model, on a GPU of its own where there are any.

    Raises:
        UserError: it failed (its own message is above).
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(processes), "-m", "es2fast.cli", "evaluate", str(folder)),
    ]
    code = _run(command, dict(os.environ), None)
    if code != 0:
        raise UserError(f"evaluate: torchrun ended with code {code}; see above")


def _run(command: list[str], environment: dict[str, str], log: Path | None) -> int:
    """The launcher's exit code. Signals that ask this process to stop go to the ranks, and the
    ranks end with this process, however it ends."""
    with ExitStack() as stack:
        environment[LIFELINE] = stack.enter_context(
            lifeline(stack.enter_context(tempfile.TemporaryDirectory(prefix="es2fast-")))
        )
        file = None if log is None else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=None if file is None else subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes here alone
        )
        stack.enter_context(_passing_on(process))
        return process.wait()


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While this lasts, SIGNALS go to the ranks below `process`, or end it while there are none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks = _ranks(process.pid)
        for pid in ranks or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    import psutil

    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                words = child.cmdline()
                if "es2fast.train" in words and any(w.startswith("--local_rank") for w in words):
                    found.append(child.pid)
    return found


def rank_count(wanted: int | None, device: str) -> int:
    """Processes to start: as wanted, else one per GPU, else up to 2 on a CPU.

    Raises:
        UserError: more than there are GPUs.
    """
    import torch

    if resolve_device(device) == "cpu":
        return wanted or min(2, len(cores()))
    available = torch.cuda.device_count()
    if wanted is not None and wanted > available:
        raise UserError(f"--ranks: {wanted} asked for, this machine has {available} GPUs")
    return wanted or available


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
