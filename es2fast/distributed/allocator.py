"""Memory of a process that computes on CPUs: what it frees it keeps, and large blocks lie in huge
pages.

Left alone, malloc returns large blocks to the kernel as they are freed, which clears them again, 4
KiB at a time, for the next step (what that costs: DEVELOPING.md). Blocks of more than 32 MB, which
are few, go to and fro as ever: kept too, one that came and went took more and more memory (glibc
2.36). `ops.scratch` keeps the largest.

oneDNN and the layer over it keep the code of 1024 products each, made anew for every number of
tokens, which hardly comes again: two gigabytes in 600 steps of a 0.5B model (DEVELOPING.md).
"""

from __future__ import annotations

import ctypes
import os

# a step's products of one number of tokens are some thirty, of both groups and the head under 100
KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
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


def keep_few_products() -> None:
    """The code of few products is kept by this process, unless KEPT_PRODUCTS' variables say
    otherwise; to be called before its first product."""
    for name, count in KEPT_PRODUCTS.items():
        os.environ.setdefault(name, count)
