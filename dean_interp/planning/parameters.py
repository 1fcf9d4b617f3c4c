"""How large a model is, and how much of it a token uses: of routed experts only those that it is sent to."""

from dean_interp.models.experts import routed_experts
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import neuron_sites, shape, weight_sites
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_counts, residual_width, site_shape, vocabulary_size


def n_parameters(model: HookedModel) -> int:
    """All parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def n_used_parameters(model: HookedModel) -> int:
    """The parameters that one token passes through: all but those of experts that it is not sent to."""
    total = n_parameters(model)
    for layer in range(len(model.blocks)):
        experts = routed_experts(model, layer)
        if experts is not None:
            in_experts = sum(parameter.numel() for parameter in experts.module.parameters())
            total -= in_experts * (experts.n_experts - experts.n_per_token) // experts.n_experts
    return total


def operations_per_token(model: HookedModel) -> int:
    """A multiplication and an addition for each parameter that a token uses, but the embedding's."""
    return 2 * (n_used_parameters(model) - vocabulary_size(model) * residual_width(model))


def n_weights(model: HookedModel) -> int:
    """The number of MLP weights that can be scored."""
    return sum(_n_entries(model, site) for site in weight_sites(model))


def n_used_weights(model: HookedModel) -> int:
    """How many of them a token uses."""
    return round(sum(_n_entries(model, site) * share_of_token(model, site) for site in weight_sites(model)))


def n_used_neurons(model: HookedModel) -> int:
    """How many neurons a token has, in all layers."""
    return sum(round(site_shape(model, site)[0] * share_of_token(model, site)) for site in neuron_sites(model))


def share_of_token(model: HookedModel, site: Site) -> float:
    """The share of a site's units that one token has: all, or of routed experts those that it is sent to."""
    experts = routed_experts(model, site.layer) if site.is_of_experts else None
    return 1.0 if experts is None else experts.n_per_token / experts.n_experts


def experts_in_words(model: HookedModel) -> str:
    """What is to be known of a mixture's size; empty for a model without routed experts."""
    kinds: dict[tuple[int, int, int], int] = {}
    for layer in range(len(model.blocks)):
        experts = routed_experts(model, layer)
        if experts is not None:
            kind = (experts.n_experts, experts.d_expert, experts.n_per_token)
            kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return ""
    parts = []
    for (n_experts, width, n_used), n_layers in kinds.items():
        parts.append(f"{n_layers} layers of {n_experts} experts with {width:,} neurons each, a token uses {n_used}")
    parts.append(f"{sum(neuron_counts(model)):,} neurons in all, a token uses {n_used_neurons(model):,}")
    parts.append(f"of the parameters a token uses {n_used_parameters(model) / 1e9:.2f} billion")
    return "; ".join(parts)


def _n_entries(model: HookedModel, site: Site) -> int:
    n_in, n_out = shape(model, site)
    return n_in * n_out
