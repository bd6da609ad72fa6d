"""Whose folder it is, and whether a run may start, go on or replace another there.

A folder is ours when it holds the marker `.es2fast`, or what es2fast wrote before there was one (a
readable config.yaml beside metrics.jsonl or model/es2fast.yaml). Nothing is written into a folder
that has files of a run's names and is not ours, and nothing that the run reads from is replaced.
The marker is also the lock: held by rank 0 while it lives, so a dead process leaves none.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from es2fast.config import Config, load_config
from es2fast.errors import UserError
from es2fast.run.folder import RunFolder
from es2fast.run.identity import other_run

MARKER = ".es2fast"
_OTHER = "choose another output_dir"


def check_claim(folder: RunFolder, config: Config) -> bool:
    """Whether a run may use its folder; nothing is changed.

    Returns:
        an unfinished run of this configuration is there, which is to be continued.

    Raises:
        UserError: the folder is no run's, holds another run, or what this one reads from.
    """
    where = f"output_dir: {str(folder.path)!r}"
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{where} is a file; {_OTHER}")
    _check_sources(folder, config)
    _check_parents(folder.path, where)
    check_ours(folder, where, _OTHER)
    if not folder.occupied:
        return False
    overwrite = config.train.overwrite
    ended = folder.finished or folder.stopped.is_file()
    if ended or config.checkpoint.resume == "never":
        if overwrite:
            return False
        raise UserError(f"{where} already holds a run; {_OTHER} or set train.overwrite=true")
    try:
        _check_unfinished(folder, config, same_sharing=False)
    except UserError:
        if overwrite:
            return False
        raise
    return True


def check_ours(folder: RunFolder, where: str, remedy: str) -> None:
    """UserError where a folder has files of a run's names that no run wrote."""
    found = [path for path in (*folder.contents, folder.previous) if path.exists()]
    if found and not is_ours(folder):
        raise UserError(f"{where} holds {found[0].name}, which no run of es2fast wrote; {remedy}")


def _check_parents(path: Path, where: str) -> None:
    """The folder can be made: what there is of its path is a folder."""
    there = next((one for one in path.absolute().parents if one.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{where} cannot be made, since {str(there)!r} is a file; {_OTHER}")


def check_unchanged(folder: RunFolder, config: Config) -> None:
    """UserError where the unfinished run in a folder shares its batches otherwise among ranks: that
    is only continued from a checkpoint."""
    _check_unfinished(folder, config, same_sharing=True)


def _check_unfinished(folder: RunFolder, config: Config, *, same_sharing: bool) -> None:
    where = f"output_dir: {str(folder.path)!r}"
    try:
        other = other_run(load_config(folder.config), config, same_sharing=same_sharing)
    except UserError:
        raise UserError(
            f"{where} already holds a run; {_OTHER} or set train.overwrite=true"
        ) from None
    if other:
        raise UserError(
            f"{where} already holds an unfinished run with another {other}; go back to these "
            f"values to continue it, {_OTHER} or set train.overwrite=true"
        )


def is_ours(folder: RunFolder) -> bool:
    """es2fast made the folder."""
    if (folder.path / MARKER).is_file():
        return True
    if not (folder.metrics.is_file() or (folder.model / "es2fast.yaml").is_file()):
        return False
    try:
        load_config(folder.config)
    except UserError:
        return False
    return folder.config.is_file()


class Lock:
    """Holds a folder against other runs until the process ends or `release`.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: RunFolder):
        where = f"output_dir: {str(folder.path)!r}"
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = (folder.path / MARKER).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{where} cannot be written ({error.strerror}); {_OTHER}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(f"{where} is in use by {holder}; wait for it or {_OTHER}") from None
        except OSError:  # a file system without locks
            pass
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets other runs in; the marker stays."""
        self._file.close()


def _check_sources(folder: RunFolder, config: Config) -> None:
    """What the run reads must not be what it writes, moves or deletes."""
    owned = [path.resolve() for path in (*folder.contents, folder.previous)]
    for field, name in sources_of(config):
        path = Path(name).expanduser()
        if not path.exists():
            continue
        path = path.resolve()
        inside = any(path == one or one in path.parents for one in owned)
        if inside or path == folder.path.resolve():
            raise UserError(
                f"output_dir: {str(folder.path)!r} holds {field} ({name!r}), which the run reads; "
                f"{_OTHER}"
            )


def files_of(config: Config) -> list[Path]:
    """Files and folders that a run reads."""
    return [Path(name).expanduser() for _, name in sources_of(config)]


def check_output(option: str, path: Path | None, reads: Iterable[Path] = ()) -> None:
    """UserError where a file that a command is to write is a folder, or what the command reads,
    itself or in a folder: found out before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option}: {str(path)!r} is a folder; name a file in it")
    place = path.resolve()
    if place.exists() and any(one.resolve() in (place, *place.parents) for one in reads):
        raise UserError(
            f"{option}: {str(path)!r} is, or lies in, what the command reads; choose another file"
        )


def sources_of(config: Config) -> Iterator[tuple[str, str]]:
    """Fields that may name files or folders that a run reads."""
    yield "model.name", config.model.name
    if config.data.chat_template is not None:
        yield "data.chat_template", config.data.chat_template
    for field in type(config.data).model_fields:
        value = getattr(config.data, field)
        if isinstance(value, list):
            for source in value:
                yield f"data.{field}", source.source
    if isinstance(config.deepspeed, str):
        yield "deepspeed", config.deepspeed
