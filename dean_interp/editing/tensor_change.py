"""What an edit does to single numbers of one tensor: their places, what they were, and what they become.

It is one of two kinds of change; the other multiplies rows (`editing.row_scaling`). Both write themselves into a tensor
of the checkpoint's layout, undo themselves, and tell what a tensor is to them. A tensor is read in pieces, so that one
of any size needs little memory.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site, Unit

_N_AT_ONCE = 2**20
EditState = Literal["base", "edited", "both", "other"]
"""What a tensor is to an edit: as before, as after, both (the edit changes none of its numbers), or something else."""


@dataclass(frozen=True)
class TensorChange:
    """What an edit does to one tensor, in the checkpoint's layout (`(d_out, d_in)` for `nn.Linear`)."""

    is_rounded: ClassVar[bool] = False
    """Whether the numbers differ by rounding from what hooks compute with."""

    site: Site
    is_bias: bool
    is_transposed: bool
    """Whether the checkpoint stores the transpose of the site's `(d_in, d_out)`."""
    shape: tuple[int, ...]
    indices: Int[Tensor, " entry"]
    """Flat indices of the entries that change, ascending."""
    old: Float[Tensor, " entry"]
    new: Float[Tensor, " entry"]
    base: str
    """SHA-256 of the whole tensor before the edit, over its values in float32."""
    expert: int | None = None
    """Whose matrix it is, where a layer has routed experts: the tensor is that expert's own."""

    def __len__(self) -> int:
        """How many numbers change."""
        return len(self.indices)

    def write(self, tensor: Float[Tensor, "..."]) -> None:
        """Write the new values into the base."""
        tensor[self._axes] = self.new.to(tensor)

    def undo(self, tensor: Float[Tensor, "..."]) -> None:
        """Write the old values into the edited tensor."""
        tensor[self._axes] = self.old.to(tensor)

    def state(self, tensor: Float[Tensor, "..."]) -> EditState:
        """What a tensor is to this change. The tensor is only read."""
        if tuple(tensor.shape) != self.shape:
            return "other"
        current = tensor[self._axes].cpu()
        is_old = torch.equal(current.float(), self.old.float())
        is_new = torch.equal(current, self.new.to(current.dtype))
        if not (is_old or is_new):
            return "other"
        # All other numbers must be those of the base.
        if hash_of(self._undone(tensor)) != self.base:
            return "other"
        if is_old and is_new:
            return "both"
        return "base" if is_old else "edited"

    def settings(self) -> dict[tuple[str, int], float]:
        """What the change sets, to compare it with another's: each new value by its flat index."""
        settings = {}
        for index, new in zip(self.indices.tolist(), self.new.tolist(), strict=True):
            settings["entry", index] = new
        return settings

    def units(self, unit: Unit) -> Int[Tensor, " unit"]:
        """The weights that change; or the neurons, of whose rows of `out` every number changes."""
        if unit == "weight":
            return self.indices
        rows, columns = self._axes
        neurons, n_each = (columns, self.shape[0]) if self.is_transposed else (rows, self.shape[1])
        n_changed = torch.bincount(neurons)
        return (n_changed == n_each).nonzero()[:, 0]

    def stacked(self, other: "TensorChange", name: str) -> "TensorChange":
        """Two changes of the tensor `name` as one. Raises `InputError` where they set a number to two values."""
        # Entries that both change must get one value.
        in_both = torch.isin(self.indices, other.indices)
        place_in_other = torch.searchsorted(other.indices, self.indices[in_both])
        by_first = self.new[in_both].float()
        by_second = other.new[place_in_other].float()
        if not torch.equal(by_first, by_second):
            n_differ = int((by_first != by_second).sum())
            raise InputError(f"the edits set {n_differ} numbers of {name} to different values: they cannot be stacked")
        # Entries that only the second changes are added, and all are put in order.
        only_second = ~torch.isin(other.indices, self.indices)
        indices = torch.cat([self.indices, other.indices[only_second]])
        old = torch.cat([self.old, other.old[only_second]])
        new = torch.cat([self.new, other.new[only_second]])
        order = indices.argsort()
        return replace(
            self,
            indices=indices[order],
            old=old[order],
            new=new[order],
        )

    @property
    def _axes(self) -> tuple[Tensor, ...]:
        """Where the numbers that change are in their tensor: one index tensor an axis."""
        if len(self.shape) == 1:
            return (self.indices,)
        _, n_columns = self.shape
        rows = self.indices // n_columns
        columns = self.indices % n_columns
        return rows, columns

    def _undone(self, tensor: Float[Tensor, "..."]) -> Iterator[Tensor]:
        """The pieces of a tensor in float32, as they were before the change."""
        n_columns = tensor[0].numel()
        for start, piece in pieces(tensor):
            flat = float32(piece).flatten()
            places = self.indices - start * n_columns
            is_inside = (places >= 0) & (places < len(flat))
            flat[places[is_inside]] = self.old[is_inside].float()
            yield flat


def pieces(tensor: Float[Tensor, "..."]) -> Iterator[tuple[int, Float[Tensor, "..."]]]:
    """The rows of a tensor, some at a time: the first one's index, and a view of them."""
    n_columns = max(1, tensor[0].numel())
    n_rows = max(1, _N_AT_ONCE // n_columns)
    for start in range(0, len(tensor), n_rows):
        yield start, tensor[start : start + n_rows]


def float32(piece: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A copy in float32, on the CPU."""
    return piece.detach().to(device="cpu", dtype=torch.float32, copy=True)


def hash_of(float32_pieces: Iterable[Float[Tensor, "..."]]) -> str:
    """SHA-256 of a tensor that comes in pieces."""
    digest = hashlib.sha256()
    for piece in float32_pieces:
        digest.update(piece.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensor_hash(tensor: Float[Tensor, "..."]) -> str:
    """SHA-256 of a tensor's values in float32, in the checkpoint's layout, whatever its dtype."""
    return hash_of(float32(piece) for _, piece in pieces(tensor))


def refuse_not_finite(new: Float[Tensor, "..."], what: str) -> None:
    """Raise `InputError` where numbers that an edit would write are infinite, or no numbers."""
    if not new.isfinite().all():
        raise InputError(f"{what} are not finite in {new.dtype}: an edit must leave every number finite")
