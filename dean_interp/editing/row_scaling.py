"""What gates do to a matrix `out`: row i, which is what neuron i writes, is multiplied by the neuron's multiplier.

At most one bit a number undoes it (`editing.rounded_products`). What a bit cannot say is kept whole: the rows of
silenced neurons, and single numbers whose product fell below the smallest normal number of the format.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dean_interp.editing.rounded_products import Sources, chosen, is_next, narrowest_format, same_bits, scaled, sources
from dean_interp.editing.tensor_change import EditState, float32, hash_of, pieces, tensor_hash
from dean_interp.errors import InputError
from dean_interp.models.sites import Site


@dataclass(frozen=True)
class RowScaling:
    """What an edit does to the rows of one matrix `out`, with what undoes it: `bits`, `kept` and `silenced`."""

    is_bias: ClassVar[bool] = False

    site: Site
    is_transposed: bool
    """Whether the checkpoint stores the transpose of the site's `(d_mlp, d_model)`, as `nn.Linear` does."""
    shape: tuple[int, int]
    """The shape of the checkpoint's tensor."""
    dtype: torch.dtype
    """The format that products are rounded to."""
    rows: Int[Tensor, " neuron"]
    """The neurons that change, ascending."""
    multipliers: Float[Tensor, " neuron"]
    n_bits: Int[Tensor, " neuron"]
    """How many numbers of each row need a bit."""
    bits: UInt8[Tensor, " byte"]
    """The rows' bits, one row after the other, eight a byte."""
    kept_at: Int[Tensor, " entry"]
    """The numbers that bits do not tell, counted row by row over the rows that change; ascending."""
    kept: Float[Tensor, " entry"]
    silenced: Float[Tensor, "silenced d_model"]
    """The rows whose multiplier is 0."""
    base: str
    """SHA-256 of the whole tensor before the edit, over its values in float32."""
    expert: int | None = None
    """Whose `out` it is, where a layer has routed experts: the tensor is that expert's own."""

    def __len__(self) -> int:
        """How many numbers change."""
        return len(self.rows) * self.d_model

    @property
    def d_mlp(self) -> int:
        """How many rows `out` has."""
        return self.shape[1] if self.is_transposed else self.shape[0]

    @property
    def d_model(self) -> int:
        """How many numbers a row has."""
        return self.shape[0] if self.is_transposed else self.shape[1]

    @property
    def is_rounded(self) -> bool:
        """Whether the new numbers differ by more than float32's rounding from what hooks compute with."""
        return self.dtype != torch.float32

    def write(self, tensor: Float[Tensor, "..."]) -> None:
        """Multiply the rows of the base."""
        for block in self._blocks(pieces(tensor)):
            block.write(self._scaled(block, block.read(self.dtype)))

    def undo(self, tensor: Float[Tensor, "..."]) -> None:
        """Write the old rows into the edited tensor."""
        for block, old in self._undoing(self._blocks(pieces(tensor))):
            block.write(old)

    def state(self, tensor: Float[Tensor, "..."]) -> EditState:
        """What a tensor is to this change. The tensor is only read."""
        if tuple(tensor.shape) != self.shape or tensor.dtype not in (self.dtype, torch.float32):
            return "other"
        if tensor_hash(tensor) == self.base:
            return "base" if any(map(self._changes, self._blocks(pieces(tensor)))) else "both"
        return "edited" if hash_of(self._undone(tensor)) == self.base else "other"

    def settings(self) -> dict[tuple[str, int], float]:
        """What the change sets, to compare it with another's: each multiplier by its row."""
        return {("row", i): m for i, m in zip(self.rows.tolist(), self.multipliers.tolist(), strict=True)}

    def stacked(self, other: "RowScaling", name: str) -> "RowScaling":
        """Two scalings of the tensor `name` as one. Raises `InputError` where they share a row."""
        n_shared = int(torch.isin(self.rows, other.rows).sum())
        if n_shared:
            raise InputError(
                f"both edits multiply {n_shared} rows of {name}: they cannot be stacked. Make one edit of gates that "
                "hold both changes"
            )
        if self.dtype != other.dtype:
            raise InputError(f"the edits round {name} to {self.dtype} and to {other.dtype}: they cannot be stacked")
        # Rows are put in order, and with each row all that undoes it: its own bits, kept numbers, or all of it.
        rows = torch.cat([self.rows, other.rows])
        multipliers = torch.cat([self.multipliers, other.multipliers])
        order = rows.argsort()
        order_of_silenced = rows[multipliers == 0].argsort()
        # A kept number stays in its column, and its row gets a new place.
        kept_at = torch.cat([self.kept_at, other.kept_at + len(self)])
        kept_at = order.argsort()[kept_at // self.d_model] * self.d_model + kept_at % self.d_model
        order_of_kept = kept_at.argsort()
        bits = [*_bits_by_row(self), *_bits_by_row(other)]
        return replace(
            self,
            rows=rows[order],
            multipliers=multipliers[order],
            n_bits=torch.cat([self.n_bits, other.n_bits])[order],
            bits=_packed(torch.cat([bits[place] for place in order.tolist()])),
            kept_at=kept_at[order_of_kept],
            kept=torch.cat([self.kept, other.kept])[order_of_kept],
            silenced=torch.cat([self.silenced, other.silenced])[order_of_silenced],
        )

    def _scaled(self, block: "_Block", old: Float[Tensor, "neuron column"]) -> Float[Tensor, "neuron column"]:
        return scaled(old, self.multipliers[block.neurons])

    def _changes(self, block: "_Block") -> bool:
        old = block.read(self.dtype)
        return not bool(same_bits(self._scaled(block, old), old).all())

    def _undone(self, tensor: Float[Tensor, "..."]) -> Iterator[Tensor]:
        """The pieces of a tensor in float32, as they were before the change.

        They end early, and so have no base's hash, at a piece that is not what the change makes of them.
        """
        copies = ((start, float32(piece)) for start, piece in pieces(tensor))
        for block, old in self._undoing(self._blocks(copies)):
            again = self._scaled(block, old).float()
            if not same_bits(again, block.read(torch.float32)).all():
                return
            block.write(old)
            yield block.piece

    def _undoing(self, blocks: Iterable["_Block"]) -> Iterator[tuple["_Block", Float[Tensor, "neuron column"]]]:
        """The blocks of a whole tensor, in order, with what their numbers were before the change."""
        # One more, so that a tensor that needs other bits finds some: it is told by what they give.
        bits = torch.cat([_unpacked(self.bits), torch.zeros(1, dtype=torch.bool)])
        next_bit = self.n_bits.cumsum(0) - self.n_bits
        for block in blocks:
            found = self._sources(block, block.read(self.dtype))
            # Each row has its own bits, and a block takes the next ones of each.
            place = next_bit[block.neurons, None] + found.are_two.cumsum(1) - 1
            next_bit[block.neurons] += found.are_two.sum(1)
            is_second = found.are_two & bits[place.clamp(0, len(bits) - 1)]
            old = chosen(found, is_second, self.dtype)
            self._put_back_kept(block, old)
            yield block, old

    def _sources(self, block: "_Block", new: Float[Tensor, "neuron column"]) -> Sources:
        """What the numbers of a block may have been. Those of silenced rows are kept, and need no bits."""
        multipliers = self.multipliers[block.neurons]
        found = sources(new, multipliers)
        return found._replace(are_two=found.are_two & (multipliers != 0)[:, None])

    def _put_back_kept(self, block: "_Block", old: Float[Tensor, "neuron column"]) -> None:
        """Write the numbers and rows that are kept to their places in a block."""
        row, column = self.kept_at // self.d_model - block.neurons.start, self.kept_at % self.d_model
        column = column - block.columns.start
        is_inside = (row >= 0) & (row < old.shape[0]) & (column >= 0) & (column < old.shape[1])
        old[row[is_inside], column[is_inside]] = self.kept[is_inside]
        old[self.multipliers[block.neurons] == 0] = self.silenced[self._silenced_in(block), block.columns]

    def _silenced_in(self, block: "_Block") -> slice:
        """Which of the silenced rows a block has."""
        is_silenced = self.multipliers == 0
        return slice(int(is_silenced[: block.neurons.start].sum()), int(is_silenced[: block.neurons.stop].sum()))

    def _blocks(self, all_pieces: Iterable[tuple[int, Tensor]]) -> Iterator["_Block"]:
        """What changes in each piece of the tensor."""
        for start, piece in all_pieces:
            stop = start + len(piece)
            # A piece of the transpose has some columns of every row of `out`.
            if self.is_transposed:
                yield _Block(piece, piece.t(), self.rows, slice(0, len(self.rows)), slice(start, stop))
            else:
                first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
                yield _Block(piece, piece, self.rows[first:last] - start, slice(first, last), slice(0, self.d_model))


@dataclass(frozen=True)
class _Block:
    """What changes in one piece of a tensor: some of the rows that change, or some columns of all of them."""

    piece: Float[Tensor, "stored_row stored_column"]
    """The piece, in the checkpoint's layout."""
    turned: Float[Tensor, "row column"]
    """A view of the piece whose rows are those of `out`."""
    rows: Int[Tensor, " neuron"]
    """The rows of the piece that change."""
    neurons: slice
    """Which of all rows that change these are."""
    columns: slice
    """Which of all columns of `out` the piece has."""

    def read(self, dtype: torch.dtype) -> Float[Tensor, "neuron column"]:
        """The numbers that change, on the CPU: all arithmetic is done there, so that it is always the same."""
        return self.turned.detach()[self.rows].to("cpu", dtype)

    def write(self, values: Float[Tensor, "neuron column"]) -> None:
        """Put other numbers in their place."""
        self.turned[self.rows] = values.to(self.turned)


def row_scaling(
    stored: Float[Tensor, "..."],
    site: Site,
    rows: Int[Tensor, " neuron"],
    multipliers: Float[Tensor, " neuron"],
    *,
    is_transposed: bool,
    expert: int | None = None,
) -> RowScaling:
    """The change that multiplies some rows of `out`, whose tensor in the checkpoint's layout is `stored`.

    Products are rounded to the narrowest format that holds every number of the tensor, whatever it is loaded in: an
    edit of a bfloat16 checkpoint that was loaded in float32 fits the checkpoint.

    Raises:
        InputError: a product that is too large for the format.
    """
    dtype = narrowest_format(stored)
    d_model = stored.shape[0] if is_transposed else stored.shape[1]
    scaling = RowScaling(
        site=site,
        is_transposed=is_transposed,
        shape=(stored.shape[0], stored.shape[1]),
        dtype=dtype,
        rows=rows.cpu(),
        multipliers=multipliers.cpu().float(),
        n_bits=torch.zeros(len(rows), dtype=torch.int64),
        bits=torch.zeros(0, dtype=torch.uint8),
        kept_at=torch.zeros(0, dtype=torch.int64),
        kept=torch.zeros(0, dtype=dtype),
        silenced=torch.zeros(0, d_model, dtype=dtype),
        base=tensor_hash(stored),
        expert=expert,
    )
    return _with_corrections(scaling, stored)


def _with_corrections(scaling: RowScaling, stored: Float[Tensor, "..."]) -> RowScaling:
    """A scaling that holds nothing yet to undo it with, with all that."""
    shape = (len(scaling.rows), scaling.d_model)
    are_two, is_second, is_lost = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for block in scaling._blocks(pieces(stored)):
        place = block.neurons, block.columns
        old = block.read(scaling.dtype)
        new = scaling._scaled(block, old)
        _refuse_overflow(scaling, block, new)
        found = scaling._sources(block, new)
        are_two[place], is_second[place] = found.are_two, is_next(old, found)
        is_lost[place] = ~same_bits(chosen(found, is_second[place], scaling.dtype), old)
    # Silenced rows are kept as such.
    is_silenced = scaling.multipliers == 0
    row, column = (is_lost & ~is_silenced[:, None]).nonzero(as_tuple=True)
    matrix = stored.t() if scaling.is_transposed else stored
    return replace(
        scaling,
        n_bits=are_two.sum(1),
        bits=_packed(is_second[are_two]),
        kept_at=row * scaling.d_model + column,
        kept=matrix[scaling.rows[row], column].to("cpu", scaling.dtype),
        silenced=matrix[scaling.rows[is_silenced]].to("cpu", scaling.dtype),
    )


def _refuse_overflow(scaling: RowScaling, block: _Block, new: Float[Tensor, "neuron column"]) -> None:
    is_finite = new.isfinite().all(dim=1)
    if is_finite.all():
        return
    place = int((~is_finite).nonzero()[0]) + block.neurons.start
    of_expert = "" if scaling.expert is None else f" of expert {scaling.expert}"
    neuron = f"neuron {int(scaling.rows[place])}{of_expert}"
    raise InputError(
        f"{scaling.multipliers[place]:.3g} times the row of {neuron} at {scaling.site} is not "
        f"finite in {scaling.dtype}: a gate must leave every weight finite"
    )


def _bits_by_row(scaling: RowScaling) -> Sequence[Bool[Tensor, " bit"]]:
    return _unpacked(scaling.bits)[: int(scaling.n_bits.sum())].split(scaling.n_bits.tolist())


def _packed(bits: Bool[Tensor, " bit"]) -> UInt8[Tensor, " byte"]:
    return torch.from_numpy(np.packbits(bits.numpy()))


def _unpacked(packed: UInt8[Tensor, " byte"]) -> Bool[Tensor, " bit"]:
    return torch.from_numpy(np.unpackbits(packed.numpy())).bool()
