"""Files and data sets become rows; a bad row is reported by file and line, before any work starts.

Columns: `prompt` with either `response`, or `safe` and `unsafe`. Prompts that are only answered are `prompt` alone, in
every row, or `question` (`questions`) beside whatever else. `topic` and `split` are optional.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dean_interp.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

BUILTIN = ("fairness", "privacy", "general", "over_refusal_fairness", "over_refusal_privacy")
ANSWER_KINDS = ("response", "safe", "unsafe")
_QUESTIONS = ("question", "questions")  # in place of `prompt`: no answers belong to it
_COLUMNS = "needs the columns prompt,response (or prompt,safe,unsafe; or prompt alone; or question)"
_ALONE = frozenset(("prompt", "topic", "split"))  # what a file of prompts alone may hold: nothing that may be an answer
_SHOWN = 5  # bad rows named in an error; the rest are counted


@dataclass(frozen=True)
class _Fault:
    """In place of a record that could not be read: why."""

    text: str


@dataclass(frozen=True)
class DataRow:
    """One row as read: the prompt, its answers by kind, and where the file says it belongs."""

    prompt: str
    answers: Mapping[str, str]
    topic: str | None = None
    split: str | None = None


def source_name(source: "str | Path | Dataset") -> str:
    """The behaviour's name: the built-in name, the file's stem, or the data set's last name."""
    if not isinstance(source, str | Path):
        info = getattr(source, "info", None)
        return str(getattr(info, "dataset_name", None) or "dataset")
    return Path(source).stem if Path(source).suffix.lower() in (".csv", ".jsonl") else Path(source).name


def read_rows(source: "str | Path | Dataset") -> list[DataRow]:
    """Every row of a source (see `load_behaviour` for what a source may be), in file order."""
    if not isinstance(source, str | Path):
        return _parse("dataset", enumerate(_one_split(source, "the data set"), 1), "row")
    path = Path(source)
    if str(source) in BUILTIN:
        path = Path(str(files("dean_interp.data") / "builtin" / f"{source}.jsonl"))
    if path.suffix.lower() == ".csv":
        return _parse(str(path), _csv_records(_existing(path)), "line")
    if path.suffix.lower() == ".jsonl":
        return _parse(str(path), _jsonl_records(_existing(path)), "line")
    if os.path.isdir(path) or str(source).count("/") == 1:
        return _parse(str(source), enumerate(_hugging_face(path, str(source)), 1), "row")
    raise InputError(
        f"no behaviour {str(source)[:100]!r}: give {', '.join(BUILTIN)}, a .csv or .jsonl file, "
        "a folder saved by datasets, an owner/name on the Hugging Face hub, or a published set such as "
        "beavertails:fairness"
    )


def _existing(path: Path) -> Path:
    if not os.path.isfile(path):  # unlike `Path.is_file` it bears a name that no file can have
        raise InputError(f"no file {path}")
    return path


def _csv_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Each record with the line that it starts on; blank lines are skipped, and counted."""
    end, columns = 0, None
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for fields in reader:
                start, end = end + 1, reader.line_num
                if columns is None:
                    columns = fields
                    answered = bool(set(ANSWER_KINDS) & set(columns))
                    alone = "prompt" in columns and set(columns) <= _ALONE
                    if "prompt" not in columns if answered else not (alone or set(_QUESTIONS) & set(columns)):
                        raise InputError(f"{path}: line {start}: {_COLUMNS}, got {columns}")
                elif len(fields) > len(columns):
                    yield start, _Fault("has more fields than columns")
                elif fields:
                    yield start, dict(zip_longest(columns, fields))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: line {end + 1}: {error}") from error
    if columns is None:
        raise InputError(f"{path}: line 1: {_COLUMNS}, got []")


def _jsonl_records(path: Path) -> Iterator[tuple[int, Any]]:
    line = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    yield line, json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield line, _Fault(f"is not JSON ({getattr(error, 'msg', error)})")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: line {line + 1}: {error}") from error


def _hugging_face(path: Path, name: str) -> "Dataset":
    import datasets  # loaded only where it is needed: importing it takes seconds

    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, split="train")
    except Exception as error:  # whatever the loader raises, the user needs one line that names the source
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot load the data set '{name}': {reason}") from error
    return _one_split(loaded, f"'{name}'")


def _one_split(loaded: object, name: str) -> "Dataset":
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        raise InputError(f"{name} holds several splits ({', '.join(map(str, loaded))}): give one of them as a Dataset")
    if not isinstance(loaded, datasets.Dataset):
        raise InputError(f"a behaviour is a name, a file or a datasets.Dataset, got {type(loaded).__name__}")
    return loaded


def _parse(source: str, records: Iterable[tuple[int, Any]], unit: str) -> list[DataRow]:
    """Rows, or one error that names every bad one by its number."""
    given = [(number, _as_prompt(record)) for number, record in records]
    alone = all(set(record) <= _ALONE for _, record in given if isinstance(record, Mapping))
    rows, bad = [], []
    sides: dict[str, str] = {}
    for number, record in given:
        fault = _fault(record, alone)
        if fault:
            bad.append(f"{unit} {number}: {fault}")
        else:
            answers = {kind: record[kind] for kind in ANSWER_KINDS if record.get(kind)}
            row = DataRow(record["prompt"], answers, record.get("topic") or None, record.get("split") or None)
            if row.split and sides.setdefault(row.prompt, row.split) != row.split:
                bad.append(f"{unit} {number}: the prompt is in both splits")
            rows.append(row)
    if bad:
        more = f" (and {len(bad) - _SHOWN} more)" if len(bad) > _SHOWN else ""
        raise InputError(f"{source}: {'; '.join(bad[:_SHOWN])}{more}")
    return rows


def _as_prompt(record: Any) -> Any:  # noqa: ANN401 - whatever a line held
    """A record of a question is one of a prompt alone; every other is as it is."""
    if isinstance(record, Mapping) and not {"prompt", *ANSWER_KINDS} & set(record):
        for name in _QUESTIONS:
            if name in record:
                return {"prompt": record[name]} | {kind: record.get(kind) for kind in ("topic", "split")}
    return record


def _fault(record: object, alone: bool) -> str | None:
    """What is wrong with a record of a file, of prompts alone or not; or None."""
    if isinstance(record, _Fault):
        return record.text
    if not isinstance(record, Mapping):
        return f"is not an object with a prompt, got {type(record).__name__}"
    for field in ("prompt", *ANSWER_KINDS, "topic", "split"):
        value = record.get(field)
        if value is not None and not isinstance(value, str):
            return f"{field} must be text, got {type(value).__name__}"
        if value and any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"{field} holds half a surrogate pair, which is no character"
    if not (record.get("prompt") or "").strip():
        return "prompt is missing or blank"
    given = [kind for kind in ANSWER_KINDS if kind in record and record[kind] is not None]
    if not given and not alone:
        return "has no response (nor safe and unsafe)"
    blank = [kind for kind in given if not record[kind].strip()]
    if blank:
        return f"{blank[0]} is blank"
    if ("safe" in given) != ("unsafe" in given):
        return "has safe without unsafe" if "safe" in given else "has unsafe without safe"
    if record.get("split") not in (None, "", "calibration", "test"):
        return f"split must be 'calibration' or 'test', got {record['split']!r}"
    return None
