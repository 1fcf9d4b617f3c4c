"""Files that appear whole or not at all, and tensors in a safetensors file that says what it is.

Of several processes the first one writes (`distributed.written`).
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dean_interp.distributed import agreed, written
from dean_interp.errors import InputError

_KEY = "dean_interp"


def write_tensors(path: str | Path, form: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors with their format (`dean_interp.scores.1`) and facts that JSON can hold.

    Raises `InputError` where the disk is full or the folder cannot be written; an older file of that name is kept.
    """
    written(Path(path), lambda: write_own_tensors(path, form, tensors, facts))


def write_own_tensors(path: str | Path, form: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The same for a file that is this process's own, whatever the others do."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # one key: safetensors writes several in an order of its own, and equal content must be equal bytes
    metadata = {_KEY: json.dumps({"format": form, "facts": facts})}
    _write_whole(Path(path), lambda part: save_file(contiguous, part, metadata))


def write_bytes(path: str | Path, content: bytes) -> None:
    """A file that appears whole or not at all. Raises `InputError` as `write_tensors`."""
    written(Path(path), lambda: _write_whole(Path(path), lambda part: part.write_bytes(content)))


def write_text(path: str | Path, text: str) -> None:
    """The same for text, as UTF-8."""
    write_bytes(path, text.encode())


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_suffix(".part")
    try:
        write(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {path}: {reason}. What was finished before is kept; start again") from error


def writable(path: Path) -> None:
    """Raise `InputError` where a file could not be written, before what goes into it is computed."""

    def tried() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{path.name}.try").open("w") as trial:
                Path(trial.name).unlink()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}") from error

    agreed(tried)


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
