"""The rows of a matrix `out` that a change multiplies, a piece of the tensor at a time.

A tensor of any size is read in pieces of its stored rows. Where a checkpoint stores `out` as its transpose, a piece has
some columns of every row of `out`; else it has some rows whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class RowBlock:
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


def row_blocks(
    pieces_of_tensor: Iterable[tuple[int, Float[Tensor, "stored_row stored_column"]]],
    rows: Int[Tensor, " neuron"],
    *,
    is_transposed: bool,
) -> Iterator[RowBlock]:
    """What changes in each piece of a tensor, whose first stored row comes with it.

    Args:
        pieces_of_tensor: the pieces in order, each with the index of its first stored row.
        rows: the rows of `out` that change, ascending.
        is_transposed: whether the tensor is the transpose of `out`.
    """
    for start, piece in pieces_of_tensor:
        stop = start + len(piece)
        if is_transposed:
            yield RowBlock(
                piece=piece,
                turned=piece.t(),
                rows=rows,
                neurons=slice(0, len(rows)),
                columns=slice(start, stop),
            )
        else:
            first, last = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
            yield RowBlock(
                piece=piece,
                turned=piece,
                rows=rows[first:last] - start,
                neurons=slice(first, last),
                columns=slice(0, piece.shape[1]),
            )
