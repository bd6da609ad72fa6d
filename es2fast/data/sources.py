"""Reading a table of rows from whatever a `DataSource` names.

| source                                   | read by                                             |
|------------------------------------------|-----------------------------------------------------|
| folder written by `save_to_disk`         | `datasets.load_from_disk` (+ `split` for a dict)    |
| any other folder                         | `datasets.load_dataset(folder, split=...)`          |
| `.csv`, `.tsv`                           | the `csv` module: quoted newlines, a BOM, an unnamed |
|                                          | index column; every cell stays the text it is       |
| `.jsonl`, `.json`                        | one object per line; a list of objects or strings,  |
|                                          | `{"data": [...]}`, or columns `{"prompt": [...]}`   |
| `.parquet`                               | pyarrow, with the `datasets` features in its schema |
| any other file                           | plain text, one prompt per line, blank lines skipped |
| `builtin:NAME`                           | `data.builtin`                                      |
| otherwise                                | a Hugging Face dataset id, `id` or `id:config`      |

CSV is not read with pandas because its type guesses change prompts ("null", "1e5") and because it
drops cells of rows that are longer than the header. Malformed quoting is an error here: read
leniently, one unclosed quote swallows the rest of a file into a single prompt.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from es2fast.config import DataSource
from es2fast.data.builtin import HARMFUL, NAMES, PREFIX, builtin_rows
from es2fast.errors import UserError

_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
TEXT_COLUMN = "text"
LABEL_COLUMN = "label"
SIDES = {
    "harmful": frozenset({"harmful", "unsafe", "1", "1.0", "true"}),
    "harmless": frozenset({"harmless", "safe", "0", "0.0", "false"}),
}


@dataclass
class Table:
    """Rows as they stand in a source; `columns` also lists those that were not read; cut: there
    are more rows than `limit` leaves."""

    columns: list[str]
    rows: list[dict[str, Any]]
    cut: bool = False


def read_table(source: DataSource, field: str, wanted: Callable[[str], bool]) -> Table:
    """The rows of a source that its `where`, `side`, `rows` and `limit` leave, in this order.

    Args:
        source: what to read.
        field: configuration path for error messages, such as `data.harmful[0]`.
        wanted: which columns are needed; the others of a dataset are never decoded.

    Raises:
        UserError: the source is missing, empty or malformed, or has no such split; `where` names a
            column that it lacks; `where`, `side` or `rows` leave nothing.
    """
    path = Path(source.source).expanduser()
    try:
        if source.source.startswith(PREFIX):
            table = _from_package(source, field)
        elif path.is_dir():
            table = _from_folder(path, source, field, wanted)
        elif path.is_file():
            table = _from_file(path, source, field)
        else:
            table = _from_hub(source, field, wanted)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{field}: {source.source!r} is not UTF-8 text (byte {error.start}); convert it"
        ) from None
    except OSError as error:
        raise UserError(
            f"{field}: {source.source!r} cannot be read ({one_line(error.strerror or error)})"
        ) from None
    if not table.rows:
        raise UserError(f"{field}: {source.source!r} has no rows; give a source that has some")
    _find_label(table)
    return _selected(table, source, field)


def _find_label(table: Table) -> None:
    """The column of labels under its name, where it is written otherwise (`Label`)."""
    names = [name for name in table.columns if name and name.casefold() == LABEL_COLUMN]
    if len(names) == 1 and names[0] != LABEL_COLUMN:
        table.columns.append(LABEL_COLUMN)
        for row in table.rows:
            row[LABEL_COLUMN] = row.get(names[0])


def _selected(table: Table, source: DataSource, field: str) -> Table:
    """The rows that `where` and `side` keep, of those the slice `rows`, of those the first
    `limit`."""
    rows = table.rows
    for column, value in source.where.items():
        if column not in table.columns:
            raise UserError(
                f"{field}: where: {source.source!r} has no column {column!r}; its columns are "
                f"{', '.join(repr(name) for name in table.columns if name)}"
            )
        wanted = {_plain(item) for item in (value if isinstance(value, list) else [value])}
        kept = [row for row in rows if _plain(row.get(column)) in wanted]
        if not kept:
            found = sorted({one_line(row.get(column), 30) for row in rows})
            shown = ", ".join(map(repr, found[:8])) + (" ..." if len(found) > 8 else "")
            raise UserError(
                f"{field}: where: no row of {source.source!r} has {column}={value!r}; it holds "
                f"{shown}"
            )
        rows = kept
    if source.side is not None and LABEL_COLUMN in table.columns:
        rows = _one_side(rows, source, field)
    if source.rows is not None:
        parts = [int(part) if part else None for part in source.rows.split(":")]
        count, rows = len(rows), rows[slice(*parts)]
        if not rows:
            raise UserError(
                f"{field}: rows: {source.rows!r} leaves none of the {count} rows of "
                f"{source.source!r}"
            )
    kept = rows[: source.limit]
    return Table(table.columns, kept, cut=len(kept) < len(rows))


def _one_side(rows: list[dict[str, Any]], source: DataSource, field: str) -> list[dict[str, Any]]:
    """The rows of `source.side`; all where the labels are of another kind. A row without a label
    that says its side is of neither."""
    assert source.side is not None
    labels = [_plain(row.get(LABEL_COLUMN)) for row in rows]
    if not says_sides(labels):
        return rows
    kept = [row for row, label in zip(rows, labels) if label in SIDES[source.side]]
    if not kept:
        raise UserError(
            f"{field}: side: no row of {source.source!r} is labelled {source.side}; it holds "
            + ", ".join(map(repr, sorted(set(labels))))
        )
    return kept


def says_sides(labels: Sequence[str]) -> bool:
    """Whether a column's cells, as `_plain` has them, say what is harmful: most that are not empty
    do. Of classes that are numbered from 0 to more than 1 none does."""
    known = SIDES["harmful"] | SIDES["harmless"]
    given = [label for label in labels if label not in ("", "none", "nan", "-1")]
    if any(label.isdecimal() and label not in known for label in given):
        known = frozenset(label for label in known if label.isalpha())
    return 2 * sum(label in known for label in given) > len(given)


def _plain(cell: Any) -> str:
    """How `where` compares cells: a CSV knows only text, and YAML reads 1 and true."""
    return str(cell).strip().casefold()


def _row_count(source: DataSource) -> int | None:
    """Rows that have to be read: `limit` and one that tells of more, unless others are chosen
    first; None: all."""
    if source.limit is None or source.where or source.side or source.rows:
        return None
    return source.limit + 1


def one_line(text: object, width: int = 160) -> str:
    """Text on one line, cut to `width` characters: what an error message may quote."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def _from_file(path: Path, source: DataSource, field: str) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, source, field)
    if suffix == ".json":
        rows: Iterable[dict[str, Any]] = _json_rows(path, field)
    else:
        reader = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows}.get(suffix)
        rows = (reader or _text_rows)(path, field)
    kept = list(islice(rows, _row_count(source)))
    columns = list(dict.fromkeys(key for row in kept for key in row))
    return Table(columns, kept)


