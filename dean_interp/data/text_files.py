"""Text files as records: what is wrong with a file is said by its true line.

A byte that is not UTF-8, a NUL, a file of another kind under this name, a column or a key that is there twice: none of
these can be read as it was meant, so none is read.
"""

import csv
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dean_interp.errors import InputError, did_you_mean

_EXAMPLE_COLUMNS = ("prompt", "response", "safe", "unsafe", "topic", "split")
COLUMN_NAMES = (*_EXAMPLE_COLUMNS, "question", "questions")
"""Columns that mean something."""
_OPTIONAL = ("topic", "split")
_FIRST_BYTES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class Unreadable:
    """Stands in place of a record that could not be read."""

    reason: str
    """What a list of bad rows says of it."""
    cause: str
    """What the reader said."""


def decoded(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as written. Raises `InputError` where it is none, with the line."""
    content = path.read_bytes()
    for first_bytes, kind in _FIRST_BYTES.items():
        if content.startswith(first_bytes):
            raise InputError(f"{path}: line 1: this is {kind}, not UTF-8 text: save it as UTF-8 text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        readable = error.object[: error.start]
        line = _line_after(readable.decode("latin-1"))
        byte = error.object[error.start]
        raise InputError(f"{path}: line {line}: the byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from error
    if "\0" in text:
        before, _, _ = text.partition("\0")
        line = _line_after(before)
        raise InputError(f"{path}: line {line}: holds a NUL, which no text does (UTF-16?): save the file as UTF-8")
    return text


def csv_columns_and_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The columns first, then each record, with the line that it starts on; blank lines are skipped, and counted.

    Raises `InputError` where the file is no CSV, or has a column twice.
    """
    end = 0
    columns = None
    reader = csv.reader(StringIO(decoded(path), newline=""), strict=True)
    try:
        for fields in reader:
            # a quoted field may run over several lines
            start = end + 1
            end = reader.line_num
            if columns is None:
                if not fields:
                    continue
                columns = fields
                if fault := _column_twice(columns):
                    raise InputError(f"{path}: line {start}: {fault}")
                yield start, columns
            elif len(fields) > len(columns):
                yield start, Unreadable("has more fields than columns", "more fields than columns")
            elif fields:
                yield start, dict(zip_longest(columns, fields))
    except csv.Error as error:
        raise InputError(f"{path}: line {end + 1}: {error}") from error


def jsonl_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Each record with its line; blank lines are skipped, and counted."""
    text = decoded(path)
    for line, written in enumerate(StringIO(text, newline=None), 1):
        if not written.strip():
            continue
        try:
            yield line, json.loads(written, object_pairs_hook=_once_each)
        except InputError as error:
            yield line, Unreadable(str(error), str(error))
        except (ValueError, RecursionError) as error:
            if written.strip() == "[":
                raise InputError(f"{path}: line {line}: a JSON array begins; one object a line is read") from error
            cause = str(getattr(error, "msg", error))
            yield line, Unreadable(f"is not JSON ({cause})", cause)


def all_records(path: Path) -> list[Any]:
    """The records of a .csv, .json or .jsonl file as they stand. Raises `InputError` where one cannot be read."""
    kind = path.suffix.lower()
    if kind == ".json":
        try:
            return json.loads(decoded(path), object_pairs_hook=_once_each)
        except (InputError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    if kind == ".csv":
        numbered = csv_columns_and_records(path)
        next(numbered, None)
    else:
        numbered = jsonl_records(path)
    records = []
    for line, record in numbered:
        if isinstance(record, Unreadable):
            raise InputError(f"cannot read {path}: {record.cause} (line {line})")
        records.append(record)
    return records


def separated_otherwise(columns: Sequence[str]) -> str | None:
    """What is wrong where a header is one column because something else than a comma stands between its names."""
    for separator, name in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        if len(columns) == 1 and separator in columns[0]:
            return f"{name} separate the columns, where commas must: got {columns[0]!r}"
    return None


def misnamed(names: Iterable[object]) -> str | None:
    """What is wrong where a name is nearly that of a column (` topic`, `Split`, `topics`).

    Such a column would mean nothing, in silence. Letters may be wrong where the column itself is not there and is one
    that may be left out.
    """
    written = [name for name in names if isinstance(name, str)]
    missing = [column for column in _OPTIONAL if column not in written]
    for name in written:
        if name in COLUMN_NAMES:
            continue
        near = _misspelt(name)
        meant = near if near in missing else _meant(name)
        if meant in _EXAMPLE_COLUMNS:
            return f"the column {name!r} must be written {meant!r}"
    return None


@functools.lru_cache
def _misspelt(name: str) -> str:
    """The column that a name is nearly; empty where it is none. Rows of one file have the same names."""
    near = get_close_matches(name.lower(), _OPTIONAL, n=1, cutoff=0.85)
    return near[0] if near else ""


def meant_columns(names: Iterable[str]) -> str:
    """The columns that wrong names are nearest to, as a part of an error; empty where none is near."""
    wrong = [name for name in names if name not in COLUMN_NAMES]
    hints = [f"{name!r}{hint}" for name in wrong if (hint := did_you_mean(name, COLUMN_NAMES))]
    return f": {', '.join(hints)}" if hints else ""


def _meant(name: str) -> str:
    """The column that a name means, whatever its case and blanks."""
    plain = name.strip().lower()
    if plain in COLUMN_NAMES:
        return plain
    return name


def _column_twice(columns: Sequence[str]) -> str | None:
    # columns without a name come from commas at the end of lines
    name = _twice(_meant(column) for column in columns if column.strip())
    if name is None:
        return None
    written = ", ".join(repr(column) for column in columns if _meant(column) == name)
    return f"has the column {name!r} twice ({written})"


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `InputError` where it has a key twice: one of the values would be lost."""
    name = _twice(name for name, _ in pairs)
    if name is not None:
        raise InputError(f"has {name[:100]!r} twice")
    return dict(pairs)


def _twice(names: Iterable[str]) -> str | None:
    """The first name that is there twice; None where there is none."""
    for name, count in Counter(names).items():
        if count > 1:
            return name
    return None


def _line_after(text: str) -> int:
    """The number of the line that goes on where the text ends."""
    ends = re.findall(r"\r\n|\r|\n", text)
    return 1 + len(ends)
