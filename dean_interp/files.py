"""Files and folders that are written atomically, and tensors in safetensors files that name their format.

What is read may come from anywhere, so it is checked against the type that it should have. Of several processes rank 0
writes (`distributed.write_on_rank0`).
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dean_interp.distributed import on_rank0, write_on_rank0
from dean_interp.errors import DamagedFileError, InputError

_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
_METADATA_KEY = "dean_interp"
_READ_BY_NAME = ("scores", "selection", "gates", "edit")
Record = TypeVar("Record")


def write_tensors(path: str | Path, file_format: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, their format (`dean_interp.scores.1`) and facts, which are JSON values, on rank 0.

    Raises `InputError` where the disk is full or the folder cannot be written; an older file of that name is kept.
    """

    def write() -> None:
        write_tensors_of_this_rank(path, file_format, tensors, facts)

    write_on_rank0(Path(path), write)


def write_tensors_of_this_rank(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write tensors as `write_tensors` does, on the rank that calls it: each rank has a file of its own."""
    stored = _each_by_itself(tensors)
    header = json.dumps({"format": file_format, "facts": facts})
    # one key: safetensors writes several in an order of its own, and equal content must be equal bytes
    metadata = {_METADATA_KEY: header}
    _write_atomically(Path(path), lambda part: save_file(stored, part, metadata))


def _each_by_itself(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, of which no two are the same memory, as one tensor under two names would be."""
    stored: dict[str, Tensor] = {}
    starts: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.contiguous()
        stored[name] = contiguous.clone() if contiguous.data_ptr() in starts else contiguous
        starts.add(contiguous.data_ptr())
    return stored


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically on rank 0, and make its folder. Raises `InputError` as `write_tensors`."""
    target = Path(path)

    def write() -> None:
        _write_atomically(target, lambda part: part.write_bytes(content))

    write_on_rank0(target, write)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, record: object) -> None:
    """Write a frozen record, or what JSON can hold, as `write_bytes` does. Equal records give equal bytes."""
    content = record
    if not isinstance(record, dict | list):
        content = TypeAdapter(type(record)).dump_python(record, mode="json")
    # JSON has no infinite number (a perplexity may be one): as text it is read back as the same number.
    write_bytes(path, to_json(content, indent=1, inf_nan_mode="strings") + b"\n")


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    # a folder: safetensors, when killed, leaves a file of some name beside the one that it writes
    folder = path.with_name(f"{path.name}.part")
    try:
        with _empty_folder(folder):
            part = folder / path.name
            write(part)
            part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = _reason(error)
        raise InputError(f"cannot write {path}: {reason}. What was finished before is kept; start again") from error


@contextmanager
def atomic_folder(out: Path, *, part: Path | None = None) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block ends; where the block raises, nothing is left.

    Args:
        out: what the folder is at the end.
        part: where it is filled, on the same file system; None: beside `out`. What a killed run left there is deleted.

    Raises `InputError` where the disk is full or the folder cannot be written.
    """
    beside = out.with_name(f"{out.name}.part")
    try:
        with _empty_folder(part or beside) as filled:
            yield filled
            # the content must be on disk before the name is
            _sync(filled)
            filled.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {_reason(error)}; nothing was kept") from error


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            # Windows syncs only what is open for writing.
            with path.open("r+b") as file:
                os.fsync(file.fileno())


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


def link_or_copy(link: Path, file: Path) -> None:
    """Make a link to a file, or a copy of it where the system makes no links, as Windows for most of its users."""
    try:
        link.symlink_to(file)
    except OSError:
        shutil.copyfile(file, link)


def check_writable(path: Path) -> None:
    """Raise `InputError` where a file could not be written, before its content is computed."""

    def write_and_delete() -> None:
        made: list[Path] = []
        try:
            if path.is_dir():
                raise InputError(f"{path} is a folder, and the name of a file is wanted")
            made = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            trial = path.with_name(f".{path.name}.try")
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}") from error
        finally:
            # Where the work fails, nothing of it is left.
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()

    on_rank0(write_and_delete)


