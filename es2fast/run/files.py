"""Files that survive a killed process: whole or not at all, and logs of one JSON object per line.

A line is appended with a single write, so a killed writer leaves at most one broken last line; it
is skipped on reading and closed before the next append.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def remove(path: Path) -> None:
    """Removes a file or a folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a neighbour of `path`, or of what it links to, and moves it into place; its folder is
    made. What is no file, such as a pipe, is written as it is.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not (target.is_file() or target.is_dir()):  # /dev/stdout
            target.write_text(text, encoding="utf-8")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _naming(error, path) from None


def copy_folder(source: Path, target: Path, *leave: str) -> None:
    """Copies a folder, whole or not at all: `target` must not exist. leave: patterns of names that
    do not come along.

    Raises:
        OSError: it cannot be read or written; names what could not.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*leave))
        partial.rename(target)
    except shutil.Error as error:  # of several files, each with its reason in words
        read, written, reason = error.args[0][0]
        number = _number(reason)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        place = target / Path(written).relative_to(partial) if full else read
        raise OSError(number, _words(reason), str(place)) from None
    finally:
        remove(partial)


def _number(reason: str) -> int:
    found = re.match(r"\[Errno (\d+)\]", reason)
    return int(found[1]) if found else errno.EIO


def _words(reason: str) -> str:
    return re.sub(r"^\[Errno \d+\] |: '.*$", "", reason)


def _naming(error: OSError, path: Path) -> OSError:
    """The system's error about that file, whatever file it met it at."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one object to a JSON Lines file; its folder is made.

    Raises:
        OSError: the file cannot be written; names it.
    """
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            file.write(b"\n" + line if _is_torn(file) else line)
    except OSError as error:
        raise _naming(error, path) from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file in order, broken lines left out; none without the file.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _is_torn(file: BinaryIO) -> bool:
    """Whether the last line of a file open for appending lacks its newline."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def digest(path: str | Path) -> str | None:
    """Twelve hexadecimal digits over a file's bytes; None where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()[:12]
    except OSError:
        return None
