"""Threads and cores of ranks that compute on the CPUs of one machine.

Left alone, every rank of a launch takes as many threads as there are cores, and they hold each
other up. Which cores a rank's threads run on is the kernel's choice unless `train.bind_cores` is
set: then each rank has cores of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

TOPOLOGY = Path("/sys/devices/system/cpu")
SIBLINGS = ("core_cpus_list", "thread_siblings_list")  # the second before Linux 5.3


def cores(topology: Path = TOPOLOGY) -> list[list[int]]:
    """Cores that this process may use, each as its logical CPUs (several with SMT), ascending.

    Args:
        topology: as Linux shows it; where it is not known every logical CPU is a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[cpu] for cpu in range(os.cpu_count() or 1)]
    found: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        paths = [topology / f"cpu{cpu}" / "topology" / name for name in SIBLINGS]
        known = [path.read_text().strip() for path in paths if path.is_file()]
        found.setdefault(known[0] if known else str(cpu), []).append(cpu)
    return list(found.values())


def share(every: list[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """The cores of one of `ranks` ranks on a machine: neighbours, as many for each, what is left
    over for nobody. All of them where there are fewer than ranks."""
    each = len(every) // ranks
    return every[rank * each : (rank + 1) * each] if each else every


def settle(rank: int, ranks: int, bind: bool) -> None:
    """For one of several ranks, before it computes: takes its share of the threads unless
    OMP_NUM_THREADS says how many, and keeps this process, and threads that it starts from now on,
    to its share of the cores if it is to `bind`. A rank that its launcher has bound
    (`deepspeed --bind_cores_to_rank`) is left as it is."""
    if ranks < 2 or not hasattr(os, "sched_setaffinity"):
        return
    if os.sched_getaffinity(0) != os.sched_getaffinity(os.getppid()):
        return
    every = cores()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(every) // ranks))
    if bind and ranks <= len(every):
        own = share(every, rank, ranks)
        os.sched_setaffinity(0, [cpu for core in own for cpu in core])


def ranks_here() -> int:
    """Ranks on this machine, as DeepSpeed's launcher or torchrun says; 1 without one."""
    sizes = (os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
    return int(next((size for size in sizes if size), 1))
