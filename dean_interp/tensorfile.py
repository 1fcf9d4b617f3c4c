"""Files that appear whole or not at all, and tensors in a safetensors file that says what it is."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dean_interp.errors import InputError

_KEY = "dean_interp"


def write_tensors(path: str | Path, form: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors with their format (`dean_interp.scores.1`) and facts that JSON can hold.

    Raises `InputError` where the disk is full or the folder cannot be written; an older file of that name is kept.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        # one key: safetensors writes several in an order of its own, and equal content must be equal bytes
        save_file(contiguous, part, {_KEY: json.dumps({"format": form, "facts": facts})})


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends: it appears whole or not at all.

    Raises `InputError` where the disk is full or the folder cannot be written.
    """
    part = Path(path).with_suffix(".part")
    try:
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {path}: {reason}. What was finished before is kept; start again") from error


def writable(path: Path) -> None:
    """Raise `InputError` where a file could not be written, before what goes into it is computed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.try").open("w") as trial:
            Path(trial.name).unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from error


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts. Raises `InputError` where the file is missing, damaged, or of another format."""
    what = form.split(".")[1]
    if not Path(path).is_file():
        raise InputError(f"no {what} file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            if metadata.get("format") != form:
                raise InputError(f"{path} is not a {what} file of this version ({form}), got {metadata.get('format')}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, metadata["facts"]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or not a {what} file ({error})") from error
