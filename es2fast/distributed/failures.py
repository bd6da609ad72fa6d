"""Who says what when ranks fail.

Rank 0 says `error: ...`, any other rank `[rank r] error: ...`; an exception that is not the user's
mistake is a traceback behind `[rank r]`. Ranks that fail with the very message of rank 0 keep
silent, and a rank that lost its peers to another failure names that one in a line.

What the others say is known from a key-value store at MASTER_ADDR:MASTER_PORT, where the process
group has its own: no collective is needed, so a rank can fail at any moment, even before there is a
group. Nobody waits for longer than `PATIENCE`; a launcher ends the ranks that are left as soon as
one has gone.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

from es2fast.errors import UserError

PATIENCE = 10.0  # seconds in which the other ranks may arrive at the same message


def report(error: BaseException) -> None:
    """Prints the error that ends this rank to stderr, unless rank 0 says the same."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    message = _message(error)
    try:
        board = _Board(rank, world) if world > 1 else None
        culprit = board.other_than(message) if board and not isinstance(error, UserError) else None
        if culprit is not None:
            last = message.splitlines()[-1]
            message = f"error: rank {culprit} failed first, see its message ({last})"
        said = board is not None and rank > 0 and board.said_by_main(message)
    except (RuntimeError, KeyError):  # rank 0 has gone, or never came: nothing can be known
        board, said = None, False
    if not said:
        plain = rank == 0 and message.startswith("error: ")
        print(message if plain else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    if board is not None:
        board.leave(message)


def _message(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


class _Board:
    """The messages of failed ranks, in the store that rank 0 serves.

    Raises:
        RuntimeError: nobody serves it.
    """

    def __init__(self, rank: int, world: int):
        self._rank, self._world = rank, world
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not dist.is_initialized() and not served,
            wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE),
        )

    def other_than(self, message: str) -> int | None:
        """A rank that failed before with another message."""
        for rank in range(self._world):
            if rank != self._rank and self._read(f"said/{rank}") not in (None, message):
                return rank
        return None

    def said_by_main(self, message: str) -> bool:
        """Rank 0 fails with this message too; waits for it to fail."""
        self._store.set(f"said/{self._rank}", message)
        return self._wait("said/0") == message

    def leave(self, message: str) -> None:
        """Rank 0 stays until the others have read what it said."""
        try:
            self._store.set(f"{'said' if self._rank == 0 else 'left'}/{self._rank}", message)
            if self._rank == 0:
                end = time.monotonic() + PATIENCE
                for rank in range(1, self._world):
                    self._wait(f"left/{rank}", end - time.monotonic())
        except RuntimeError:  # rank 0 has gone
            pass

    def _wait(self, key: str, seconds: float = PATIENCE) -> str | None:
        end = time.monotonic() + seconds
        while (found := self._read(key)) is None and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None
