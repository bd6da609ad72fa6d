"""Checkpoints on disk: whole or not at all, verified before older ones go.

A checkpoint is written as `step-N.tmp`. When all ranks have written, every file is flushed to the
disk and read back for its size and hash; these make the manifest, and only then the folder gets its
name `step-N`. What a killed writer leaves is a `.tmp`, which nobody reads. The hashes tell a folder
that was damaged later. The optimizer's files are DeepSpeed's pickles: only a run's own folder is
read, and no file before its hash is right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from es2fast.run.files import remove

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
Seals = dict[str, tuple[int, str]]  # relative path -> bytes, sha256


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: their folder; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def steps(self) -> list[int]:
        """Of the checkpoints with a name, newest first; whether they are whole is not asked."""
        names = [p.name for p in self.path.glob("step-*") if p.is_dir()]
        return sorted((int(m[1]) for m in map(_NAME.fullmatch, names) if m), reverse=True)

    def at(self, step: int) -> Path:
        """Where the checkpoint after optimizer step `step` lies."""
        return self.path / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into; unfinished ones are removed."""
        self.drop_unfinished()
        partial = self.at(step).with_suffix(".tmp")
        partial.mkdir(parents=True)
        return partial

    def drop_unfinished(self) -> None:
        """Removes what killed or failed writers left."""
        for path in self.path.glob("step-*.tmp"):
            remove(path)

    def commit(self, step: int, seals: Seals, about: Mapping[str, Any]) -> None:
        """Gives the written folder its name.

        Args:
            step: as for `begin`.
            seals: of all its files, from `seal`.
            about: further entries of the manifest.
        """
        partial, target = self.at(step).with_suffix(".tmp"), self.at(step)
        manifest = partial / MANIFEST
        with manifest.open("w", encoding="utf-8") as file:
            json.dump({**about, "step": step, "files": seals}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for folder in {partial, *(partial / name for name in map(os.path.dirname, seals))}:
            _sync(folder)
        remove(target)
        partial.rename(target)
        _sync(self.path)

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep`, once the newest has every file at its size."""
        steps = self.steps()
        if not steps or damage(self.at(steps[0]), content=False) is not None:
            return
        for step in steps[keep:]:
            doomed = self.at(step).with_suffix(".tmp")  # a half removed one must not be read
            self.at(step).rename(doomed)
            remove(doomed)

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The manifest of the newest checkpoint whose files all have their hashes.

        Args:
            warn: gets a line for each newer one that is damaged.
        """
        for step in self.steps():
            problem = damage(self.at(step))
            if problem is None:
                return read_manifest(self.at(step))
            warn(f"the checkpoint of step {step} is damaged and not used: {problem}")
        return None


def files_of(folder: Path) -> list[str]:
    """Relative paths of a folder's files, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def seal(folder: Path, names: list[str]) -> Seals:
    """Flushes files to the disk and reads them back.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    found: Seals = {}
    for name in names:
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
            found[name] = (os.fstat(file.fileno()).st_size, _digest(file))
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        OSError, ValueError: there is none that can be read.
    """
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError("it is no manifest")
    return found


def damage(folder: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when nothing is.

    Args:
        content: also read every file for its hash.
    """
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes, not {size}"
            if content:
                with path.open("rb") as file:
                    if _digest(file) != digest:
                        return f"{path} is not what was written"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
