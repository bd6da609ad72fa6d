"""Memory of a process that computes on CPUs: what it frees it keeps, and large blocks lie in huge
pages.

Left alone, malloc returns large blocks to the kernel as they are freed, which clears them again, 4
KiB at a time, for the next step (what that costs: DEVELOPING.md). Blocks of more than 32 MB, which
are few, go to and fro as ever: kept too, one that came and went took more and more memory (glibc
2.36). `ops.scratch` keeps the largest.
"""

from __future__ import annotations

import ctypes
import os

PARAMETERS = {"TRIM": (-1, 2**31 - 1), "MMAP": (-3, 32 << 20)}  # numbers of glibc's malloc.h


def keep_freed_memory() -> None:
    """For this process, from now on. An allocator that is not glibc's is left as it is, and so is
    what MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or THP_MEM_ALLOC_ENABLE say.

    Huge pages are PyTorch's (THP_MEM_ALLOC_ENABLE), where Linux gives them to programs that ask;
    PyTorch looks at its first tensor, so call this before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (parameter, value) in PARAMETERS.items():
        if mallopt is not None and f"MALLOC_{name}_THRESHOLD_" not in os.environ:
            mallopt(parameter, value)