def _text_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if "\0" in line:
                raise UserError(f"{field}: {str(path)!r} is a binary file, not text")
            if line.strip():
                yield {TEXT_COLUMN: line.strip()}


def _csv_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                raise UserError(
                    f"{field}: {str(path)!r} has two columns {twice!r}; give each a name of its own"
                )
            for number, row in enumerate(reader, 1):
                if None in row:
                    raise UserError(
                        f"{field}: {str(path)!r} row {number} has more cells than the header; "
                        f"put cells that contain {delimiter!r} in double quotes"
                    )
                yield row
        except csv.Error as error:
            raise UserError(
                f"{field}: {str(path)!r} line {reader.line_num} is not valid CSV ({error})"
            ) from None


def _jsonl_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{field}: {str(path)!r} line {number} is not valid JSON ({one_line(error)})"
                ) from None
            yield _as_row(value, path, field, f"line {number}")


def _json_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # JSON Lines under another name
            yield from _jsonl_rows(path, field)
            return
        raise UserError(f"{field}: {str(path)!r} is not valid JSON ({one_line(error)})") from None
    for number, item in enumerate(_json_list(value, path, field), 1):
        yield _as_row(item, path, field, f"row {number}")


def _json_list(value: Any, path: Path, field: str) -> list[Any]:
    """Rows of a JSON document: a list, the one list of objects in it, or equally long columns."""
    if isinstance(value, list):
        return value
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict) and "messages" not in value:
        return lists[0]
    if lists and len(lists) == len(value) and len({len(column) for column in lists}) == 1:
        return [dict(zip(value, cells)) for cells in zip(*lists)]
    raise UserError(
        f"{field}: {str(path)!r} holds a JSON {type(value).__name__} without a list of rows; "
        "expected a list of objects"
    )


