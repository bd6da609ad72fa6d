"""Shared by every benchmark: conditions, timing, memory, one JSON row per measurement.

A row holds what was measured and everything needed to judge it: the machine (GPU, driver, CPU),
torch, triton, the commit, the command. Times are medians with quantiles of
``triton.testing.do_bench`` (L2 cleared between runs) on a GPU, of a plain loop on a CPU. A run out
of memory and a peer that cannot run are rows too, with the reason in place of a figure.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from es2fast.ops.scratch import forget

QUANTILES = (0.5, 0.2, 0.8)
# Long windows: a short one measures the clock's boost. Shorter where time on a GPU is short.
WARMUP_MS, WINDOW_MS = (
    int(os.environ.get(f"ES2FAST_BENCH_{name}_MS", default))
    for name, default in (("WARMUP", 500), ("WINDOW", 3000))
)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _script() -> str:
    """The running script's path within the repository."""
    root, script = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
    return str(script.relative_to(root) if script.is_relative_to(root) else script.name)


def _without_place(argument: str) -> str:
    """An absolute path's last part: where a file lay on one machine is of no use on another."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _dirty(here: str) -> bool | None:
    """Tracked files differ from the commit; None where there is no repository to ask."""
    if not _run("git", "-C", here, "rev-parse", "HEAD"):
        return None
    return bool(_run("git", "-C", here, "status", "--porcelain", "--untracked-files=no"))


def conditions(device: str) -> dict[str, Any]:
    """Where and with what: goes into every row."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    here = str(Path(__file__).parent)
    rows: dict[str, Any] = dict(
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        commit=_run("git", "-C", here, "rev-parse", "--short", "HEAD") or None,
        dirty=_dirty(here),
        command=" ".join(["python", _script(), *map(_without_place, sys.argv[1:])]),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=device,
    )
    if device == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
        properties = torch.cuda.get_device_properties(0)
        rows |= dict(
            gpu=properties.name,
            sms=properties.multi_processor_count,
            cuda=torch.version.cuda,
            driver=_run(*query).splitlines()[0] if _run(*query) else None,
            window_ms=WINDOW_MS,
        )
    else:
        rows |= dict(gpu=None, cpu=cpu_name())
        rows |= dict(threads=torch.get_num_threads())
    return rows


def measure(
    function: Callable[[], Any],
    device: str,
    repeats: int = 5,
    clear: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """{ms, ms_p20, ms_p80, extra_mb}, or {error} when it cannot run or runs out of memory; clear:
    see `extra_memory`."""
    try:
        function()  # compile, autotune, allocate
        extra = extra_memory(function, device, clear)
        times = _times(function, device, repeats)
        return dict(ms=times[0], ms_p20=times[1], ms_p80=times[2], extra_mb=extra)
    except torch.OutOfMemoryError:
        return dict(error="out of memory")
    except Exception as error:  # a peer's failure is a row, not the end of the run
        first = str(error).splitlines()[0] if str(error) else ""
        return dict(error=f"{type(error).__name__}: {first}"[:300])
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _times(function: Callable[[], Any], device: str, repeats: int) -> list[float]:
    if device == "cuda":
        from triton.testing import do_bench

        return list(do_bench(function, WARMUP_MS, WINDOW_MS, quantiles=list(QUANTILES)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        samples.append(1e3 * (time.perf_counter() - start))
    samples.sort()
    last = len(samples) - 1
    return [statistics.median(samples), samples[round(0.2 * last)], samples[round(0.8 * last)]]


def extra_memory(
    function: Callable[[], Any], device: str, clear: Callable[[], None] | None = None
) -> float | None:
    """Peak memory during a call above what was in use before it, in MB (1e6): the allocator's on a
    GPU, the process's resident set on a CPU (Linux only).

    Args:
        function: called once.
        device: "cuda" or "cpu".
        clear: lets go of what an earlier call left, its gradients, which else would count as in
            use before.
    """
    if clear is not None:
        clear()
    if device != "cuda":
        return _extra_resident(function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _extra_resident(function: Callable[[], Any]) -> float | None:
    before = restart_peak()
    if before is None:
        return None
    function()
    return (status_bytes("VmHWM") - before) / 1e6


def restart_peak() -> int | None:
    """Lets VmHWM of this process start anew; its resident bytes now. None where that cannot be
    done (no Linux)."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    forget()  # buffers that calls keep for the next one are part of what a call takes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps would be used again unseen
    reset.write_text("5")
    return status_bytes("VmRSS")


def status_bytes(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


class Rows:
    """Appends rows to a JSON-lines file and prints them."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.path, self.common = path, common
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> dict[str, Any]:
        full = row | self.common
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        print(" ".join(f"{k}={_short(v)}" for k, v in row.items() if v is not None), flush=True)
        return full


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
