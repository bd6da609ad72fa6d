"""Every signal that launchers send is a wish to stop; sent again later it ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from es2fast.distributed import interrupt

LISTEN = """
import os, signal, sys
from es2fast.distributed import interrupt
number, patience = int(sys.argv[1]), float(sys.argv[2])
interrupt.SAME_WISH = patience
wish = interrupt.StopWish()
assert not wish.wanted
wish.listen()
wish.stepping = sys.argv[3] == "stepping"
for _ in range(2):
    signal.raise_signal(number)
    print(wish.wanted, flush=True)
"""


def listening(number: int, patience: float, state: str, ranks: int = 1) -> Any:
    return subprocess.run(
        [sys.executable, "-c", LISTEN, str(int(number)), str(patience), state],
        env=os.environ | {"WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("patience", [60.0, -1.0])
def test_noted_once_and_obeyed_at_the_second(number: int, patience: float) -> None:
    done = listening(number, patience, "stepping")
    patient = patience > 0  # the second one still belongs to the first
    assert done.stdout.split() == ["True", "True"][: 2 if patient else 1], done.stderr
    assert done.returncode == (0 if patient else -number)


def test_before_the_first_step_one_rank_ends_at_once() -> None:
    done = listening(signal.SIGTERM, 60.0, "preparing")
    assert done.stdout == interrupt.ENDED and done.returncode == 0, done.stderr
    several = listening(signal.SIGTERM, 60.0, "preparing", ranks=2)  # others may wait for it
    assert several.stdout.split() == ["True", "True"] and several.returncode == 0
