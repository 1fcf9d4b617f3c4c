"""Sums over some positions of what the units of a site read, and how many reads were added up."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.neurons import routed_ids, summed_over_positions
from dean_interp.models.sites import Site

_READ_BY_OWN_EXPERT = ("experts", "experts.out")
"""Parts of which each unit is read only where its own expert is."""


def summed_where(
    model: HookedModel,
    site: Site,
    values: Float[Tensor, "batch pos *slot width"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " unit"]:
    """The sum over some positions of something of what a site's units read.

    Experts' `gate` and `in` read the same numbers in every slot of a position; each neuron is read where its expert is.
    """
    # The mask gets an axis of length 1 for each one that the values have beside batch and positions.
    where = where.to(values.device)
    n_further_axes = values.dim() - 2
    mask = where.reshape(*where.shape, *[1] * n_further_axes)
    values = values * mask
    if site.part in _READ_BY_OWN_EXPERT:
        return summed_over_positions(model, site, values).sum(0)
    if site.is_of_experts:
        return values.flatten(0, 2).sum(0)
    return values.sum((0, 1))


def slots_where(
    model: HookedModel,
    site: Site,
    where: Bool[Tensor, "batch pos"],
) -> Int[Tensor, " n_experts"]:
    """How many slots each expert of a site got at some positions."""
    ids = routed_ids(model, site)
    # Masks and `bincount` would wait for a GPU.
    is_counted = where.to(ids)
    counted = is_counted[..., None].expand_as(ids)
    counts = torch.zeros(site.n_experts, dtype=ids.dtype, device=ids.device)
    return counts.index_add_(0, ids.flatten(), counted.flatten())


def n_read(
    site: Site,
    sums: Mapping[str, Tensor],
    n_positions: int,
) -> int | Float[Tensor, " unit"]:
    """How often what a site's units read was added up: at every position, or at the slots of an expert (at least 1).

    Args:
        sums: holds `slots/` and `square/` of a site of experts.
    """
    if not site.is_of_experts:
        return n_positions
    slots = sums[f"slots/{site}"]
    if site.part in _READ_BY_OWN_EXPERT:
        n_units = len(sums[f"square/{site}"])
        units_per_expert = n_units // site.n_experts
        return slots.clamp(min=1).repeat_interleave(units_per_expert)
    return int(slots.sum())
