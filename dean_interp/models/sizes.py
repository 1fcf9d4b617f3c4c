"""Sizes of what is hooked, from the matrices themselves.

The fields of a configuration are each family's own (`ffn_dim`, `expansion_ratio`, `block_multiple_of`), may be unset,
and one number cannot say that layers differ: what TransformerLens makes of them, `cfg.d_mlp`, is not used.
"""

from dean_interp.models.adapters import adapter_of
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import neuron_sites, shape
from dean_interp.models.sites import Site


def site_shape(model: HookedModel, site: Site) -> tuple[int, ...]:
    """The shape of a site: as many neurons as `out` has rows, or `(d_in, d_out)` of a matrix."""
    if site.unit == "weight":
        return shape(model, site)
    n_neurons, _ = shape(model, site.out)
    return (n_neurons,)


def neuron_shapes(model: HookedModel) -> dict[Site, tuple[int, ...]]:
    """The shape of every site of neurons."""
    return {site: site_shape(model, site) for site in neuron_sites(model)}


def neuron_counts(model: HookedModel) -> list[int]:
    """The number of neurons of each layer: in a mixture those of all its experts."""
    counts = [0] * len(model.blocks)
    for site, (width,) in neuron_shapes(model).items():
        counts[site.layer] += width
    return counts


def residual_width(model: HookedModel) -> int:
    """The width of the residual stream: what `out` writes."""
    first, *_ = neuron_sites(model)
    _, d_model = shape(model, first.out)
    return d_model


def unembedding_shape(model: HookedModel) -> tuple[int, int]:
    """Width of what the unembedding reads, and the number of tokens that it writes a logit for."""
    return adapter_of(model).unembedding_shape


def vocabulary_size(model: HookedModel) -> int:
    """How many tokens the model has an embedding for."""
    return adapter_of(model).vocabulary_size
