"""What the finished batches of a loop left behind, on disk, so that a killed run goes on with the next batch."""

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dean_interp.distributed import is_rank0, n_processes, rank
from dean_interp.errors import InputError
from dean_interp.files import read_tensors, write_own_tensors

_FORMAT = "dean_interp.resume.1"


@dataclass(frozen=True)
class _Facts:
    fingerprint: str
    n_batches: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Unfinished:
    """The running sums of a loop over batches, in one file that is replaced after every batch.

    The file is whole at every moment. Whoever saves the loop's result calls `discard` after that. Each of several
    processes keeps its share in a file of its own.
    """

    path: Path
    fingerprint: str
    """Of everything that the sums depend on, the batches included: sums of anything else are not taken up."""

    def restore(self, sums: Mapping[str, Tensor]) -> int:
        """Put the stored sums into the given tensors, in place. Returns how many batches they hold (0: none)."""
        if not self._own.is_file():
            return 0
        try:
            stored, facts = read_tensors(self._own, _FORMAT, _Facts)
        except InputError:  # not ours, damaged, or of another version: the loop begins anew
            return 0
        if facts.fingerprint != self.fingerprint or _kinds(stored) != _kinds(sums):
            return 0
        for name, tensor in sums.items():
            tensor.copy_(stored[name])
        return facts.n_batches

    def keep(self, sums: Mapping[str, Tensor], *, n_batches: int) -> None:
        """Write the sums of the first `n_batches` batches."""
        write_own_tensors(self._own, _FORMAT, sums, {"fingerprint": self.fingerprint, "n_batches": n_batches})

    def part(self, name: str) -> "Unfinished":
        """The same for one of several loops that make one result."""
        return Unfinished(_part(self.path, name), self.fingerprint)

    def discard(self) -> None:
        """The result is safe elsewhere: its parts go too."""
        discard(self.path)

    @property
    def _own(self) -> Path:
        return self.path if n_processes() == 1 else _part(self.path, f"{rank()}of{n_processes()}")


def discard(path: Path) -> None:
    """Delete what a loop left at `path`, and at its parts."""
    for left in (path, *path.parent.glob(f"{glob.escape(path.stem)}~*{path.suffix}")) if is_rank0() else ():
        left.unlink(missing_ok=True)


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _part(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}~{name}{path.suffix}")