def read_tensors(
    path: str | Path,
    file_format: str,
    facts: type[Record],
) -> tuple[dict[str, Tensor], Record]:
    """Read what `write_tensors` wrote: the tensors, and the facts as a record of the type `facts`.

    Raises `InputError` where the file is missing, damaged, of another format, or holds other facts.
    """
    # dean_interp.scores.1
    _, what, _ = file_format.split(".")
    refuse_folder(path, (what,))
    if not Path(path).is_file():
        raise InputError(f"no {what} file {path}")
    refuse_unreadable(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file)
            given = header.get("format")
            if given != file_format:
                raise InputError(f"{path} is not a {what} file{_instead(file_format, given)}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, TypeAdapter(facts).validate_python(header.get("facts"))
    except ValidationError as error:
        raise InputError(f"{path} is damaged or not a {what} file ({_first_error(error)})") from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged or not a {what} file ({error})") from error


def _instead(file_format: str, given: object) -> str:
    """What a file of another format holds, and which function reads it."""
    kind = _kind(str(given))
    if kind in _READ_BY_NAME and kind != _kind(file_format):
        return f": it is a file of the kind {kind!r}, which `load_{kind}` reads"
    return f" of this version ({file_format}), got {given!s:.60}"


def _kind(file_format: str) -> str:
    """The kind in a format: `gates` of `dean_interp.gates.1`; empty where it is none."""
    return f"{file_format}..".split(".")[1]


def refuse_folder(path: str | Path, kinds: Collection[str]) -> None:
    """Raise `InputError` where a path is a folder, with the files of these kinds that it holds."""
    if not Path(path).is_dir():
        return
    inside = [str(file) for file in sorted(Path(path).glob("*.safetensors")) if _kind(format_of(file)) in kinds]
    hint = f": give {' or '.join(inside)}" if inside else f", and holds no file of the kind {' or '.join(kinds)}"
    raise InputError(f"{path} is a folder, not a file{hint}")


def _header(file: Any) -> dict[str, Any]:  # noqa: ANN401 - an open file of safetensors
    """The format and the facts that a file holds; empty where another program wrote it."""
    metadata = file.metadata() or {}
    header = metadata.get(_METADATA_KEY, "{}")
    return TypeAdapter(dict[str, Any]).validate_json(header)


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
            return str(_header(file).get("format"))
    except (OSError, SafetensorError, ValidationError):
        return ""


def read_json(path: Path, kind: type[Record] | Any) -> Record:  # noqa: ANN401 - a class, or `dict[str, float]`
    """Read a JSON file as a record of the type `kind`.

    Raises `InputError` where the file cannot be read, is damaged (`DamagedFileError`), or holds something else.
    """
    refuse_unreadable(path)
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise DamagedFileError(f"{path} is damaged or of another version ({_first_error(error)})") from error


def _first_error(error: ValidationError) -> str:
    """The first error of a record that did not validate: the field, and what is wrong with it."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    first = errors[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"]
    return f"{field[:100]} {message[:300]}".strip()


def raise_if_damaged(path: str | Path, is_damaged: bool, what: str) -> None:
    """Raise `InputError` where the content of a file cannot be what was written: `what` says why."""
    if is_damaged:
        raise InputError(f"{path} is damaged ({what})")


def is_finite(tensor: Tensor, n_axes: int) -> bool:
    """Whether a tensor holds finite floats and has `n_axes` axes."""
    if tensor.dim() != n_axes or not tensor.is_floating_point():
        return False
    return bool(tensor.isfinite().all())


def is_ascending(indices: Tensor, n: int) -> bool:
    """Whether a tensor holds indices below `n`, each larger than the one before."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return False
    if not len(indices):
        return True
    is_inside = int(indices[0]) >= 0 and int(indices[-1]) < n
    return is_inside and bool((indices[1:] > indices[:-1]).all())
