"""Numbered lines for the steps of a command, with how long each takes.

Nothing is guessed beforehand: an estimate comes from the first work that was measured. Training and
evaluation append a line to a file for every unit of work (metrics.jsonl, answers.jsonl), so the
time between two sizes of that file says how long the rest takes, whoever does the work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from es2fast.progress import tqdm


class Steps:
    """Prints `[2/4] train: ...` lines.

    Args:
        total: how many steps there are.
    """

    def __init__(self, total: int):
        self._total, self._number = total, 0

    @contextmanager
    def step(self, title: str, plan: str = "") -> Iterator[Callable[[str], None]]:
        """Announces a step where there is a plan, yields what says more about it (the last words
        said go into its closing line), and tells its time when it is over."""
        self._number += 1
        head, started = f"[{self._number}/{self._total}] {title}", time.monotonic()
        said: list[str] = []
        if plan:
            write(f"{head}: {plan}")
        yield said.append
        used = duration(time.monotonic() - started)
        write(f"{head}: {said[-1] if said else 'done'} ({used})")

    def skip(self, title: str, why: str) -> None:
        """A step that has nothing to do."""
        self._number += 1
        write(f"[{self._number}/{self._total}] {title}: {why}")


def write(line: str) -> None:
    """A line on stdout that leaves progress bars of this process whole."""
    tqdm.write(line)


@contextmanager
def estimated(path: Path, total: int, counts: Callable[[str], bool] = bool) -> Iterator[None]:
    """While it lasts, says once how much time is left.

    Args:
        path: file to which a line is appended per unit of work; it may come later, or be replaced.
        total: units when all is done.
        counts: which lines are units.
    """
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(path, total, counts, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(path: Path, total: int, counts: Callable[[str], bool], done: threading.Event) -> None:
    last, since = _units(path, counts), None
    while not done.wait(0.5):
        units, now = _units(path, counts), time.monotonic()
        if units < last:  # an earlier run's file has gone
            last, since = units, now if units else None
        elif units > last and since is None:
            last, since = units, now
        elif units > last and since is not None:
            left = (total - units) * (now - since) / (units - last)
            if left > 0:
                write(f"\n      about {duration(left)} left, by {units} of {total} so far")
            return


def _units(path: Path, counts: Callable[[str], bool]) -> int:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return sum(map(counts, lines))
    except OSError:
        return 0


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
