"""A process that computes on CPUs keeps what it frees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CHILD = """
import resource, sys
import torch
from es2fast.distributed.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = torch.ones(24, 1 << 18)  # 24 MiB, and two of them at a time
    for _ in range(8):
        held = held + 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with open("/proc/self/smaps") as file:
    huge = sum(int(line.split()[1]) for line in file if line.startswith("AnonHuge"))
print(faults, huge)
"""
PAGES = 9 * 24 * 256  # of 4 KiB


def measured(how: str, **environment: str) -> tuple[int, int]:
    """Page faults of nine blocks, one made of the other, after as many others; kB in huge pages
    then."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    faults, huge = done.stdout.split()
    return int(faults), int(huge)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's page counts")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    plain = {"THP_MEM_ALLOC_ENABLE": "0"}
    fresh, _ = measured("leave", **plain)
    kept, _ = measured("keep", **plain)
    asked, _ = measured("keep", **plain, MALLOC_MMAP_THRESHOLD_="65536")
    assert fresh > 0.5 * PAGES and asked > 0.9 * PAGES
    assert kept < 0.01 * PAGES


@pytest.mark.skipif(
    not HUGE.is_file() or "[never]" in HUGE.read_text(), reason="this Linux gives no huge pages"
)
def test_large_blocks_lie_in_huge_pages() -> None:
    _, huge = measured("keep")
    assert huge > 16 * 1024
