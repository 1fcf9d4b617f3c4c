"""Reads files and data sets as rows (`data_rows`), from the first byte to the last, before any work starts."""

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dean_interp.data.data_rows import DataRow, can_hold_examples, half_a_pair, parsed, used_columns
from dean_interp.data.text_files import (
    all_records,
    csv_columns_and_records,
    jsonl_records,
    meant_columns,
    misnamed,
    separated_otherwise,
)
from dean_interp.errors import InputError, did_you_mean, first_line
from dean_interp.files import refuse_unreadable

if TYPE_CHECKING:
    from datasets import Dataset

BUILTIN = ("fairness", "privacy", "general", "over_refusal_fairness", "over_refusal_privacy", "register")
FILES = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that hold the records of a published data set."""
_OTHER_FILES = (".json", ".ndjson", ".tsv", ".txt", ".parquet", ".arrow", ".xls", ".xlsx", ".gz", ".zip")
_COLUMNS = "needs the columns prompt,response (or prompt,safe,unsafe; or prompt alone; or question)"


def source_name(source: "str | Path | Dataset") -> str:
    """The behaviour's name: the built-in name, the file's stem, or the data set's last name."""
    if not isinstance(source, str | Path):
        info = getattr(source, "info", None)
        return str(getattr(info, "dataset_name", None) or "dataset")
    path = Path(source)
    if path.suffix.lower() in (".csv", ".jsonl"):
        return path.stem
    return path.name


def read_rows(source: "str | Path | Dataset") -> list[DataRow]:
    """Every row of a source (see `load_behaviour` for what a source may be), in file order."""
    if not isinstance(source, str | Path):
        dataset = _one_split(source, "the data set")
        return parsed("dataset", enumerate(dataset, 1), "row")
    name = str(source)
    path = Path(source)
    if name in BUILTIN:
        path = Path(str(files("dean_interp.data") / "builtin" / f"{name}.jsonl"))
    ending = path.suffix.lower()
    if ending == ".csv":
        return parsed(str(path), _csv_records(_existing(path)), "line")
    if ending == ".jsonl":
        return parsed(str(path), jsonl_records(_existing(path)), "line")
    # a file that is there is never looked for on the hub
    if os.path.isfile(path):
        raise InputError(f"the file {path} is there, but only .csv and .jsonl files are read: save it as one of them")
    is_folder = os.path.isdir(path)
    if ending in _OTHER_FILES and not is_folder:
        raise InputError(f"no file {path}; and of files only .csv and .jsonl are read")
    if is_folder or name.count("/") == 1:
        dataset = _hugging_face(path, name)
        return parsed(name, enumerate(dataset, 1), "row")
    hint = did_you_mean(name[:100], BUILTIN)
    raise InputError(
        f"no behaviour {name[:100]!r}{hint}: give {', '.join(BUILTIN)}, a .csv or .jsonl file, "
        "a folder saved by datasets, an owner/name on the Hugging Face hub, or a published set such as "
        "beavertails:fairness"
    )


def read_records(path: Path, *, split: str) -> Iterable[Any]:
    """The records of a published data set in a file or a saved folder, as they stand; of a folder, those of a split."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"no file or folder {path}")
    is_folder = path.is_dir()
    if not is_folder and path.suffix.lower() not in FILES:
        raise InputError(f"a file of rows is one of {', '.join(FILES)} or a saved folder, got {path}")
    try:
        return _records_in_folder(path, split) if is_folder else _records_in_file(path)
    except InputError:
        raise
    # whatever a reader raises, the user needs one line that names the file
    except Exception as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error


def _records_in_folder(path: Path, split: str) -> "Dataset":
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    parts = [loaded[name] for name in split.split("+")]
    return datasets.concatenate_datasets(parts)


def _records_in_file(path: Path) -> Iterable[Any]:
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    return all_records(path)


def _existing(path: Path) -> Path:
    # unlike `Path.is_file`, this raises nothing for a name that no file can have
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, not a file")
    if not os.path.isfile(path):
        raise InputError(f"no file {path}")
    refuse_unreadable(path)
    return path


def _csv_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Each record with the line that it starts on. Raises `InputError` where the columns can hold no examples."""
    numbered = csv_columns_and_records(path)
    start, columns = next(numbered, (1, []))
    if fault := separated_otherwise(columns) or _columns_fault(columns) or misnamed(columns):
        raise InputError(f"{path}: line {start}: {fault}")
    yield from numbered


def _columns_fault(columns: Sequence[str]) -> str | None:
    """What is wrong where no row of a file with these columns can be right."""
    if not can_hold_examples(columns):
        return f"{_COLUMNS}, got {columns}{meant_columns(columns)}"
    if "response" not in columns and (fault := half_a_pair(columns)):
        return fault
    return None


def unused_columns(source: str | Path) -> list[str]:
    """The columns of a CSV or JSONL file that no example is made of, in the order of the file; of others none."""
    path = Path(source)
    match path.suffix.lower():
        case ".csv":
            _, columns = next(csv_columns_and_records(_existing(path)), (1, []))
        case ".jsonl":
            records = [record for _, record in jsonl_records(_existing(path)) if isinstance(record, dict)]
            columns = list(dict.fromkeys(chain.from_iterable(records)))
        case _:
            return []
    used = used_columns(columns)
    return [column for column in columns if column.strip() and column not in used]


def _hugging_face(path: Path, name: str) -> "Dataset":
    # loaded only where it is needed: importing it takes seconds
    import datasets

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(name, split="train")
    # whatever the loader raises, the user needs one line that names the source
    except Exception as error:
        raise InputError(f"cannot load the data set '{name}': {first_line(error)}") from error
    return _one_split(loaded, f"'{name}'")


def _one_split(loaded: object, name: str) -> "Dataset":
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        splits = ", ".join(map(str, loaded))
        raise InputError(f"{name} holds several splits ({splits}): give one of them as a Dataset")
    if not isinstance(loaded, datasets.Dataset):
        raise InputError(
            f"a behaviour is a name, a file or a datasets.Dataset, got {type(loaded).__name__} "
            "(datasets.Dataset.from_pandas and .from_list make one)"
        )
    return loaded
