"""How much memory a rank may count on: one answer for all ranks."""

from __future__ import annotations

import importlib
import platform
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

MEMINFO = Path("/proc/meminfo")
CONTAINER = (  # the limit of a container, which MEMINFO does not know: cgroup v2, v1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory_per_rank(device: str, ranks: int) -> int | None:
    """Bytes of the rank that has least, the same on every rank; None where one cannot tell.

    On a GPU its whole memory. On a CPU what is available now, divided by the ranks of the machine:
    as many as share a host name in the process group, and `ranks` where there is no group yet. In
    a group it is collective: call it on every rank.

    Args:
        device: "cpu" or "cuda".
        ranks: of the run.
    """
    own = (platform.node(), _gpu_memory() if device == "cuda" else cpu_memory())
    found = [own] * ranks
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
    sharing = Counter(host for host, _ in found)
    known = [
        memory if device == "cuda" else memory // sharing[host]
        for host, memory in found
        if memory is not None
    ]
    return min(known) if len(known) == len(found) else None


def _gpu_memory() -> int:
    """Bytes of the smallest GPU that this process sees."""
    count = torch.cuda.device_count()
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(count))


def cpu_memory() -> int | None:
    """Bytes that programs can still take, at most what a container allows; None: not known."""
    available = _meminfo() if MEMINFO.is_file() else _psutil()
    limits = [int(text) for path in CONTAINER if (text := _text(path)).isdigit()]
    return None if available is None else min([available, *limits])


def _meminfo() -> int | None:
    """MemAvailable, which the file gives in KiB."""
    for line in _text(MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _psutil() -> int | None:
    """Where there is no /proc: psutil, if it is installed."""
    try:
        return int(importlib.import_module("psutil").virtual_memory().available)
    except ImportError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
