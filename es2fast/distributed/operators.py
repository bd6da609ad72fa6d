"""Locks of torch's extension builder, with which DeepSpeed builds its operators.

Torch waits for such a file without a word and without end, and a process that is killed while it
builds or loads an operator leaves it behind: the next start would hang, and every later one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import psutil

LOCAL = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
RELEASE = 0.2  # seconds; a builder that is done closes its lock and then removes it


def drop_stale_locks() -> list[Path]:
    """Removes the locks that nobody holds; call before an operator is loaded.

    A builder has its lock open as long as it works. On a file system that other machines may share
    (a home on NFS), that cannot be seen, so there they stay.

    Returns:
        the locks that stay where nobody can say: a builder's, or left over.
    """
    return [lock for lock in _locks() if not (_is_local(lock) and _settled(lock))]


def _locks() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})


def _is_local(path: Path) -> bool:
    real = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and nearest.fstype in LOCAL


def _settled(lock: Path) -> bool:
    """The lock has a holder, or it is gone now; False: one cannot tell."""
    try:
        folder = os.open(lock.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # ranks look one after another: a look opens it too
            if not _is_open(lock):
                seen = lock.stat()
                time.sleep(RELEASE)
                if os.path.samestat(seen, lock.stat()) and not _is_open(lock):
                    lock.unlink()
        finally:
            os.close(folder)
    except FileNotFoundError:
        pass
    except (OSError, AttributeError):  # somebody else's file; no leases outside of Linux
        return False
    return True


def _is_open(path: Path) -> bool:
    """Another process of this machine has the file open, be it in another container: the kernel
    gives no lease on such a file."""
    with path.open("rb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            return True
    return False
