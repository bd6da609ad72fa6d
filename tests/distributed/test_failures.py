"""Who says what when ranks fail, in real processes that share nothing but an address."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from es2fast.distributed.failures import PATIENCE
from es2fast.distributed.launch import free_port

SCRIPT = """
import sys, time
from es2fast.distributed.failures import report
from es2fast.errors import UserError
kind, text, delay = sys.argv[1:]
time.sleep(float(delay))
try:
    raise UserError(text) if kind == "user" else ValueError(text)
except ValueError as error:
    report(error)
"""


def failures(*ranks: tuple[str, str, float]) -> list[str]:
    """What each rank prints that fails with (kind, text, seconds to wait before); the last ranks
    of four do not fail."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "4"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, kind, text, str(delay)],
            env=os.environ | shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (kind, text, delay) in enumerate(ranks)
    ]
    return [process.communicate(timeout=120)[1] for process in started]


def test_the_same_mistake_is_said_once() -> None:
    began = time.monotonic()
    said = failures(*[("user", "data.harmful: no such file", 0.0)] * 4)
    assert said == ["error: data.harmful: no such file\n", "", "", ""]
    assert time.monotonic() - began < 60


def test_other_mistakes_are_said_with_the_rank() -> None:
    said = failures(*[("user", f"mistake {i % 2}", i * 0.2) for i in range(3)])
    assert said == ["error: mistake 0\n", "[rank 1] error: mistake 1\n", ""]


def test_an_exception_is_a_traceback_and_what_follows_from_it_one_line() -> None:
    late = PATIENCE / 2
    first, second = failures(("other", "out of memory", 0.0), ("other", "lost peer", late))
    assert first.startswith("[rank 0] Traceback (most recent call last):\n")
    assert first.endswith("ValueError: out of memory\n")
    expected = "rank 0 failed first, see its message (ValueError: lost peer)"
    assert second == f"[rank 1] error: {expected}\n"


@pytest.mark.parametrize("kind", ["user", "other"])
def test_alone_nothing_is_waited_for(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, "a mistake", "0"],
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    start = "error: a mistake\n" if kind == "user" else "[rank 0] Traceback"
    assert done.stderr.startswith(start)
