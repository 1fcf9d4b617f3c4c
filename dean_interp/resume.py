"""What lets a killed run go on: the settings that it was begun with, and the running sums of its loops over batches.

A run in a folder goes on under the settings of `config.json` alone. Of a loop the sums of the finished batches are
kept, so that it goes on with the next one.
"""

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field
from torch import Tensor

from dean_interp.distributed import is_rank0, rank, world_size
from dean_interp.errors import DamagedFileError, InputError
from dean_interp.files import Record, read_json, read_tensors, write_tensors_of_this_rank

CONFIG_FILE = "config.json"
Config = TypeVar("Config")
_FORMAT = "dean_interp.resume.1"


@dataclass(frozen=True)
class RunSettings(Generic[Config]):
    """What `config.json` holds: what a run was begun with."""

    config: Config
    data: dict[str, str]
    """Fingerprints of its data sets (`data_fingerprints`)."""


def refuse_other_settings(
    folder: Path, there: RunSettings[dict[str, Any]], wanted: RunSettings[dict[str, Any]]
) -> None:
    """Raise `InputError` where a run was begun with other settings or other data than are wanted."""
    begun = _flat(there.config)
    changes = []
    for name, now in _flat(wanted.config).items():
        then = begun.get(name)
        if then != now:
            changes.append(f"{name[-1]} ({then} there, {now} now)")
    if changes:
        raise InputError(f"{folder} holds a run with another {', '.join(changes)}: choose another folder")
    changed = [name for name, now in wanted.data.items() if there.data.get(name) != now]
    if changed:
        raise InputError(
            f"the data of {', '.join(changed)} changed since the run in {folder} began: put them back, or choose "
            "another folder"
        )


def _flat(settings: Mapping[str, Any], groups: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every setting by its groups and its own name: two groups may have a setting of one name, such as `seed`."""
    flat = {}
    for name, value in settings.items():
        key = (*groups, name)
        if isinstance(value, dict):
            flat |= _flat(value, key)
        else:
            flat[key] = value
    return flat


def read_kept(path: Path, kind: type[Record] | Any) -> Record:  # noqa: ANN401 - a class, or `dict[str, float]`
    """Read what finished work left as JSON, as `read_json` does.

    A damaged file is not made anew unasked: it may be the work of hours, of which something can be saved, and what
    damaged it may have damaged others. The error says that it can be deleted.
    """
    try:
        return read_json(path, kind)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}: where it is deleted, the same call makes it anew") from error


@dataclass(frozen=True)
class _Facts:
    fingerprint: str
    n_batches: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Unfinished:
    """A file with the running sums of an unfinished loop over batches.

    A new file replaces the old one after every batch, so it is whole at every moment. Whoever saves the loop's result
    calls `discard` afterwards. Each rank keeps the sums of its own shard in a file of its own.
    """

    path: Path
    fingerprint: str
    """Identifies everything that the sums depend on, the batches too: other sums are not restored."""

    def restore(self, sums: Mapping[str, Tensor]) -> int:
        """Copy the stored sums into the given tensors, in place.

        Returns how many batches the sums hold. This is 0, and nothing is copied, where there is no file, or one that is
        damaged, of another version, of another fingerprint or of other tensors: the loop begins anew.
        """
        if not self._path_of_this_rank.is_file():
            return 0
        try:
            stored, facts = read_tensors(self._path_of_this_rank, _FORMAT, _Facts)
        except InputError:
            return 0
        if facts.fingerprint != self.fingerprint or _shapes(stored) != _shapes(sums):
            return 0
        for name, tensor in sums.items():
            tensor.copy_(stored[name])
        return facts.n_batches

    def keep(self, sums: Mapping[str, Tensor], *, n_batches: int) -> None:
        """Write the sums of the first `n_batches` batches."""
        facts = {"fingerprint": self.fingerprint, "n_batches": n_batches}
        write_tensors_of_this_rank(self._path_of_this_rank, _FORMAT, sums, facts)

    def part(self, name: str) -> "Unfinished":
        """A file beside this one, for one of several loops that make one result."""
        return Unfinished(_path_of_part(self.path, name), self.fingerprint)

    def discard(self) -> None:
        """Delete the file, its parts and those of the other ranks."""
        discard(self.path)

    @property
    def _path_of_this_rank(self) -> Path:
        if world_size() == 1:
            return self.path
        return _path_of_part(self.path, f"{rank()}of{world_size()}")


def discard(path: Path) -> None:
    """Delete what `Unfinished` wrote for a loop at `path`, its parts and those of all ranks; rank 0 does it."""
    if is_rank0():
        parts = path.parent.glob(f"{glob.escape(path.stem)}~*{path.suffix}")
        for file in (path, *parts):
            file.unlink(missing_ok=True)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _path_of_part(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}~{name}{path.suffix}")
