"""`scoring.products.add_products` as one Triton kernel: a program for each tile of the matrix.

A program goes through the examples. It multiplies over an example's places in the inputs' precision with float32 sums,
folds the product while it is in registers, and adds to the total once, at the end.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dean_interp.scoring.products import Fold

_FOLDS: dict[Fold, int] = {"value": 0, "size": 1, "square": 2}
_ROWS, _COLUMNS, _PLACES = 64, 64, 32
"""Rows and columns of a tile, and places that are multiplied at once."""


@triton.jit
def _add_folded(
    total: tl.tensor,
    x: tl.tensor,
    gradient: tl.tensor,
    starts: tl.tensor,
    n_examples: tl.tensor,
    d_in: tl.tensor,
    d_out: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    fold: tl.constexpr,
    rows_a_tile: tl.constexpr,
    columns_a_tile: tl.constexpr,
    places_at_once: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * rows_a_tile + tl.arange(0, rows_a_tile)
    j = tl.program_id(1).to(tl.int64) * columns_a_tile + tl.arange(0, columns_a_tile)
    is_row, is_column = i < d_in, j < d_out
    added = tl.zeros((rows_a_tile, columns_a_tile), dtype=tl.float32)
    for example in range(n_examples):
        first, end = tl.load(starts + example), tl.load(starts + example + 1)
        product = tl.zeros((rows_a_tile, columns_a_tile), dtype=tl.float32)
        for start in range(first, end, places_at_once):
            k = start + tl.arange(0, places_at_once)
            is_place = k < end
            read = tl.load(x + k[None, :] * d_in + i[:, None], mask=is_row[:, None] & is_place[None, :], other=0.0)
            written = tl.load(
                gradient + k[:, None] * d_out + j[None, :], mask=is_place[:, None] & is_column[None, :], other=0.0
            )
            product = tl.dot(read, written, product, input_precision="ieee")
        if fold == 1:
            product = tl.abs(product)
        if fold == 2:
            product = product * product
        added += product
    place = total + i[:, None] * row_stride + j[None, :] * column_stride
    is_inside = is_row[:, None] & is_column[None, :]
    tl.store(place, tl.load(place, mask=is_inside, other=0.0) + added, mask=is_inside)


def add_products_in_one(
    total: Float[Tensor, "d_in d_out"],
    x: Float[Tensor, "place d_in"],
    gradient: Float[Tensor, "place d_out"],
    lengths: Sequence[int],
    fold: Fold,
) -> None:
    """Arguments as of `add_products`. `x` and `gradient` are multiplied in the wider of their formats."""
    dtype = torch.promote_types(x.dtype, gradient.dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(total.device)
    d_in, d_out = total.shape
    _add_folded[(triton.cdiv(d_in, _ROWS), triton.cdiv(d_out, _COLUMNS))](
        total,
        x.to(dtype).contiguous(),
        gradient.to(dtype).contiguous(),
        starts,
        len(lengths),
        d_in,
        d_out,
        total.stride(0),
        total.stride(1),
        fold=_FOLDS[fold],
        rows_a_tile=_ROWS,
        columns_a_tile=_COLUMNS,
        places_at_once=_PLACES,
    )
