"""Locks of torch's extension builder, with which DeepSpeed builds its operators.

Torch waits for such a file without a word and without end, and a process that is killed while it
builds or loads an operator leaves it behind: the next start would hang, and every later one.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

LOCAL = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}


def drop_stale_locks() -> list[Path]:
    """Removes the locks that nobody holds; call before an operator is loaded.

    A builder has its lock open as long as it works. On a file system that other machines may share
    (a home on NFS), that cannot be seen, so there they stay.

    Returns:
        the locks that stay, on such file systems: a builder's, or left over.
    """
    unknown = []
    for lock in _locks():
        if not _is_local(lock):
            unknown.append(lock)
        elif not _is_open(lock):
            lock.unlink(missing_ok=True)
    return unknown


def _locks() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})


def _is_local(path: Path) -> bool:
    real = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and nearest.fstype in LOCAL


def _is_open(path: Path) -> bool:
    """A process of this machine, as far as they can be looked into, has the file open."""
    real = str(path.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == real for file in process.open_files()):
                return True
        except (psutil.Error, OSError):
            continue
    return False
