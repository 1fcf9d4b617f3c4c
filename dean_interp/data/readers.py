"""Reads files and data sets as rows; a bad row is reported by file and line, before any work starts.

Columns: `prompt` with either `response`, or `safe` and `unsafe`. Prompts that are only answered are `prompt` alone, in
every row, or `question` (`questions`) beside whatever else. `topic` and `split` are optional.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dean_interp.data.prompt_text import normalised
from dean_interp.data.text_files import (
    Unreadable,
    all_records,
    csv_columns_and_records,
    jsonl_records,
    meant_columns,
    misnamed,
)
from dean_interp.errors import InputError, did_you_mean
from dean_interp.files import refuse_unreadable

if TYPE_CHECKING:
    from datasets import Dataset

BUILTIN = ("fairness", "privacy", "general", "over_refusal_fairness", "over_refusal_privacy", "register")
FILES = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that hold the records of a published data set."""
_OTHER_FILES = (".json", ".ndjson", ".tsv", ".txt", ".parquet", ".arrow", ".xls", ".xlsx", ".gz", ".zip")
ANSWER_KINDS = ("response", "safe", "unsafe")
# names of a column that stands in place of `prompt`: no answers belong to it
_QUESTIONS = ("question", "questions")
_COLUMNS = "needs the columns prompt,response (or prompt,safe,unsafe; or prompt alone; or question)"
# a file of prompts alone may hold nothing else, since another column may be an answer under another name
_COLUMNS_WITHOUT_ANSWERS = frozenset(("prompt", "topic", "split"))
# bad rows that an error names; the rest are counted
_N_SHOWN = 5

Split = Literal["calibration", "test"]


@dataclass(frozen=True)
class DataRow:
    """One row of a file or data set: the prompt, its answers by kind, and its topic and split where it has them."""

    prompt: str
    answers: Mapping[str, str]
    topic: str | None = None
    split: str | None = None


def splits_of(rows: Sequence[DataRow]) -> list[str]:
    """The half of the data that each row belongs to: its own, else by a hash of the prompt.

    Prompts that are one (`normalised`) are on one side: a row without a split follows one that has it, and of several
    spellings the first in the alphabet decides, so that the order of rows does not.
    """
    given: dict[str, str] = {}
    spelling: dict[str, str] = {}
    forms = [normalised(row.prompt) for row in rows]
    for form, row in zip(forms, rows, strict=True):
        spelling[form] = min(row.prompt, spelling.get(form, row.prompt))
        if row.split:
            given[form] = row.split
    halves = []
    for form, row in zip(forms, rows, strict=True):
        halves.append(row.split or given.get(form) or split_by_hash(spelling[form]))
    return halves


def split_by_hash(text: str) -> Split:
    """The half of the data that a text belongs to, by its SHA-256: the same on every machine and for equal texts."""
    splits: tuple[Split, Split] = ("calibration", "test")
    return splits[hashlib.sha256(text.encode()).digest()[0] % 2]


def source_name(source: "str | Path | Dataset") -> str:
    """The behaviour's name: the built-in name, the file's stem, or the data set's last name."""
    if not isinstance(source, str | Path):
        info = getattr(source, "info", None)
        return str(getattr(info, "dataset_name", None) or "dataset")
    path = Path(source)
    return path.stem if path.suffix.lower() in (".csv", ".jsonl") else path.name


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
        return _parse(str(path), jsonl_records(_existing(path)), "line")
    # a file that is there is never looked for on the hub
    if os.path.isfile(path):
        raise InputError(f"the file {path} is there, but only .csv and .jsonl files are read: save it as one of them")
    if path.suffix.lower() in _OTHER_FILES and not os.path.isdir(path):
        raise InputError(f"no file {path}; and of files only .csv and .jsonl are read")
    if os.path.isdir(path) or str(source).count("/") == 1:
        return _parse(str(source), enumerate(_hugging_face(path, str(source)), 1), "row")
    name = str(source)[:100]
    raise InputError(
        f"no behaviour {name!r}{did_you_mean(name, BUILTIN)}: give {', '.join(BUILTIN)}, a .csv or .jsonl file, "
        "a folder saved by datasets, an owner/name on the Hugging Face hub, or a published set such as "
        "beavertails:fairness"
    )


def read_records(path: Path, *, split: str) -> Iterable[Any]:
    """The records of a published data set in a file or a saved folder, as they stand; of a folder, those of a split."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"no file or folder {path}")
    if not path.is_dir() and path.suffix.lower() not in FILES:
        raise InputError(f"a file of rows is one of {', '.join(FILES)} or a saved folder, got {path}")
    try:
        return _records_in_folder(path, split) if path.is_dir() else _records_in_file(path)
    except InputError:
        raise
    # whatever a reader raises, the user needs one line that names the file
    except Exception as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where there is no text."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _records_in_folder(path: Path, split: str) -> "Dataset":
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        loaded = datasets.concatenate_datasets([loaded[name] for name in split.split("+")])
    return loaded


def _records_in_file(path: Path) -> Iterable[Any]:
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    return all_records(path)


def _existing(path: Path) -> Path:
    # unlike `Path.is_file`, this raises nothing for a name that no file can have
    if not os.path.isfile(path):
        raise InputError(f"{path} is a folder, not a file" if os.path.isdir(path) else f"no file {path}")
    refuse_unreadable(path)
    return path


def _csv_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Each record with the line that it starts on. Raises `InputError` where the columns can hold no examples."""
    numbered = csv_columns_and_records(path)
    start, columns = next(numbered, (1, []))
    if not _can_hold_examples(columns):
        raise InputError(f"{path}: line {start}: {_COLUMNS}, got {columns}{meant_columns(columns)}")
    if fault := misnamed(columns):
        raise InputError(f"{path}: line {start}: {fault}")
    yield from numbered


