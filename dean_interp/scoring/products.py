"""The products that weights are scored by: over each example's own places, folded, and added up.

On a GPU where Triton is installed one kernel does it (`scoring.product_kernel`): no product of an example reaches
memory. Elsewhere the twin below does the same, product by product.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Fold = Literal["value", "size", "square"]
"""What of an example's effect is added up: its value, its absolute value, or its square."""


def add_products(
    total: Float[Tensor, "d_in d_out"],
    x: Float[Tensor, "place d_in"],
    gradient: Float[Tensor, "place d_out"],
    lengths: Sequence[int],
    fold: Fold,
) -> None:
    """Add each example's `x' @ gradient` to `total`, folded. Sums are in float32.

    Args:
        total: float32; a view will do.
        x: what a matrix reads, an example's places after another's; float32, or in half precision on a GPU.
        gradient: the gradient of what it writes, at the same places.
        lengths: how many places each example has; some may have none.
        fold: what of an example's product is added.
    """
    if total.is_cuda and _has_kernel():
        # Here, since Triton is no dependency of the CPU.
        from dean_interp.scoring.product_kernel import add_products_in_one

        add_products_in_one(total, x, gradient, lengths, fold)
        return
    x, gradient = x.float(), gradient.float()
    if fold == "value":
        total.addmm_(x.T, gradient)
        return
    # The only memory that a fold needs is taken before anything is added: running out loses nothing.
    product = torch.empty(total.shape, device=total.device)
    for read, written in zip(x.split(list(lengths)), gradient.split(list(lengths)), strict=True):
        if len(read):
            torch.mm(read.T, written, out=product)
            total += product.square_() if fold == "square" else product.abs_()


def folded(effect: Float[Tensor, "example unit"], fold: Fold) -> Float[Tensor, "example unit"]:
    """What of each example's effect is added up."""
    if fold == "value":
        return effect
    return effect.square() if fold == "square" else effect.abs()


@cache
def _has_kernel() -> bool:
    return importlib.util.find_spec("triton") is not None
