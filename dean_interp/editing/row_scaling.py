"""What gates do to a matrix `out`: row i, which is what neuron i writes, is multiplied by the neuron's multiplier.

At most one bit a number undoes it (`editing.rounded_products`). What a bit cannot say is kept whole: the rows of
silenced neurons, and single numbers whose product fell below the smallest normal number of the format.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dean_interp.editing.rounded_products import Sources, chosen, packed, same_bits, scaled, sources, unpacked
from dean_interp.editing.row_blocks import RowBlock, row_blocks
from dean_interp.editing.tensor_change import EditState, TensorChange, float32, hash_of, pieces, tensor_hash
from dean_interp.errors import InputError
from dean_interp.models.sites import Site, Unit


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
        for block in self.blocks(tensor):
            old = block.read(self.dtype)
            block.write(self.multiplied(block, old))

    def undo(self, tensor: Float[Tensor, "..."]) -> None:
        """Write the old rows into the edited tensor."""
        for block, old in self._undoing(self.blocks(tensor)):
            block.write(old)

    def state(self, tensor: Float[Tensor, "..."]) -> EditState:
        """What a tensor is to this change. The tensor is only read."""
        if tuple(tensor.shape) != self.shape or tensor.dtype not in (self.dtype, torch.float32):
            return "other"
        if tensor_hash(tensor) == self.base:
            is_changed = any(map(self._changes, self.blocks(tensor)))
            return "base" if is_changed else "both"
        is_edited = hash_of(self._undone(tensor)) == self.base
        return "edited" if is_edited else "other"

    def settings(self) -> dict[tuple[str, int], float]:
        """What the change sets, to compare it with another's: each multiplier by its row."""
        settings = {}
        for row, multiplier in zip(self.rows.tolist(), self.multipliers.tolist(), strict=True):
            settings["row", row] = multiplier
        return settings

    def units(self, unit: Unit) -> Int[Tensor, " neuron"]:
        """The neurons that change; no weight is changed alone."""
        return self.rows if unit == "neuron" else self.rows[:0]

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
        bits_by_row = [*_bits_by_row(self), *_bits_by_row(other)]
        bits = torch.cat([bits_by_row[place] for place in order.tolist()])
        # A kept number stays in its column, and its row gets a new place.
        kept_at = torch.cat([self.kept_at, other.kept_at + len(self)])
        new_places = order.argsort()
        kept_row = new_places[kept_at // self.d_model]
        kept_column = kept_at % self.d_model
        kept_at = kept_row * self.d_model + kept_column
        order_of_kept = kept_at.argsort()
        return replace(
            self,
            rows=rows[order],
            multipliers=multipliers[order],
            n_bits=torch.cat([self.n_bits, other.n_bits])[order],
            bits=packed(bits),
            kept_at=kept_at[order_of_kept],
            kept=torch.cat([self.kept, other.kept])[order_of_kept],
            silenced=torch.cat([self.silenced, other.silenced])[order_of_silenced],
        )

    def blocks(self, tensor: Float[Tensor, "..."]) -> Iterator[RowBlock]:
        """What changes in each piece of the tensor."""
        return row_blocks(pieces(tensor), self.rows, is_transposed=self.is_transposed)

    def multiplied(
        self,
        block: RowBlock,
        old: Float[Tensor, "neuron column"],
    ) -> Float[Tensor, "neuron column"]:
        """The rows of a block times their multipliers, rounded."""
        return scaled(old, self.multipliers[block.neurons])

    def candidates(self, block: RowBlock, new: Float[Tensor, "neuron column"]) -> Sources:
        """What the numbers of a block may have been. Those of silenced rows are kept, and need no bits."""
        multipliers = self.multipliers[block.neurons]
        candidates = sources(new, multipliers)
        is_scaled = (multipliers != 0)[:, None]
        return candidates._replace(are_two=candidates.are_two & is_scaled)

    def _changes(self, block: RowBlock) -> bool:
        old = block.read(self.dtype)
        new = self.multiplied(block, old)
        return not bool(same_bits(new, old).all())

    def _undone(self, tensor: Float[Tensor, "..."]) -> Iterator[Tensor]:
        """The pieces of a tensor in float32, as they were before the change.

        They end early, and so have no base's hash, at a piece that is not what the change makes of them.
        """
        copies = ((start, float32(piece)) for start, piece in pieces(tensor))
        blocks = row_blocks(copies, self.rows, is_transposed=self.is_transposed)
        for block, old in self._undoing(blocks):
            new = block.read(torch.float32)
            again = self.multiplied(block, old).float()
            if not same_bits(again, new).all():
                return
            block.write(old)
            yield block.piece

    def _undoing(
        self,
        blocks: Iterable[RowBlock],
    ) -> Iterator[tuple[RowBlock, Float[Tensor, "neuron column"]]]:
        """The blocks of a whole tensor, in order, with what their numbers were before the change."""
        # One more, so that a tensor that needs other bits finds some: it is told by what they give.
        bits = torch.cat([unpacked(self.bits), torch.zeros(1, dtype=torch.bool)])
        # A row's bits begin where those of the rows before it end.
        next_bit = self.n_bits.cumsum(0) - self.n_bits
        for block in blocks:
            new = block.read(self.dtype)
            candidates = self.candidates(block, new)
            # Each row has its own bits, and a block takes the next ones of each.
            number_in_block = candidates.are_two.cumsum(1) - 1
            place = next_bit[block.neurons, None] + number_in_block
            next_bit[block.neurons] += candidates.are_two.sum(1)
            bit = bits[place.clamp(0, len(bits) - 1)]
            old = chosen(candidates, candidates.are_two & bit, self.dtype)
            self._put_back_kept(block, old)
            yield block, old

    def _put_back_kept(self, block: RowBlock, old: Float[Tensor, "neuron column"]) -> None:
        """Write the numbers and rows that are kept to their places in a block."""
        n_rows, n_columns = old.shape
        row = self.kept_at // self.d_model - block.neurons.start
        column = self.kept_at % self.d_model - block.columns.start
        has_row = (row >= 0) & (row < n_rows)
        has_column = (column >= 0) & (column < n_columns)
        is_inside = has_row & has_column
        old[row[is_inside], column[is_inside]] = self.kept[is_inside]
        # Silenced rows are kept in order: the block has those behind the silenced rows of earlier blocks.
        is_silenced = self.multipliers == 0
        first = int(is_silenced[: block.neurons.start].sum())
        last = int(is_silenced[: block.neurons.stop].sum())
        old[is_silenced[block.neurons]] = self.silenced[first:last, block.columns]


AnyChange = TensorChange | RowScaling
"""What an edit does to one tensor."""


def _bits_by_row(scaling: RowScaling) -> Sequence[Bool[Tensor, " bit"]]:
    # The last byte may be filled up.
    n_bits = int(scaling.n_bits.sum())
    bits = unpacked(scaling.bits)[:n_bits]
    return bits.split(scaling.n_bits.tolist())
