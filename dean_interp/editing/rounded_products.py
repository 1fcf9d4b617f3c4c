"""Products that are rounded to a number format, and how they are undone.

    new = rounded(old * m)

The product is taken in float32 and rounded to the format of `old`. Rounding keeps the order of numbers, so the values
that give one `new` are neighbours, and they lie around `new / m`. Where `new` is a normal number they are at most two:
the interval that rounds to `new` is as wide as the gap between neighbours there, and divided by m it is less than two
gaps wide at `old`. Where they are two, one bit says which of them `old` was. Mostly there is one: with multipliers that
lie about 5 % from 1 some 6 % of the numbers need the bit, with those that lie about 30 % from 1 some 19 %.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dean_interp.editing.tensor_change import pieces
from dean_interp.errors import InputError

# Read as an integer of its size, a float's neighbour of larger magnitude is the next integer.
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Sources(NamedTuple):
    """What numbers may have been before they were multiplied."""

    lower: Int[Tensor, "row column"]
    """The value of smallest magnitude that gives the product, as the integer of its bits."""
    are_two: Bool[Tensor, "row column"]
    """Whether its neighbour gives the product, too."""


def scaled(
    old: Float[Tensor, "row column"],
    multipliers: Float[Tensor, " row"],
) -> Float[Tensor, "row column"]:
    """Each row times its multiplier, rounded to the rows' own format."""
    return (old.float() * multipliers[:, None]).to(old.dtype)


def sources(
    new: Float[Tensor, "row column"],
    multipliers: Float[Tensor, " row"],
) -> Sources:
    """What may have been multiplied to give `new`. For normal numbers this is all there is."""
    integers = _INTEGERS[new.dtype]
    product = new.abs()
    sizes = multipliers.abs()

    # The quotient, rounded, is at most one neighbour away from each value that gives the product.
    quotient = (product.float() / sizes[:, None]).to(new.dtype)
    middle = quotient.view(integers)
    below = middle - 1
    above = middle + 1
    # The integer below that of 0 is no number's, and gives nothing.
    by_below = scaled(below.view(new.dtype), sizes) == product
    by_middle = scaled(quotient, sizes) == product
    by_above = scaled(above.view(new.dtype), sizes) == product
    lower = torch.where(by_middle, middle, above)
    lower = torch.where(by_below, below, lower)
    are_two = by_middle & (by_below | by_above)

    # The sign bit of a product is that of `old` times that of m, for zeros too. It is an integer's highest bit.
    is_negative = new.signbit() != multipliers.signbit()[:, None]
    sign_bit = torch.iinfo(integers).min
    lower = torch.where(is_negative, lower + sign_bit, lower)
    return Sources(lower, are_two)


def is_next(
    old: Float[Tensor, "row column"],
    candidates: Sources,
) -> Bool[Tensor, "row column"]:
    """The bits: where `old` is the second of two sources."""
    distance = old.view(candidates.lower.dtype) - candidates.lower
    return candidates.are_two & (distance == 1)


def chosen(
    candidates: Sources,
    bits: Bool[Tensor, "row column"],
    dtype: torch.dtype,
) -> Float[Tensor, "row column"]:
    """The first or, where a bit is set, the second of two sources."""
    return (candidates.lower + bits).view(dtype)


def same_bits(
    first: Float[Tensor, "..."],
    second: Float[Tensor, "..."],
) -> Bool[Tensor, "..."]:
    """Where two tensors of one format hold the same bits: 0 is not -0."""
    integers = _INTEGERS[first.dtype]
    return first.view(integers) == second.view(integers)


def packed(bits: Bool[Tensor, " bit"]) -> UInt8[Tensor, " byte"]:
    """Bits, eight a byte; the last byte is filled up with zeros."""
    return torch.from_numpy(np.packbits(bits.numpy()))


def unpacked(packed_bits: UInt8[Tensor, " byte"]) -> Bool[Tensor, " bit"]:
    """The bits of all bytes."""
    return torch.from_numpy(np.unpackbits(packed_bits.numpy())).bool()


def narrowest_format(tensor: Float[Tensor, "..."]) -> torch.dtype:
    """The format of a tensor in half precision; of one in float32, the narrowest that holds every number of it.

    Raises `InputError` for another format.
    """
    if tensor.dtype not in _INTEGERS:
        formats = ", ".join(str(dtype).removeprefix("torch.") for dtype in _INTEGERS)
        raise InputError(f"gates are written into weights of {formats}, and these are {tensor.dtype}")
    if tensor.dtype != torch.float32:
        return tensor.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if _is_exact_in(dtype, tensor):
            return dtype
    return torch.float32


def _is_exact_in(dtype: torch.dtype, tensor: Float[Tensor, "..."]) -> bool:
    """Whether a format holds every number of a tensor."""
    for _, piece in pieces(tensor):
        if not torch.equal(piece.to(dtype).float(), piece):
            return False
    return True
