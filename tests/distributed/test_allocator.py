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
from es2fast.config import parse_config
from es2fast.distributed.allocator import keep_freed_memory
from es2fast.distributed.runtime import start

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
"""
PAGES = 9 * 24 * 256  # of 4 KiB


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
