"""A process that computes on CPUs keeps what it frees."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CHILD = """
import resource, sys
import torch
from es2fast.config import parse_config
from es2fast.distributed.allocator import keep_freed_memory
from es2fast.distributed.runtime import start, stop

if sys.argv[1] == "keep":
    keep_freed_memory()
if sys.argv[1] == "start":  # as a training begins
    start(parse_config({"model": {"name": "m"}, "train": {"device": "cpu"}}))
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = torch.ones(24, 1 << 18)  # 24 MiB, and two of them at a time
    for _ in range(8):
        held = held + 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with open("/proc/self/smaps") as file:
    huge = sum(int(line.split()[1]) for line in file if line.startswith("AnonHuge"))
print(faults, huge)
stop()
"""
PAGES = 9 * 24 * 256  # of 4 KiB
PRODUCTS = """
import ctypes, sys
import torch
from es2fast.config import parse_config
from es2fast.distributed.runtime import start, stop

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks",
                "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
if sys.argv[1] == "start":
    start(parse_config({"model": {"name": "m"}, "train": {"device": "cpu"}}))
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16)
used = []
for tokens in range(64, 64 + 600):
    torch.ones(tokens, 256, dtype=torch.bfloat16) @ weight
    used.append(mallinfo2().uordblks)
print((used[-1] - used[299]) // 300)
stop()
"""


def measured(how: str, **environment: str) -> tuple[int, int]:
    """Page faults of nine blocks, one made of the other, after as many others; kB in huge pages
    then."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    faults, huge = done.stdout.split()[-2:]
    return int(faults), int(huge)


def onednn_in_bfloat16() -> bool:
    there = torch.backends.mkldnn.is_available() and hasattr(ctypes.CDLL(None), "mallinfo2")
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.skipif(
    not onednn_in_bfloat16(),
    reason="needs a CPU whose bfloat16 products are oneDNN's, and glibc 2.33",
)
@pytest.mark.parametrize(
    ("how", "least", "most"), [("leave", 20_000, 2**30), ("start", -9999, 2000)]
)
def test_the_code_of_products_does_not_add_up(how: str, least: int, most: int) -> None:
    """Bytes that stay in use per number of tokens, from the 300th on."""
    plain = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS, how], env=plain, capture_output=True, text=True, check=True
    )
    assert least < int(done.stdout.split()[-1]) < most


asks = pytest.mark.skipif(
    not HUGE.is_file() or "[madvise]" not in HUGE.read_text(),
    reason="needs a Linux that gives huge pages to programs that ask",
)


@asks
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    small = {"THP_MEM_ALLOC_ENABLE": "0"}
    kept, _ = measured("keep", **small)
    asked, _ = measured("keep", **small, MALLOC_MMAP_THRESHOLD_="65536")
    assert asked > 0.9 * PAGES
    assert kept < 0.01 * PAGES  # as malloc is, it takes one block or all anew


@asks
def test_large_blocks_lie_in_huge_pages() -> None:
    assert measured("leave")[1] < 1024 < 16 * 1024 < measured("start")[1]
