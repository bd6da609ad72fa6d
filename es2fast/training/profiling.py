"""`train.profile`: where the time of a step goes.

torch's profiler looks at a few steps after a warm-up. The parts of a step are `record_function`
ranges set by hooks and wrappers that exist only while a profile is made, so a run without one pays
nothing. Parts that lie in one another (a block in the student's forward) are shares of the same
time; shares are of the wall time of the profiled steps.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from es2fast.modeling.compiled import is_compiled
from es2fast.modeling.taps import backbone, blocks
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder

WAIT, WARMUP, ACTIVE = 1, 1, 3  # steps that are passed over, warm up, are looked at
_EXCHANGE = ("c10d::", "nccl", "gloo:", "deepspeed_shm", "shm_comm")
_PREFIX = "es2fast:"


class StepProfiler:
    """Profiles the first steps of a training; does nothing unless `wanted`.

    Args:
        wanted: `train.profile`.
        engine: the DeepSpeed engine.
        folder: of the run, where trace.json and profile.txt go.
        main: this rank writes.
    """

    def __init__(self, wanted: bool, engine: Any, folder: RunFolder, main: bool):
        self._undo: list[Callable[[], None]] = []
        self._profile: Any = None
        if not (wanted and main):
            return
        self._folder, self._steps = folder, 0
        self._wall, self._busy = 0.0, 0.0
        self._mark(engine)
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=kinds, schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
        )
        self._profile.start()

    def step(self) -> None:
        """After every optimizer step."""
        if self._profile is None:
            return
        self._steps += 1
        if self._steps == WAIT + WARMUP:
            self._began, self._used = time.perf_counter(), _cpu_seconds()
        if self._steps == WAIT + WARMUP + ACTIVE:
            self._wall = time.perf_counter() - self._began
            self._busy = _cpu_seconds() - self._used
            self._profile.step()
            self._write()
        else:
            self._profile.step()

    def close(self) -> None:
        """Takes everything out of the model again; a training of fewer steps has no profile."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            print(
                f"note: train.profile needs {WAIT + WARMUP + ACTIVE} steps; there were "
                f"{self._steps}, nothing was written",
                flush=True,
            )
        self._unmark()

    def _write(self) -> None:
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._folder.trace))
        text = summary(self._profile.key_averages(), self._wall, self._busy)
        write_text(self._folder.profile, text)
        print(text, flush=True)
        self._profile = None
        self._unmark()

    def _mark(self, engine: Any) -> None:
        objective = engine.module
        student = objective.student
        self._hooked(student.get_input_embeddings(), "embedding")
        for block in blocks(student):
            if is_compiled(block):  # its parts are one
                continue
            for name, child in block.named_children():
                kind = "attention" if "attn" in name or "attention" in name else None
                kind = "mlp" if "mlp" in name or "feed_forward" in name else kind
                if kind is not None and "norm" not in name:
                    self._hooked(child, kind)
        if objective.teacher is not None:
            self._hooked(backbone(objective.teacher), "teacher")
        self._hooked(backbone(student), "student")
        self._wrapped(objective, "_separation", "separation")
        self._wrapped(objective, "_losses", "head")
        self._wrapped(engine, "backward", "backward")
        self._wrapped(engine, "step", "optimizer")

    def _hooked(self, module: nn.Module, name: str) -> None:
        open_ranges: list[Any] = []

        def enter(*_: Any) -> None:
            if torch.is_grad_enabled() or name in ("teacher", "student"):
                teaching = name == "student" and not torch.is_grad_enabled()  # adapters are off
                found = record_function(_PREFIX + ("teacher" if teaching else name))
                open_ranges.append(found)
                found.__enter__()

        def leave(*_: Any) -> None:
            if open_ranges:
                open_ranges.pop().__exit__(None, None, None)

        handles = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]
        self._undo += [handle.remove for handle in handles]

    def _wrapped(self, owner: Any, method: str, name: str) -> None:
        """Puts a range around a method of one instance."""
        plain = getattr(owner, method)

        def within(*args: Any, **kwargs: Any) -> Any:
            with record_function(_PREFIX + name):
                return plain(*args, **kwargs)

        setattr(owner, method, within)
        self._undo.append(lambda: delattr(owner, method))

    def _unmark(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []


def summary(rows: Any, wall: float, busy: float) -> str:
    """The page.

    Args:
        rows: the profiler's key averages.
        wall: seconds of the profiled steps.
        busy: CPU seconds of the process meanwhile.
    """
    host = [row for row in rows if row.device_type == DeviceType.CPU]
    parts = {row.key.removeprefix(_PREFIX): row for row in host if row.key.startswith(_PREFIX)}
    exchanged = sum(row.cpu_time_total for row in host if row.key.startswith(_EXCHANGE)) / 1e6
    lines = [
        f"profile of {ACTIVE} steps, {wall / ACTIVE:.3g} s each; {busy / wall:.2f} cores used",
        f"{'part':<26}{'s per step':>12}{'share':>8}{'calls':>8}",
    ]
    told = 0.0
    for name in ("teacher", "student", "embedding", "attention", "mlp", "separation", "head",
                 "backward", "optimizer"):  # fmt: skip
        row = parts.get(name)
        if row is None:
            continue
        seconds = row.cpu_time_total / 1e6
        inner = name in ("embedding", "attention", "mlp")
        told += 0.0 if inner else seconds
        lines.append(_line(f"  of it {name}" if inner else name, seconds, wall, row.count))
    lines.append(_line("gathers and exchanges", exchanged, wall, None))
    lines.append(_line("the rest (data, metrics)", max(wall - told, 0.0), wall, None))
    gpu = sum(row.self_device_time_total for row in rows if is_kernel(row)) / 1e6
    if gpu:
        lines.append(_line("GPU without work", max(wall - gpu, 0.0), wall, None))
    lines.append("gathers and exchanges lie within the other parts; times are the host's")
    return "\n".join(lines) + "\n"


def is_kernel(row: Any) -> bool:
    """One of a profiler's averages is of kernels: not of what launched them, nor of a range, which
    a GPU's timeline holds again as an annotation."""
    return row.device_type != DeviceType.CPU and not row.is_user_annotation


def _line(name: str, seconds: float, wall: float, calls: int | None) -> str:
    count = "" if calls is None else str(calls)
    return f"{name:<26}{seconds / ACTIVE:>12.4f}{seconds / wall:>8.1%}{count:>8}"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
