"""Files and folders that appear whole or not at all, and tensors in a safetensors file that says what it is.

What is read may come from anywhere, so it is checked against the type of what it should hold.

Of several processes the first one writes (`distributed.written`).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dean_interp.distributed import on_rank0, written
from dean_interp.errors import InputError

_KEY = "dean_interp"
Record = TypeVar("Record")


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
    """A file that appears whole or not at all, its folder too. Raises `InputError` as `write_tensors`."""
    written(Path(path), lambda: _write_whole(Path(path), lambda part: part.write_bytes(content)))


def write_text(path: str | Path, text: str) -> None:
    """The same for text, as UTF-8."""
    write_bytes(path, text.encode())


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_suffix(".part")  # a folder: safetensors, killed, leaves a file of some name beside what it writes
    try:
        with _emptied(part):
            write(part / path.name)
            (part / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        said = f"cannot write {path}: {_reason(error)}. What was finished before is kept; start again"
        raise InputError(said) from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends; where it raises, nothing is left.

    Raises `InputError` where the disk is full or the folder cannot be written.
    """
    try:
        with _emptied(out.with_name(f"{out.name}.part")) as part:
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            part.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {_reason(error)}; nothing was kept") from error


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """An empty folder, whatever a run that was killed left there; it goes when the block ends."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def writable(path: Path) -> None:
    """Raise `InputError` where a file could not be written, before what goes into it is computed."""

    def tried() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{path.name}.try").open("w") as trial:
                Path(trial.name).unlink()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}") from error

    on_rank0(tried)


def read_tensors(path: str | Path, form: str, facts: type[Record]) -> tuple[dict[str, Tensor], Record]:
    """Tensors, and facts as the record that they must be.

    Raises `InputError` where the file is missing, damaged, of another format, or holds other facts.
    """
    what = form.split(".")[1]
    if not Path(path).is_file():
        raise InputError(f"no {what} file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            held = TypeAdapter(dict[str, Any]).validate_json((file.metadata() or {}).get(_KEY, "{}"))
            given = held.get("format")
            if given != form:
                raise InputError(f"{path} is not a {what} file of this version ({form}), got {given!s:.60}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, TypeAdapter(facts).validate_python(held.get("facts"))
    except ValidationError as error:
        raise InputError(f"{path} is damaged or not a {what} file ({first_fault(error)})") from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged or not a {what} file ({error})") from error


def read_json(path: Path, kind: type[Record] | Any) -> Record:  # noqa: ANN401 - a class, or `dict[str, float]`
    """The record in a JSON file. Raises `InputError` where it cannot be read, is damaged, or holds something else."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise InputError(f"{path} is damaged or of another version ({first_fault(error)})") from error


def first_fault(error: ValidationError) -> str:
    """The first of the faults that a record has: where it is, and what is wrong there."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, fault['loc']))[:100]} {fault['msg'][:300]}".strip()


def refuse_damaged(path: str | Path, is_damaged: bool, what: str) -> None:
    """Raise `InputError` where the content of a file cannot be what was written."""
    if is_damaged:
        raise InputError(f"{path} is damaged ({what})")


def is_finite(tensor: Tensor, n_axes: int) -> bool:
    """Whether a tensor holds finite floats on so many axes."""
    return tensor.dim() == n_axes and tensor.is_floating_point() and bool(tensor.isfinite().all())


def is_ascending(indices: Tensor, n: int) -> bool:
    """Whether a tensor holds indices of `n` things in ascending order, none of them twice."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return False
    inside = not len(indices) or 0 <= int(indices[0]) <= int(indices[-1]) < n
    return inside and bool((indices[1:] > indices[:-1]).all())
