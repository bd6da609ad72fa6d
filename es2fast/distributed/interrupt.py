"""How a running training is asked to stop, and how its processes end with one another.

SIGTERM, SIGINT and SIGUSR1 ask a rank to stop: it notes the wish, all ranks agree on it with the
step's metrics, save and exit together. A collective save in a handler would deadlock, since
launchers signal ranks one after another. A second signal, seconds later, ends the rank at once, and
so does the first one to a run of one rank that has made no step yet: what the base model was asked
is kept as it comes, and nothing else is there to save.

A rank does not outlive its launcher: Linux kills it with its parent (PR_SET_PDEATHSIG), and it
waits in a thread for the lock that `launch.launch` holds on a file while it lives.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

LIFELINE = "ES2FAST_LIFELINE"  # names the file whose lock the launching process holds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_WISH = 3.0  # seconds within which launchers and terminals repeat one wish
ENDED = "asked to stop before the first step; the same command again continues\n"
_PR_SET_PDEATHSIG = 1


class StopWish:
    """Whether this process was asked to stop; false until `listen` and a signal.

    stepping: from now on there is something to save.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.stepping = False
        self._since = 0.0

    def listen(self) -> None:
        """Takes over SIGNALS; in the main thread alone."""
        for number in SIGNALS:
            signal.signal(number, self._noted)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        if not self.stepping and os.environ.get("WORLD_SIZE", "1") == "1":
            os.write(1, ENDED.encode())  # print is not for handlers
            os._exit(0)
        now = time.monotonic()
        if self.wanted and now - self._since > SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.wanted:
            self.wanted, self._since = True, now


def die_with_launcher() -> None:
    """Called in a rank that a launcher started."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    path = os.environ.get(LIFELINE)
    if path is not None:
        threading.Thread(target=_watch, args=(path,), daemon=True).start()


def _watch(path: str) -> None:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for the launching process to go
    except FileNotFoundError:
        pass  # it went before
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def lifeline(folder: str) -> Iterator[str]:
    """A locked file for LIFELINE while this lasts; ranks that watch it end with it.

    Args:
        folder: an empty one of this process.
    """
    path = os.path.join(folder, "alive")
    file: IO[bytes]
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path
