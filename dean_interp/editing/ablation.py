"""Silencing a selection while a context is open, through hooks and nothing else.

A neuron that is silenced at `hook_post` writes nothing: the output equals that of a model whose rows of `W_out` are
zero. A weight that is silenced has its contribution `x[:, i] * W[i, j]` taken out of what its matrix writes: the output
equals that of a model where it is zero. The parameters are never touched, and the hooks go even when the body raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import OnProduct, on_products, weight, weight_sites
from dean_interp.models.memory import scored_prompts
from dean_interp.models.sites import MATRICES, Modules, Site, neuron_sites
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection

_SILENT = "_dean_interp_silent_weights"  # what we note on a model object: weights must not be taken out twice


@contextmanager
def ablate(model: HookedModel, selection: Selection, *, means: Scores | None = None) -> Iterator[None]:
    """Silence the selected units in every forward pass and generation inside the `with` block.

    Ablations nest. One of weights costs a product with the rows and columns that it touches, no second dense one.

    Args:
        selection: neurons or weights of this model.
        means: put each neuron's mean activation over these scores' examples in its place (mean ablation) instead of
            zero. The values are fixed beforehand: they never depend on the batch at hand.

    Raises:
        InputError: an empty selection, one of another model's shape, means for weights, weights of a model whose
            weights were processed.
    """
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to ablate")
    _refuse_foreign(model, selection)
    chosen = [site for site, n in selection.counts().items() if n]
    if means is not None and any(site.unit == "weight" for site in chosen):
        raise InputError("means=... puts neurons' mean activations in place; weights have none, they can be zero only")
    neurons = [(site.hook_name, _silencer(selection, site, means)) for site in chosen if site.unit == "neuron"]
    silent: dict[Site, Tensor] = model.__dict__.get(_SILENT, {})
    fresh = {site: _without(selection.units[site], silent.get(site)) for site in chosen if site.unit == "weight"}
    weights = {site: _remover(model, site, units) for site, units in fresh.items() if len(units)}
    known = scored_prompts(model)
    remembered = set(known)
    known.update(selection.prompt_hashes)
    model.__dict__[_SILENT] = silent | {
        site: torch.cat([silent.get(site, units[:0]), units]) for site, units in fresh.items()
    }
    try:
        with model.hooks(fwd_hooks=neurons), on_products(model, weights):
            yield
    finally:
        model.__dict__[_SILENT] = silent
        known.intersection_update(remembered)


def _refuse_foreign(model: HookedModel, selection: Selection) -> None:
    shapes = {site: (model.cfg.d_mlp,) for site in neuron_sites(model)}
    parts = {site.part for site in selection.shapes}
    kinds: tuple[Modules, ...] = ("mlp", "attention")
    for modules in kinds:
        if parts & set(MATRICES[modules]):
            shapes |= {site: tuple(weight(model, site).shape) for site in weight_sites(model, modules)}
    if any(shapes.get(site) != shape for site, shape in selection.shapes.items()):
        raise InputError(
            f"the selection is not of this model: {model.cfg.model_name} has {model.cfg.n_layers} layers of "
            f"{model.cfg.d_mlp} neurons at width {model.cfg.d_model}"
        )


def _silencer(selection: Selection, site: Site, means: Scores | None) -> Callable[..., Tensor]:
    mask = selection.mask(site)
    values = means.activation_mean[site] if means else torch.zeros(len(mask))

    def silence(activation: Tensor, hook: object) -> Tensor:
        return torch.where(mask.to(activation.device), values.to(activation), activation)

    return silence


def _remover(model: HookedModel, site: Site, units: Tensor) -> OnProduct:
    """Takes `x[..., i] * W[i, j]` of the given flat indices out of the product.

    The chosen weights lie in a block of the rows and columns that hold any, zero elsewhere. A few weights make a small
    block; where it would be most of the matrix, the matrix itself costs no more.
    """
    matrix = weight(model, site).detach()
    chosen = torch.zeros_like(matrix)
    rows, columns = ((units // matrix.shape[1]).to(matrix.device), (units % matrix.shape[1]).to(matrix.device))
    chosen[rows, columns] = matrix[rows, columns]
    rows, columns = rows.unique(), columns.unique()
    if 2 * len(rows) * len(columns) > matrix.numel():
        return lambda x, product: product - x @ chosen
    block = chosen[rows][:, columns].clone()

    def remove(x: Tensor, product: Tensor) -> Tensor:
        return product.index_add(-1, columns.to(product.device), x[..., rows] @ block, alpha=-1)

    return remove


def _without(units: Tensor, others: Tensor | None) -> Tensor:
    return units if others is None else units[~torch.isin(units, others)]