def _as_row(value: Any, path: Path, field: str, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {TEXT_COLUMN: value}
    if isinstance(value, dict):
        return value
    raise UserError(
        f"{field}: {str(path)!r} {where} is a {type(value).__name__}; "
        "expected an object with a prompt column, or a string"
    )


def _from_parquet(path: Path, source: DataSource, field: str) -> Table:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            dataset = datasets.Dataset(datasets.table.InMemoryTable(file.read()))
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"{field}: {str(path)!r} is not a readable Parquet file ({one_line(error)})"
        ) from None
    return _from_dataset(dataset, source, lambda name: True)


def _from_folder(
    path: Path, source: DataSource, field: str, wanted: Callable[[str], bool]
) -> Table:
    import datasets

    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        if saved:
            data: Any = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), split=source.split)
    except Exception as error:  # the loaders raise anything, up to bare Exception
        raise UserError(
            f"{field}: folder {source.source!r} holds no dataset that could be loaded "
            f"with split={source.split!r} ({one_line(error)})"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise UserError(
                f"{field}: {source.source!r} has no split {source.split!r}; it has "
                f"{', '.join(data)}"
            )
        data = data[source.split]
    return _from_dataset(data, source, wanted)


def _from_package(source: DataSource, field: str) -> Table:
    name = source.source.removeprefix(PREFIX)
    if name not in NAMES:
        raise UserError(
            f"{field}: there is no {source.source!r}; built-in prompts are "
            + ", ".join(f"{PREFIX}{known}" for known in NAMES)
        )
    side = "harmful" if name in HARMFUL else "harmless"
    if side != ("harmful" if "harmful" in field else "harmless"):
        raise UserError(f"{field}: {source.source!r} is {side}; give it as {side} prompts")
    rows = builtin_rows(name)
    return Table(list(rows[0]), list(rows[: _row_count(source)]))


def _from_hub(source: DataSource, field: str, wanted: Callable[[str], bool]) -> Table:
    name = source.source
    if not _DATASET_ID.fullmatch(name) or name.lower().endswith(_SUFFIXES):
        raise UserError(
            f"{field}: {name!r} is neither a file or folder nor a Hugging Face dataset id; "
            "check the path"
        )
    import datasets

    dataset_id, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(dataset_id, config or None, split=source.split)
    except Exception as error:  # the loaders raise anything, up to bare Exception
        raise UserError(
            f"{field}: {name!r} is neither a file or folder nor a dataset that could be loaded "
            f"with split={source.split!r} ({one_line(error)}); a dataset with several "
            "configurations is written id:configuration"
        ) from None
    return _from_dataset(data, source, wanted)


def _from_dataset(data: Any, source: DataSource, wanted: Callable[[str], bool]) -> Table:
    """Rows of a `datasets.Dataset`; ClassLabel numbers become their names."""
    import datasets

    columns = list(data.column_names)
    needed = [name for name in columns if wanted(name) or name in source.where]
    if not needed:  # none of them is known, which the reader of prompts says
        return Table(columns, [{} for _ in range(min(len(data), 1))])
    read = data.select_columns(needed)
    rows = read.select(range(min(_row_count(source) or len(read), len(read)))).to_list()
    for name, feature in read.features.items():
        if isinstance(feature, datasets.ClassLabel) and feature.names:
            for row in rows:
                if isinstance(row[name], int) and 0 <= row[name] < len(feature.names):
                    row[name] = feature.names[row[name]]
    return Table(columns, rows)
