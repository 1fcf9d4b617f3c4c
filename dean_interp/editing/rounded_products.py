"""Products that are rounded to a number format, and how they are undone.

    new = rounded(old * m)

The product is taken in float32 and rounded to the format of `old`. Rounding keeps the order of numbers, so the values
that give one `new` are neighbours, and they lie around `new / m`. Where `new` is a normal number they are at most two:
the interval that rounds to `new` is as wide as the gap between neighbours there, and divided by m it is less than two
gaps wide at `old`. Where they are two, one bit says which of them `old` was. Mostly there is one: with multipliers that
lie about 5 % from 1 some 6 % of the numbers need the bit, with those that lie about 30 % from 1 some 19 %.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.editing.tensor_change import pieces

# Read as an integer of its size, a float's neighbour of larger magnitude is the next integer.
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Sources(NamedTuple):
    """What numbers may have been before they were multiplied."""

    lower: Int[Tensor, "row column"]
    """The value of smallest magnitude that gives the product, as the integer of its bits."""
    are_two: Bool[Tensor, "row column"]
    """Whether its neighbour gives the product, too."""


def scaled(old: Float[Tensor, "row column"], multipliers: Float[Tensor, " row"]) -> Float[Tensor, "row column"]:
    """Each row times its multiplier, rounded to the rows' own format."""
    return (old.float() * multipliers[:, None]).to(old.dtype)


def sources(new: Float[Tensor, "row column"], multipliers: Float[Tensor, " row"]) -> Sources:
    """What may have been multiplied to give `new`. Only of normal numbers is this all there is."""
    integers, product, sizes = _INTEGERS[new.dtype], new.abs(), multipliers.abs()
    # The quotient, rounded, is at most one neighbour away from each value that gives the product. The integer below
    # that of 0 is no number's, and gives nothing.
    quotient = (product.float() / sizes[:, None]).to(new.dtype).view(integers)
    below, above = quotient - 1, quotient + 1
    by_below, by_quotient, by_above = (
        scaled(value.view(new.dtype), sizes) == product for value in (below, quotient, above)
    )
    lower = torch.where(by_below, below, torch.where(by_quotient, quotient, above))
    are_two = by_quotient & (by_below | by_above)
    # The sign bit of a product is that of `old` times that of m, for zeros too.
    is_negative = new.signbit() != multipliers.signbit()[:, None]
    return Sources(torch.where(is_negative, lower + torch.iinfo(integers).min, lower), are_two)


def is_next(old: Float[Tensor, "row column"], found: Sources) -> Bool[Tensor, "row column"]:
    """The bits: where `old` is the second of two sources."""
    return found.are_two & (old.view(found.lower.dtype) - found.lower == 1)


def chosen(found: Sources, bits: Bool[Tensor, "row column"], dtype: torch.dtype) -> Float[Tensor, "row column"]:
    """The first or, where a bit is set, the second of two sources."""
    return (found.lower + bits).view(dtype)


def same_bits(first: Float[Tensor, "..."], second: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Where two tensors of one format hold the same bits: 0 is not -0."""
    integers = _INTEGERS[first.dtype]
    return first.view(integers) == second.view(integers)


def narrowest_format(tensor: Float[Tensor, "..."]) -> torch.dtype:
    """The format of a tensor in half precision; of one in float32, the narrowest that holds every number of it."""
    if tensor.dtype != torch.float32:
        return tensor.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(piece.to(dtype).float(), piece) for _, piece in pieces(tensor)):
            return dtype
    return torch.float32
