"""How large a model is, and how much of it a token uses: of routed experts only those that it is sent to."""

import math
from collections import Counter

from torch import nn

from dean_interp.models.experts import routed_experts
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import neuron_sites, shape, weight_sites
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_counts, residual_width, site_shape, vocabulary_size


def n_parameters(module: nn.Module) -> int:
    """All parameters of a model, or of a part of one."""
    return sum(parameter.numel() for parameter in module.parameters())


def n_used_parameters(model: HookedModel) -> int:
    """The parameters that one token passes through: all but those of experts that it is not sent to."""
    total = n_parameters(model)
    for layer in range(len(model.blocks)):
        experts = routed_experts(model, layer)
        if experts is not None:
            n_unused = experts.n_experts - experts.n_per_token
            total -= n_parameters(experts.module) * n_unused // experts.n_experts
    return total


def operations_per_token(model: HookedModel) -> int:
    """A multiplication and an addition for each parameter that a token uses, but the embedding's."""
    in_embedding = vocabulary_size(model) * residual_width(model)
    return 2 * (n_used_parameters(model) - in_embedding)


def n_weights(model: HookedModel) -> int:
    """The number of MLP weights that can be scored."""
    return sum(math.prod(shape(model, site)) for site in weight_sites(model))


def n_used_weights(model: HookedModel) -> int:
    """How many of them a token uses."""
    n_used = 0.0
    for site in weight_sites(model):
        n_used += math.prod(shape(model, site)) * share_of_token(model, site)
    return round(n_used)


def n_used_neurons(model: HookedModel) -> int:
    """How many neurons a token has, in all layers."""
    n_used = 0
    for site in neuron_sites(model):
        (n_neurons,) = site_shape(model, site)
        n_used += round(n_neurons * share_of_token(model, site))
    return n_used


def share_of_token(model: HookedModel, site: Site) -> float:
    """The share of a site's units that one token has: all, or of routed experts those that it is sent to."""
    experts = routed_experts(model, site.layer) if site.is_of_experts else None
    if experts is None:
        return 1.0
    return experts.n_per_token / experts.n_experts


def experts_in_words(model: HookedModel) -> str:
    """What is to be known of a mixture's size; empty for a model without routed experts."""
    n_layers_of = Counter[tuple[int, int, int]]()
    for layer in range(len(model.blocks)):
        experts = routed_experts(model, layer)
        if experts is not None:
            kind = (experts.n_experts, experts.d_expert, experts.n_per_token)
            n_layers_of[kind] += 1
    if not n_layers_of:
        return ""
    parts = []
    for (n_experts, width, n_used), n_layers in n_layers_of.items():
        parts.append(f"{n_layers} layers of {n_experts} experts with {width:,} neurons each, a token uses {n_used}")
    n_neurons = sum(neuron_counts(model))
    billions_used = n_used_parameters(model) / 1e9
    parts.append(f"{n_neurons:,} neurons in all, a token uses {n_used_neurons(model):,}")
    parts.append(f"of the parameters a token uses {billions_used:.2f} billion")
    return "; ".join(parts)
