"""`scoring.products.add_products` as one Triton kernel: a program for each tile of each expert's matrix.

A program goes through the examples. It multiplies over an example's places in the inputs' precision with float32 sums,
folds the product while it is in registers, and adds to each total once, at the end. What is added is the same in every
run: no two programs write to one place. Long offsets are the pointers' own; those inside a tile are short, and fewer
registers hold them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.scoring.products import Fold


# Compiled once, not anew for some numbers of examples.
@triton.jit(do_not_specialize=["n_examples"])
def _add_folded(
    values: tl.tensor,
    sizes: tl.tensor,
    squares: tl.tensor,
    x: tl.tensor,
    gradient: tl.tensor,
    starts: tl.tensor,
    n_examples: tl.tensor,
    d_in: tl.tensor,
    d_out: tl.tensor,
    expert_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    to_values: tl.constexpr,
    to_sizes: tl.constexpr,
    to_squares: tl.constexpr,
    rows_a_tile: tl.constexpr,
    columns_a_tile: tl.constexpr,
    places_at_once: tl.constexpr,
) -> None:
    expert = tl.program_id(2).to(tl.int64)
    starts += expert * n_examples
    # An expert that no token was sent to has nothing to add.
    if tl.load(starts) == tl.load(starts + n_examples):
        return
    row, column = tl.program_id(0) * rows_a_tile, tl.program_id(1) * columns_a_tile
    i, j = tl.arange(0, rows_a_tile)[:, None], tl.arange(0, columns_a_tile)[None, :]
    is_row, is_column = row + i < d_in, column + j < d_out
    value = tl.zeros((rows_a_tile, columns_a_tile), dtype=tl.float32)
    size, square = value, value
    first, end = tl.load(starts), tl.load(starts + 1)
    for example in range(n_examples):
        # Where the next example ends is fetched while this one is multiplied.
        next_end = tl.load(starts + tl.minimum(example + 2, n_examples))
        product = _product(x + row, gradient + column, first, end, d_in, d_out, i, j, is_row, is_column, places_at_once)
        if to_values:
            value += product
        if to_sizes:
            size += tl.abs(product)
        if to_squares:
            square += product * product
        first, end = end, next_end
    corner = expert * expert_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    place, is_inside = i * row_stride + j * column_stride, is_row & is_column
    if to_values:
        _add_to(values + corner + place, value, is_inside)
    if to_sizes:
        _add_to(sizes + corner + place, size, is_inside)
    if to_squares:
        _add_to(squares + corner + place, square, is_inside)


@triton.jit
def _product(
    x: tl.tensor,
    gradient: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    d_in: tl.tensor,
    d_out: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    is_row: tl.tensor,
    is_column: tl.tensor,
    places_at_once: tl.constexpr,
) -> tl.tensor:
    k = tl.arange(0, places_at_once)
    product = tl.zeros((i.shape[0], j.shape[1]), dtype=tl.float32)
    for start in range(first, end, places_at_once):
        is_place = start + k < end
        read_at = x + start * d_in + (k[None, :] * d_in + i)
        read = tl.load(read_at, mask=is_row & is_place[None, :], other=0.0)
        written_at = gradient + start * d_out + (k[:, None] * d_out + j)
        written = tl.load(written_at, mask=is_place[:, None] & is_column, other=0.0)
        product = tl.dot(read, written, product, input_precision="ieee")
    return product


@triton.jit
def _add_to(places: tl.tensor, added: tl.tensor, is_inside: tl.tensor) -> None:
    before = tl.load(places, mask=is_inside, other=0.0)
    tl.store(places, before + added, mask=is_inside)


@dataclass(frozen=True)
class Tile:
    """How much one program of the kernel does at once."""

    rows_a_tile: int
    columns_a_tile: int
    places_at_once: int
    num_warps: int


def tile_of(dtype: torch.dtype, n_folds: int) -> Tile:
    """The tile whose sums stay in registers: the product, and one sum for each fold."""
    if dtype == torch.float32:
        columns = 64 if n_folds < 3 else 32
        return Tile(rows_a_tile=64, columns_a_tile=columns, places_at_once=32, num_warps=4)
    columns = 128 if n_folds == 1 else 64
    return Tile(rows_a_tile=128, columns_a_tile=columns, places_at_once=32, num_warps=8)


def add_products_in_one(
    totals: Mapping[Fold, Float[Tensor, "expert d_in d_out"]],
    x: Float[Tensor, "place d_in"],
    gradient: Float[Tensor, "place d_out"],
    counts: Int[Tensor, "expert example"],
) -> None:
    """Arguments as of `add_products`. `x` and `gradient` are multiplied in the wider of their formats."""
    dtype = torch.promote_types(x.dtype, gradient.dtype)
    total = next(iter(totals.values()))
    assert {each.stride() for each in totals.values()} == {total.stride()}, "totals are laid out alike"
    n_experts, d_in, d_out = total.shape
    tile = tile_of(dtype, len(totals))
    ends = counts.flatten().cumsum(0)
    starts = torch.nn.functional.pad(ends, (1, 0))
    expert_stride, row_stride, column_stride = total.stride()
    # One program for each tile of each expert's matrix.
    n_row_tiles = triton.cdiv(d_in, tile.rows_a_tile)
    n_column_tiles = triton.cdiv(d_out, tile.columns_a_tile)
    grid = (n_row_tiles, n_column_tiles, n_experts)
    # Triton starts kernels on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(total):
        # A fold that is not asked for has no total; the kernel does not touch what stands in its place.
        _add_folded[grid](
            values=totals.get("value", total),
            sizes=totals.get("size", total),
            squares=totals.get("square", total),
            x=x.to(dtype).contiguous(),
            gradient=gradient.to(dtype).contiguous(),
            starts=starts.to(total.device),
            n_examples=counts.shape[1],
            d_in=d_in,
            d_out=d_out,
            expert_stride=expert_stride,
            row_stride=row_stride,
            column_stride=column_stride,
            to_values="value" in totals,
            to_sizes="size" in totals,
            to_squares="square" in totals,
            rows_a_tile=tile.rows_a_tile,
            columns_a_tile=tile.columns_a_tile,
            places_at_once=tile.places_at_once,
            num_warps=tile.num_warps,
        )
