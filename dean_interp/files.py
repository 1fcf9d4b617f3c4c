"""Files and folders that are written atomically, and tensors in safetensors files that name their format.

What is read may come from anywhere, so it is checked against the type that it should have. Of several processes rank 0
writes (`distributed.write_on_rank0`).
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

from dean_interp.distributed import on_rank0, write_on_rank0
from dean_interp.errors import InputError

_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
_METADATA_KEY = "dean_interp"
Record = TypeVar("Record")


def write_tensors(path: str | Path, file_format: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, their format (`dean_interp.scores.1`) and facts, which are JSON values, on rank 0.

    Raises `InputError` where the disk is full or the folder cannot be written; an older file of that name is kept.
    """
    write_on_rank0(Path(path), lambda: write_tensors_of_this_rank(path, file_format, tensors, facts))


def write_tensors_of_this_rank(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write tensors as `write_tensors` does, on the rank that calls it: each rank has a file of its own."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # one key: safetensors writes several in an order of its own, and equal content must be equal bytes
    metadata = {_METADATA_KEY: json.dumps({"format": file_format, "facts": facts})}
    _write_atomically(Path(path), lambda part: save_file(contiguous, part, metadata))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically on rank 0, and make its folder. Raises `InputError` as `write_tensors`."""
    write_on_rank0(Path(path), lambda: _write_atomically(Path(path), lambda part: part.write_bytes(content)))


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    # a folder: safetensors, when killed, leaves a file of some name beside the one that it writes
    folder = path.with_suffix(".part")
    try:
        with _empty_folder(folder):
            write(folder / path.name)
            (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {_reason(error)}. What was finished before is kept; start again"
        ) from error


@contextmanager
def atomic_folder(out: Path, *, part: Path | None = None) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block ends; where the block raises, nothing is left.

    Args:
        out: what the folder is at the end.
        part: where it is filled, on the same file system; None: beside `out`. What a killed run left there is deleted.

    Raises `InputError` where the disk is full or the folder cannot be written.
    """
    try:
        with _empty_folder(part or out.with_name(f"{out.name}.part")) as filled:
            yield filled
            # the content must be on disk before the name is
            for path in filled.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            filled.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {_reason(error)}; nothing was kept") from error


@contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    """An empty folder, whatever a killed run left there; it is deleted when the block ends."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def check_writable(path: Path) -> None:
    """Raise `InputError` where a file could not be written, before its content is computed."""

    def write_and_delete() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{path.name}.try").open("wb") as trial:
                Path(trial.name).unlink()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}") from error

    on_rank0(write_and_delete)


def read_tensors(path: str | Path, file_format: str, facts: type[Record]) -> tuple[dict[str, Tensor], Record]:
    """Read what `write_tensors` wrote: the tensors, and the facts as a record of the type `facts`.

    Raises `InputError` where the file is missing, damaged, of another format, or holds other facts.
    """
    what = file_format.split(".")[1]
    if not Path(path).is_file():
        raise InputError(f"no {what} file {path}")
    refuse_unreadable(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = TypeAdapter(dict[str, Any]).validate_json(metadata.get(_METADATA_KEY, "{}"))
            given = content.get("format")
            if given != file_format:
                raise InputError(f"{path} is not a {what} file of this version ({file_format}), got {given!s:.60}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, TypeAdapter(facts).validate_python(content.get("facts"))
    except ValidationError as error:
        raise InputError(f"{path} is damaged or not a {what} file ({_first_error(error)})") from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged or not a {what} file ({error})") from error


def refuse_unreadable(path: str | Path) -> None:
    """Raise `InputError` where a file cannot be opened, or a pointer stands in its place, as before `git lfs pull`."""
    try:
        with Path(path).open("rb") as file:
            beginning = file.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    for pointer, command in _POINTERS.items():
        if beginning.startswith(pointer):
            raise InputError(f"{path} is a pointer in place of the file: fetch the file itself ({command})")


def format_of(path: str | Path) -> str:
    """The format that a file of `write_tensors` names; empty where there is none, or it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return str(TypeAdapter(dict[str, Any]).validate_json(metadata.get(_METADATA_KEY, "{}")).get("format"))
    except (OSError, SafetensorError, ValidationError):
        return ""


def read_json(path: Path, kind: type[Record] | Any) -> Record:  # noqa: ANN401 - a class, or `dict[str, float]`
    """Read a JSON file as a record of the type `kind`.

    Raises `InputError` where the file cannot be read, is damaged, or holds something else.
    """
    refuse_unreadable(path)
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise InputError(f"{path} is damaged or of another version ({_first_error(error)})") from error


def _first_error(error: ValidationError) -> str:
    """The first error of a record that did not validate: the field, and what is wrong with it."""
    details = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(map(str, details["loc"]))
    return f"{field[:100]} {details['msg'][:300]}".strip()


def raise_if_damaged(path: str | Path, is_damaged: bool, what: str) -> None:
    """Raise `InputError` where the content of a file cannot be what was written: `what` says why."""
    if is_damaged:
        raise InputError(f"{path} is damaged ({what})")


def is_finite(tensor: Tensor, n_axes: int) -> bool:
    """Whether a tensor holds finite floats and has `n_axes` axes."""
    return tensor.dim() == n_axes and tensor.is_floating_point() and bool(tensor.isfinite().all())


def is_ascending(indices: Tensor, n: int) -> bool:
    """Whether a tensor holds indices below `n`, each larger than the one before."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return False
    is_inside = not len(indices) or 0 <= int(indices[0]) <= int(indices[-1]) < n
    return is_inside and bool((indices[1:] > indices[:-1]).all())
