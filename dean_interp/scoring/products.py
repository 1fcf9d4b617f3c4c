"""The products that weights are scored by: over each example's own places, folded, and added up.

On a GPU where Triton is installed one kernel does it for all experts and folds (`scoring.product_kernel`): no product
of an example reaches memory. Elsewhere the twin below does the same, product by product.
"""

import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Fold = Literal["value", "size", "square"]
"""What of an example's effect is added up: its value, its absolute value, or its square."""


def add_products(
    totals: Mapping[Fold, Float[Tensor, "expert d_in d_out"]],
    x: Float[Tensor, "place d_in"],
    gradient: Float[Tensor, "place d_out"],
    counts: Int[Tensor, "expert example"],
) -> None:
    """Add each example's `x' @ gradient` to the totals, folded as each of them says. Sums are in float32.

    Places are sorted by expert, and by example within an expert. A dense matrix is one expert.

    Args:
        totals: float32, all laid out alike; views will do.
        x: what a matrix reads, place by place; float32, or in half precision on a GPU.
        gradient: the gradient of what it writes, at the same places.
        counts: how many places each example has in each expert; some may have none.
    """
    # A sum of values needs no product of its own for each example.
    if set(totals) == {"value"}:
        counts = counts.sum(1, keepdim=True)
    if x.is_cuda and _has_kernel(x.device):
        # Here, since Triton is no dependency of the CPU.
        from dean_interp.scoring.product_kernel import add_products_in_one

        add_products_in_one(totals, x, gradient, counts)
        return
    _add_one_by_one(totals, x.float(), gradient.float(), counts.tolist())


def _add_one_by_one(
    totals: Mapping[Fold, Float[Tensor, "expert d_in d_out"]],
    x: Float[Tensor, "place d_in"],
    gradient: Float[Tensor, "place d_out"],
    counts: list[list[int]],
) -> None:
    """What the kernel does, an expert and an example at a time."""
    only_values = set(totals) == {"value"}
    # The only memory that a fold needs is taken before anything is added: running out loses nothing.
    n_rows = 0 if only_values else x.shape[1]
    product = x.new_empty(n_rows, gradient.shape[1])
    start = 0
    for expert, lengths in enumerate(counts):
        for length in lengths:
            end = start + length
            read = x[start:end]
            written = gradient[start:end]
            start = end
            if not length:
                continue
            if only_values:
                totals["value"][expert].addmm_(read.T, written)
            else:
                torch.mm(read.T, written, out=product)
                _add_folds(totals, expert, product)


def _add_folds(
    totals: Mapping[Fold, Float[Tensor, "expert d_in d_out"]],
    expert: int,
    product: Float[Tensor, "d_in d_out"],
) -> None:
    """Add one product, which is used up: each fold is made of the one before, in place."""
    if "value" in totals:
        totals["value"][expert] += product
    if "size" in totals:
        totals["size"][expert] += product.abs_()
    if "square" in totals:
        totals["square"][expert] += product.square_()


def folded(effect: Float[Tensor, "example unit"], fold: Fold) -> Float[Tensor, "example unit"]:
    """What of each example's effect is added up."""
    if fold == "value":
        return effect
    if fold == "square":
        return effect.square()
    return effect.abs()


@cache
def _has_kernel(device: torch.device) -> bool:
    """Triton multiplies bfloat16 from compute capability 8.0 on."""
    is_installed = importlib.util.find_spec("triton") is not None
    return is_installed and torch.cuda.get_device_capability(device) >= (8, 0)
