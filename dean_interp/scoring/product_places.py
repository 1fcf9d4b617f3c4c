"""What `products.add_products` takes of a batch: its places without padding, sorted by expert, and by example."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ProductPlaces:
    """What a matrix reads and the gradient of what it writes, place by place; by example within each expert."""

    read: Float[Tensor, "place d_in"]
    gradient: Float[Tensor, "place d_out"]
    counts: Int[Tensor, "expert example"]
    """How many places each example has in each expert."""


def dense_places(
    x: Float[Tensor, "batch pos d_in"],
    gradient: Float[Tensor, "batch pos d_out"],
    *,
    places: Int[Tensor, " place"],
    lengths: Int[Tensor, " example"],
) -> ProductPlaces:
    """The places of a dense matrix, which is one expert.

    Args:
        x: what the matrix reads.
        gradient: the gradient of what it writes.
        places: the positions without padding, as one axis of the batch; they stand in the order of the examples.
        lengths: how many of them each example has.
    """
    return ProductPlaces(
        read=x.flatten(0, 1)[places],
        gradient=gradient.flatten(0, 1)[places],
        counts=lengths[None],
    )


def expert_places(
    x: Float[Tensor, "batch pos slot d_in"],
    gradient: Float[Tensor, "batch pos slot d_out"],
    *,
    places: Int[Tensor, " place"],
    ids: Int[Tensor, "batch pos slot"],
    n_experts: int,
    n_examples: int,
    rows_each: int,
) -> ProductPlaces:
    """The slots of the places, sorted by the expert that they were sent to.

    Args:
        x: what the experts read.
        gradient: the gradient of what they write.
        places: as of `dense_places`.
        ids: the expert of each slot.
        n_experts: experts of the layer.
        n_examples: examples of the batch.
        rows_each: so many rows that follow each other make one example.
    """
    _, n_positions, n_slots = ids.shape
    # Slots stand in the order of the places, and places in that of the examples: a stable sort keeps it.
    experts = ids.flatten(0, 1)[places].flatten()
    order = experts.argsort(stable=True)
    place = places[order // n_slots]
    slot = place * n_slots + order % n_slots
    example = place // (rows_each * n_positions)
    # Each pair of an expert and an example has a number, by which its slots are counted.
    pair = experts[order] * n_examples + example
    counts = torch.zeros(n_experts * n_examples, dtype=torch.int64, device=x.device)
    counts.index_add_(0, pair, torch.ones_like(pair))
    return ProductPlaces(
        read=x.flatten(0, 2)[slot],
        gradient=gradient.flatten(0, 2)[slot],
        counts=counts.unflatten(0, (n_experts, n_examples)),
    )
