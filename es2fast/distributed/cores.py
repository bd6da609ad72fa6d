"""Which CPU cores a rank computes on.

Ranks on one CPU that wander over its cores wait for each other at every exchange: two threads of
one rank on one core hold up all of them. So a rank keeps to its share of the cores that the process
may use, as many threads as it has whole cores, and nothing else of the machine's affinity is
touched. A rank that is alone keeps to nothing, and OMP_PROC_BIND, whatever it says, leaves the
choice to the OpenMP runtime.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

TOPOLOGY = Path("/sys/devices/system/cpu")


def cores(topology: Path = TOPOLOGY) -> list[list[int]]:
    """Cores that this process may use, each as its logical CPUs (several with SMT), ascending.

    Args:
        topology: as Linux shows it; where it is not known every logical CPU is a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[cpu] for cpu in range(os.cpu_count() or 1)]
    found: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        path = topology / f"cpu{cpu}" / "topology" / "core_cpus_list"
        key = path.read_text().strip() if path.is_file() else str(cpu)
        found.setdefault(key, []).append(cpu)
    return list(found.values())


def share(every: list[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """The cores of one of `ranks` ranks on a machine: neighbours, as many for each, what is left
    over for nobody. All of them where there are fewer than ranks."""
    each = len(every) // ranks
    return every[rank * each : (rank + 1) * each] if each else every


def settle(rank: int, ranks: int) -> None:
    """For one of several ranks that compute on the CPUs of a machine, before it computes: binds it,
    and what threads it starts from now on, to its cores, and sets the number of threads unless
    OMP_NUM_THREADS does. A rank that its launcher has bound (`--bind_cores_to_rank`) is left so."""
    if ranks < 2 or not hasattr(os, "sched_setaffinity"):
        return
    if os.sched_getaffinity(0) != os.sched_getaffinity(os.getppid()):
        return
    every = cores()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(every) // ranks))
    if "OMP_PROC_BIND" not in os.environ and ranks <= len(every):
        own = share(every, rank, ranks)
        os.sched_setaffinity(0, [cpu for core in own for cpu in core])


def ranks_here() -> int:
    """Ranks on this machine, as DeepSpeed's launcher or torchrun says; 1 without one."""
    sizes = (os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
    return int(next((size for size in sizes if size), 1))
