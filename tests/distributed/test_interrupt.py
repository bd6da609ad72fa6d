"""Every signal that launchers send is a wish to stop; sent again later it ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LISTEN = """
import os, signal, sys
from es2fast.distributed import interrupt
number, patience = int(sys.argv[1]), float(sys.argv[2])
interrupt.SAME_WISH = patience
wish = interrupt.StopWish()
assert not wish.wanted
wish.listen()
for _ in range(2):
    signal.raise_signal(number)
    print(wish.wanted, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("patience", [60.0, -1.0])
def test_noted_once_and_obeyed_at_the_second(number: int, patience: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTEN, str(int(number)), str(patience)],
        capture_output=True,
        text=True,
    )
    patient = patience > 0  # the second one still belongs to the first
    assert done.stdout.split() == ["True", "True"][: 2 if patient else 1], done.stderr
    assert done.returncode == (0 if patient else -number)
