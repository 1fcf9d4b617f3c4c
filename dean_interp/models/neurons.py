"""Reading and changing neurons at their hook points, dense ones and those of routed experts alike.

Units are numbered as their site counts them (of experts: expert by expert). A neuron of an expert that a token was not
sent to writes nothing there: its activation reads as 0, and it cannot be changed.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.models.experts import RoutedExperts, by_expert, routed_experts
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sites import Site


def read_neurons(
    model: HookedModel,
    site: Site,
    activation: Float[Tensor, "..."],
    units: Int[Tensor, " unit"],
    *,
    ids: Int[Tensor, "batch pos slot"] | None = None,
) -> Float[Tensor, "*lead unit"]:
    """Some neurons' activations at every position, from what a pass has at the site's hook point.

    `*lead` is batch and position (some dense models, OPT, join them). `ids` are the experts that the tokens of the pass
    were sent to; None: those of the running pass.
    """
    units = units.to(activation.device)
    if not site.is_of_experts:
        return activation[..., units]
    experts, running = _running(model, site)
    ids = running if ids is None else ids
    ids = ids.to(activation.device)
    n_rows, n_positions, n_slots = ids.shape
    by_slot = activation.reshape(ids.numel(), experts.d_expert)
    read = by_slot.new_zeros(n_rows * n_positions, len(units))
    for chosen in _chosen_slots(experts, ids, units):
        slots = chosen.slots[:, None]
        tokens = slots // n_slots
        read[tokens, chosen.columns] = by_slot[slots, chosen.neurons]
    return read.unflatten(0, (n_rows, n_positions))


def with_neurons(
    model: HookedModel,
    site: Site,
    activation: Float[Tensor, "..."],
    units: Int[Tensor, " unit"],
    new: Float[Tensor, "*lead unit"],
) -> Float[Tensor, "..."]:
    """The same activation with other values for some neurons, wherever a token has them."""
    units = units.to(activation.device)
    if not site.is_of_experts:
        are_all = len(units) == activation.shape[-1]
        return new if are_all else activation.index_copy(-1, units, new)
    experts, ids = _running(model, site)
    n_slots = ids.shape[2]
    by_slot = activation.reshape(ids.numel(), experts.d_expert).clone()
    new = new.flatten(0, 1)
    for chosen in _chosen_slots(experts, ids, units):
        slots = chosen.slots[:, None]
        tokens = slots // n_slots
        by_slot[slots, chosen.neurons] = new[tokens, chosen.columns]
    return by_slot.reshape(activation.shape)


def multiplied(
    model: HookedModel,
    site: Site,
    activation: Float[Tensor, "batch pos slot d_expert"],
    units: Int[Tensor, " unit"],
    multipliers: Float[Tensor, " unit"],
) -> Float[Tensor, "batch pos slot d_expert"]:
    """Some neurons of routed experts times their own numbers: `read_neurons` and `with_neurons` in one step, which
    takes no memory for neurons that a token does not have.
    """
    experts, _ = _running(model, site)
    n_neurons = experts.n_experts * experts.d_expert
    all_multipliers = torch.ones(n_neurons).to(activation)
    all_multipliers[units.to(activation.device)] = multipliers.to(activation)
    return activation * as_routed(model, site, all_multipliers)


def summed_over_positions(
    model: HookedModel,
    site: Site,
    values: Float[Tensor, "batch pos *slot width"],
) -> Float[Tensor, "batch all_units"]:
    """The sum over positions of something that each neuron has there, for every neuron of a site."""
    if not site.is_of_experts:
        return values.sum(1)
    experts, ids = _running(model, site)
    ids = ids.to(values.device)
    n_rows = ids.shape[0]
    # Each expert has a place in each row, to which its slots there are added.
    rows = torch.arange(n_rows, device=ids.device)[:, None]
    places = rows * experts.n_experts + ids.flatten(1)
    by_slot = values.reshape(ids.numel(), experts.d_expert)
    sums = values.new_zeros(n_rows * experts.n_experts, experts.d_expert)
    sums.index_add_(0, places.flatten(), by_slot)
    return sums.reshape(n_rows, -1)


def are_routed(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
) -> Bool[Tensor, "batch pos unit"]:
    """Whether the tokens of the running pass were sent to the experts of some neurons."""
    experts, ids = _running(model, site)
    owners = units.to(ids.device) // experts.d_expert
    return (ids[..., None] == owners).any(2)


def as_routed(
    model: HookedModel,
    site: Site,
    values: Float[Tensor, " all_units"],
) -> Float[Tensor, "*slots d_expert"]:
    """A number for each neuron of a site of experts, laid out as the running pass has the neurons: by slot."""
    experts, ids = _running(model, site)
    of_experts = values.reshape(experts.n_experts, -1)
    return of_experts[ids.to(values.device)]


def experts_at(model: HookedModel, hook_name: str) -> Site | None:
    """The routed experts whose neurons a hook point shows; None where it is another."""
    match = re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_expert_post", hook_name)
    if not match:
        return None
    layer = int(match[1])
    experts = routed_experts(model, layer)
    return Site(layer, "experts", experts.n_experts) if experts else None


def routed_ids(model: HookedModel, site: Site) -> Int[Tensor, "batch pos slot"]:
    """The experts of a site that the tokens of the running pass were sent to."""
    _, ids = _running(model, site)
    return ids


def effect_of_rows(
    model: HookedModel,
    site: Site,
    x: Float[Tensor, "batch pos *slot width"],
    gradient: Float[Tensor, "batch pos *slot width"],
) -> Float[Tensor, "batch all_units"]:
    """The sum over positions of activation times gradient, for every neuron of a site, in float32."""
    if site.is_of_experts:
        return summed_over_positions(model, site, x.float() * gradient.float())
    return torch.einsum("bpn,bpn->bn", x.float(), gradient.float())


def _running(model: HookedModel, site: Site) -> tuple[RoutedExperts, Int[Tensor, "batch pos slot"]]:
    """The experts of a site, and those that the tokens of the running pass were sent to."""
    experts = routed_experts(model, site.layer)
    assert experts is not None and experts.ids is not None, "a site of experts is read while a pass runs"
    return experts, experts.ids


@dataclass(frozen=True)
class _ChosenSlots:
    """The slots of one expert, and which of its neurons were chosen."""

    columns: Int[Tensor, " chosen"]
    """Where these neurons stand among the chosen units."""
    neurons: Int[Tensor, " chosen"]
    """Their numbers in the expert."""
    slots: Int[Tensor, " place"]


def _chosen_slots(
    experts: RoutedExperts,
    ids: Int[Tensor, "batch pos slot"],
    units: Int[Tensor, " unit"],
) -> list[_ChosenSlots]:
    """The slots of each expert that a token was sent to and that has chosen units."""
    owners = units // experts.d_expert
    chosen_experts = set(owners.unique().tolist())
    chosen = []
    for expert, slots in by_expert(ids):
        if expert in chosen_experts:
            columns = (owners == expert).nonzero()[:, 0]
            neurons = units[columns] % experts.d_expert
            chosen.append(_ChosenSlots(columns, neurons, slots))
    return chosen