def _can_hold_examples(columns: Sequence[str]) -> bool:
    if set(ANSWER_KINDS) & set(columns):
        return "prompt" in columns
    if set(_QUESTIONS) & set(columns):
        return True
    return "prompt" in columns and set(columns) <= _COLUMNS_WITHOUT_ANSWERS


def _hugging_face(path: Path, name: str) -> "Dataset":
    # loaded only where it is needed: importing it takes seconds
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, split="train")
    # whatever the loader raises, the user needs one line that names the source
    except Exception as error:
        raise InputError(f"cannot load the data set '{name}': {first_line(error)}") from error
    return _one_split(loaded, f"'{name}'")


def _one_split(loaded: object, name: str) -> "Dataset":
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        raise InputError(f"{name} holds several splits ({', '.join(map(str, loaded))}): give one of them as a Dataset")
    if not isinstance(loaded, datasets.Dataset):
        raise InputError(
            f"a behaviour is a name, a file or a datasets.Dataset, got {type(loaded).__name__} "
            "(datasets.Dataset.from_pandas and .from_list make one)"
        )
    return loaded


def _parse(source: str, records: Iterable[tuple[int, Any]], unit: str) -> list[DataRow]:
    """Rows, or one error that names every bad one by its number."""
    numbered = [(number, _as_prompt(record)) for number, record in records]
    columns = [set(record) for _, record in numbered if isinstance(record, Mapping)]
    prompts_alone = all(names <= _COLUMNS_WITHOUT_ANSWERS for names in columns)
    rows, faults = [], []
    split_of_prompt: dict[str, str] = {}
    for number, record in numbered:
        fault = _fault(record, prompts_alone)
        if fault:
            faults.append(f"{unit} {number}: {fault}")
            continue
        answers = {kind: record[kind] for kind in ANSWER_KINDS if record.get(kind)}
        row = DataRow(record["prompt"], answers, record.get("topic") or None, record.get("split") or None)
        # what is scored must never be measured, nor what differs from it by a blank
        if row.split and split_of_prompt.setdefault(normalised(row.prompt), row.split) != row.split:
            faults.append(f"{unit} {number}: the prompt is in both splits")
        rows.append(row)
    if faults:
        more = f" (and {len(faults) - _N_SHOWN} more)" if len(faults) > _N_SHOWN else ""
        raise InputError(f"{source}: {'; '.join(faults[:_N_SHOWN])}{more}")
    return rows


def _as_prompt(record: Any) -> Any:  # noqa: ANN401 - whatever a line held
    """A record of a question becomes one of a prompt alone; every other stays as it is."""
    if not isinstance(record, Mapping) or {"prompt", *ANSWER_KINDS} & set(record):
        return record
    for name in _QUESTIONS:
        if name in record:
            return {"prompt": record[name], "topic": record.get("topic"), "split": record.get("split")}
    return record


def _fault(record: object, prompts_alone: bool) -> str | None:
    """What is wrong with a record of a file, which may hold prompts alone; None where nothing is."""
    if isinstance(record, Unreadable):
        return record.reason
    if not isinstance(record, Mapping):
        return f"is not an object with a prompt, got {type(record).__name__}"
    return _text_fault(record) or _answer_fault(record, prompts_alone) or misnamed(record)


def _text_fault(record: Mapping[str, Any]) -> str | None:
    for field in ("prompt", *ANSWER_KINDS, "topic", "split"):
        value = record.get(field)
        if value is not None and not isinstance(value, str):
            return f"{field} must be text, got {type(value).__name__}"
        if value and any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"{field} holds half a surrogate pair, which is no character"
        if value and "\0" in value:
            return f"{field} holds a NUL, which no text does"
    if not (record.get("prompt") or "").strip():
        return "prompt is missing or blank"
    return None


def _answer_fault(record: Mapping[str, Any], prompts_alone: bool) -> str | None:
    kinds = [kind for kind in ANSWER_KINDS if record.get(kind) is not None]
    if not kinds and not prompts_alone:
        return "has no response (nor safe and unsafe)"
    for kind in kinds:
        if not record[kind].strip():
            return f"{kind} is blank"
    if ("safe" in kinds) != ("unsafe" in kinds):
        return "has safe without unsafe" if "safe" in kinds else "has unsafe without safe"
    if record.get("split") not in (None, "", "calibration", "test"):
        return f"split must be 'calibration' or 'test', got {record['split']!r}"
    return None
