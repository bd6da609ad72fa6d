"""Kills a tiny training at random instants, again and again, and looks at how it ends:

    python tests/launcher/kill_soak.py --kills 50 [--ranks 2 1] [--seed 0]

A run saves after every step. SIGKILL takes rank 0, rank 1, the launcher or all of them: a fifth of
the time while they start, three tenths after some progress of the training, half up to 0.1 s after
a checkpoint begins to be written. The next start goes on, with a number of ranks drawn from
--ranks, until the run is finished; then the next begins. Each must end in the weights of a run that
nobody disturbed: bit for bit with one number of ranks, to fp32 rounding where that changes (its
kills also hit conversions). Ranks are forked from this process, which has imported everything, by a
launcher of its own that ends all when one ends.
Prints a line per kill and a summary; leaves with 1 at the first run that ends otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed  # noqa: F401
import psutil
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny, write_prompts

import es2fast.training.run  # noqa: F401
from es2fast.distributed.launch import free_port
from es2fast.run.checkpoints import CheckpointFolder, damage
from es2fast.run.folder import RunFolder
from es2fast.train import main as train_main

STEPS = 6
PAIRS = 2  # per step
SAVING = 0.1  # seconds from the first file of a checkpoint, at most
VICTIMS = ("rank 0", "rank 1", "launcher", "all")


def configured(work: Path, name: str) -> Path:
    """The run's file; its batch is set on the command line."""
    config: dict[str, Any] = {
        "model": {"name": str(work / "model"), "dtype": "fp32"},
        "data": write_prompts(work / "data") | {"cache_dir": str(work / "cache")},
        "layers": [1, 2],
        "separation": {"bank": 4},
        "train": {"steps": STEPS, "lr": 1e-3, "warmup_ratio": 0.0, "device": "cpu"},
        "deepspeed": "zero3",
        "checkpoint": {"every": 1},
        "output_dir": str(work / name),
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def forked(work: Callable[[], int], log: Path) -> int:
    """The process id of a child that does the work, and says into the log what it says."""
    if child := os.fork():
        return child
    code = 1
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def launcher(path: Path, ranks: int, log: Path) -> int:
    """Starts the ranks, ends them all when one fails; 0 when all are well."""
    port = free_port()

    def train(rank: int) -> int:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        batch = f"train.micro_batch_size={PAIRS // ranks}"
        return train_main(["--config", str(path), f"--local_rank={rank}", batch])

    alive = [forked(partial(train, rank), log) for rank in range(ranks)]
    while alive:
        process, status = os.wait()
        alive.remove(process)
        if status:
            for other in alive:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def started(path: Path, ranks: int, log: Path) -> psutil.Process:
    return psutil.Process(forked(partial(launcher, path, ranks, log), log))


def ended(process: psutil.Process, seconds: float) -> bool:
    """The launcher has ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(process.pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    return False


def reached(process: psutil.Process, event: Callable[[], bool], seconds: float) -> None:
    """Waits until the event has happened or the launcher has ended.

    Raises:
        TimeoutError: neither did.
    """
    deadline = time.monotonic() + seconds
    while not (event() or process.status() == psutil.STATUS_ZOMBIE):
        if time.monotonic() > deadline:
            kill(process, "all")
            raise TimeoutError(f"nothing happened in {seconds:.0f} s")
        time.sleep(0.002)


def progress(run: Path) -> Callable[[], bool]:
    """A line of metrics was written after this call."""
    before: list[int] = []

    def event() -> bool:
        path = run / "metrics.jsonl"
        lines = len(path.read_bytes().splitlines()) if path.is_file() else 0
        before.append(min([lines, *before[-1:]]))  # a resumed run cuts lines off
        return lines > before[-1]

    event()
    return event


def writing(run: Path, since: float) -> Callable[[], bool]:
    """A checkpoint, saved or converted, is being written."""

    def event() -> bool:
        for path in run.glob("checkpoints/step-*.tmp"):
            with contextlib.suppress(OSError):  # it may get its name meanwhile
                if path.stat().st_mtime >= since:
                    return True
        return False

    return event


def kill(process: psutil.Process, victim: str) -> list[psutil.Process]:
    """SIGKILL; the processes that have to be gone soon."""
    ranks = process.children()
    if victim == "launcher":
        doomed = [process]
    elif victim == "all":
        doomed = [process, *ranks]
    else:
        doomed = ranks[min(int(victim[-1]), len(ranks) - 1) :][:1] or [process]
    for one in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    return ranks


def place(run: Path, since: float) -> str:
    """What a kill interrupted, from what it left of what was written since then."""
    left = {
        path.stem for path in run.glob("checkpoints/step-*.tmp") if path.stat().st_mtime >= since
    }
    if "step-converted" in left:
        return "converting"
    if left:
        return "saving"
    done = any(CheckpointFolder(run / "checkpoints").steps())
    return "between" if done else "before the first checkpoint"


def problem_of(run: Path) -> str | None:
    """A checkpoint that has its name but is not whole, or metrics that are not steps 1, 2, 3, ...;
    only the last line may be torn, and the next start cuts it off."""
    path = run / "metrics.jsonl"
    whole = [line for line in path.open("rb") if line.endswith(b"\n")] if path.is_file() else []
    if (steps := [json.loads(line)["step"] for line in whole]) != list(range(1, len(whole) + 1)):
        return f"{path} has steps {steps}"
    folder = CheckpointFolder(run / "checkpoints")
    problems = (damage(folder.at(step)) for step in folder.steps())
    return next((problem for problem in problems if problem is not None), None)


def weights(run: Path) -> torch.Tensor:
    found = load_file(next((run / "model").glob("*.safetensors")))
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_tiny(work / "model")
        log = work / "log"
        began = time.monotonic()
        assert ended(started(configured(work, "plain"), options.ranks[0], log), 600), (
            log.read_text()
        )
        whole = time.monotonic() - began
        rows = (work / "plain" / "metrics.jsonl").read_text().splitlines()
        step = max(json.loads(row)["step_seconds"] for row in rows[1:])
        right = weights(work / "plain")
        seen: Counter[str] = Counter()
        runs, worst = 0, 0.0
        while seen.total() < options.kills:
            runs += 1
            path, run = configured(work, f"run-{runs}"), work / f"run-{runs}"
            ranks = draw.choice(options.ranks)
            while not RunFolder(run).finished:
                since = time.time()
                if CheckpointFolder(run / "checkpoints").steps():  # without one none may change
                    ranks = draw.choice(options.ranks)
                process = started(path, ranks, log)
                last, instant = seen.total() >= options.kills, draw.random()
                if last:
                    patience = 600.0
                elif instant < 0.2:
                    patience = draw.uniform(0, whole / 2)
                elif instant < 0.5:
                    reached(process, progress(run), 300)
                    patience = draw.uniform(0, STEPS * step)
                else:
                    reached(process, writing(run, since), 300)
                    patience = draw.uniform(0, SAVING)
                if ended(process, patience):
                    assert RunFolder(run).finished, log.read_text()[-3000:]
                    break
                victim = draw.choice(VICTIMS)
                left = kill(process, victim)
                assert ended(process, 60), f"the launcher outlived the kill of {victim}"
                _, alive = psutil.wait_procs(left, timeout=60)
                assert not alive, f"ranks outlived the kill of {victim}"
                where = place(run, since)
                seen[where] += 1
                print(f"kill {seen.total()}: {victim}, {where}", flush=True)
                problem = problem_of(run)
                assert problem is None, problem
            steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
            assert steps == list(range(1, STEPS + 1)), steps
            apart = ((weights(run) - right).norm() / right.norm()).item()
            worst = max(worst, apart)
            assert apart <= (0 if len(options.ranks) == 1 else 1e-5), f"{run}: {apart}"
        print(f"{seen.total()} kills in {runs} runs: {dict(seen)}; weights apart: {worst:.1e}")


if __name__ == "__main__":
    main()
