"""Silencing a selection while a context is open, through hooks and nothing else.

A neuron that is silenced at `hook_post` writes nothing: the output equals that of a model whose rows of `W_out` are
zero. A weight that is silenced has its contribution `x[:, i] * W[i, j]` taken out of what its matrix writes: the output
equals that of a model where it is zero. The parameters are never touched, and the hooks go even when the body raises.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.editing.values import Restore, Value, Zero, activation_change, new_weights
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import OnProduct, bias, on_products, shape, weight, weight_sites
from dean_interp.models.notes import AblatedWeights, notes
from dean_interp.models.positions import token_positions
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import MATRICES, Modules, Site, neuron_sites
from dean_interp.selection.selection import Selection

Positions = Literal["all", "prompt", "response"]


@contextmanager
def ablate(
    model: HookedModel,
    selection: Selection,
    *,
    value: Value = Zero(),  # noqa: B008 - frozen
    positions: Positions = "all",
) -> Iterator[None]:
    """Silence the selected units in every forward pass and generation inside the `with` block.

    Ablations nest; where two change the same unit the inner one counts. One of weights costs a product with the rows
    and columns that it touches, no second dense one.

    Args:
        selection: neurons or weights of this model.
        value: what takes a unit's place, fixed beforehand (`editing.values`): nothing, or a mean, noise, another
            example's activation, a weaker self, another checkpoint's weight.
        positions: `prompt` or `response` ablates there only: while scoring, measuring and generating, which know where
            answers begin.

    Raises:
        InputError: an empty selection, one of another model's shape, a value that weights cannot have, weights of a
            model whose weights were processed.

    Warns:
        UserWarning: where the ablation changed nothing in any pass.
    """
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to ablate")
    if positions not in get_args(Positions):
        raise InputError(f"positions must be one of {get_args(Positions)}, got {positions!r}")
    refuse_foreign(model, selection)
    if isinstance(value, Restore):
        selection = weights_that_make(model, selection, value.other)
    chosen = [site for site, n in selection.counts().items() if n]
    watch = _Watch()
    neurons = [(site.hook_name, _silencer(model, site, selection.units[site], value, positions, watch))
               for site in chosen if site.unit == "neuron"]  # fmt: skip
    outer = notes(model).ablated_weights
    inner, removers = dict(outer), {}
    for site in chosen:
        if site.unit == "weight":
            units = selection.units[site]
            new, old = new_weights(value, model, site, units), _now(model, site, units, outer, positions)
            removers[site] = _remover(model, site, units, old - new, positions)
            inner[site, positions] = _joined(outer.get((site, positions)), units, new)
            watch.expects_change |= not neurons
            watch.changed |= bool((old != new).any())
    known = scored_prompts(model)
    remembered = set(known)
    known.update(selection.prompt_hashes)
    notes(model).ablated_weights = inner
    try:
        with model.hooks(fwd_hooks=neurons), on_products(model, removers):
            yield
        if watch.expects_change and not watch.changed:
            warnings.warn(f"the ablation of {selection} changed nothing", stacklevel=3)
    finally:
        notes(model).ablated_weights = outer
        known.intersection_update(remembered)


def weights_that_make(model: HookedModel, selection: Selection, other: HookedModel) -> Selection:
    """The weights of neurons: their columns of `gate` and `in` and their rows of `out`. Weights stay as they are.

    Raises `InputError` where the two models' biases of these neurons differ: weights alone would not restore them.
    """
    neurons = {site: units for site, units in selection.units.items() if site.unit == "neuron" and len(units)}
    if not neurons:
        return selection
    found, shapes = {}, {}
    for site in weight_sites(model):
        matrix, units = weight(model, site), neurons.get(Site(site.layer, "neurons"), torch.zeros(0, dtype=torch.int64))
        shapes[site] = tuple(matrix.shape)
        along = torch.arange(matrix.shape[0 if site.part != "out" else 1])
        flat = along[:, None] * matrix.shape[1] + units if site.part != "out" else units[:, None] * len(along) + along
        found[site] = flat.flatten().sort().values
        if site.part != "out" and len(units):
            mine, theirs = (bias(one, site) for one in (model, other))
            if mine is not None and theirs is not None and not torch.equal(mine[units], theirs[units].to(mine)):
                raise InputError(f"the biases of the neurons of {site} differ: restore the layer's checkpoint instead")
    return Selection(found, shapes, selection.prompt_hashes)


def refuse_foreign(model: HookedModel, selection: Selection) -> None:
    """Raise `InputError` where the selection's sites are not this model's."""
    shapes = {site: (model.cfg.d_mlp,) for site in neuron_sites(model)}
    parts = {site.part for site in selection.shapes}
    kinds: tuple[Modules, ...] = ("mlp", "attention")
    for modules in kinds:
        if parts & set(MATRICES[modules]):
            shapes |= {site: shape(model, site) for site in weight_sites(model, modules)}
    if any(shapes.get(site) != shape for site, shape in selection.shapes.items()):
        raise InputError(
            f"the selection is not of this model: {model.cfg.model_name} has {model.cfg.n_layers} layers of "
            f"{model.cfg.d_mlp} neurons at width {model.cfg.d_model}"
        )


@dataclass
class _Watch:
    """Whether any pass was changed."""

    expects_change: bool = False
    changed: bool = False


_Weights = tuple[Int[Tensor, " _"], Float[Tensor, " _"]]
"""Units, ascending, and what open ablations have made of them."""


def _silencer(
    model: HookedModel, site: Site, units: Tensor, value: Value, positions: Positions, watch: _Watch
) -> Callable[..., Tensor]:
    change = activation_change(value, site, units)

    def silence(activation: Tensor, hook: object) -> Tensor:
        columns = units.to(activation.device)
        old = activation[..., columns]
        new = change(old, _place(model, activation)).to(old)
        if positions != "all":
            new = torch.where(_mask(model, activation, positions)[..., None], new, old)
        watch.expects_change = True
        watch.changed = watch.changed or bool((new != old).any())
        return activation.index_copy(-1, columns, new)

    return silence


def _remover(model: HookedModel, site: Site, units: Tensor, excess: Tensor, positions: Positions) -> OnProduct:
    """Takes `x[..., i] * excess` of the given flat indices out of the product.

    The chosen weights lie in a block of the rows and columns that hold any, zero elsewhere. A few weights make a small
    block; where it would be most of the matrix, the matrix itself costs no more.
    """
    matrix = weight(model, site).detach()
    chosen = torch.zeros_like(matrix)
    rows, columns = ((units // matrix.shape[1]).to(matrix.device), (units % matrix.shape[1]).to(matrix.device))
    chosen[rows, columns] = excess.to(matrix)
    rows, columns = rows.unique(), columns.unique()
    is_large = 2 * len(rows) * len(columns) > matrix.numel()
    block = chosen if is_large else chosen[rows][:, columns].clone()

    def remove(x: Tensor, product: Tensor) -> Tensor:
        if positions != "all":
            x = x * _mask(model, x, positions)[..., None]
        if is_large:
            return product - x @ block.to(x.device)
        at = columns.to(product.device)  # index_copy, not index_add: several times faster over many positions
        taken = x.index_select(-1, rows.to(x.device)) @ block.to(x.device)
        return product.index_copy(-1, at, product.index_select(-1, at) - taken)

    return remove


def _place(model: HookedModel, activation: Tensor) -> Int[Tensor, "..."]:
    """Every position's place in its text; a bare pass counts from its first column."""
    now = token_positions(model)
    if now is not None:
        return now.position.reshape(activation.shape[:-1]).to(activation.device)
    return torch.arange(activation.shape[-2], device=activation.device).expand(activation.shape[:-1])


def _mask(model: HookedModel, activation: Tensor, positions: Positions) -> Bool[Tensor, "..."]:
    now = token_positions(model)
    if now is None:
        raise InputError(
            f"positions={positions!r} needs a pass that knows where answers begin: importance, measure or generate"
        )
    is_answer = now.is_answer.reshape(activation.shape[:-1]).to(activation.device)
    return is_answer if positions == "response" else ~is_answer


def _now(model: HookedModel, site: Site, units: Tensor, outer: AblatedWeights, positions: Positions) -> Tensor:
    """What the weights are under the ablations that are open already."""
    matrix = weight(model, site).detach()
    held = matrix[units // matrix.shape[1], units % matrix.shape[1]].clone()
    for (at, where), (changed, values) in outer.items():
        again = torch.isin(units, changed) if at == site else torch.zeros(0, dtype=torch.bool)
        if again.any() and where != positions:
            raise InputError(f"some of these weights of {site} are ablated at positions={where!r} already: nest alike")
        if again.any():
            held[again] = values[torch.searchsorted(changed, units[again])].to(held)
    return held


def _joined(outer: _Weights | None, units: Tensor, values: Tensor) -> _Weights:
    if outer is None:
        return units, values
    others = ~torch.isin(outer[0], units)
    joined = torch.cat([outer[0][others], units])
    order = joined.argsort()
    return joined[order], torch.cat([outer[1][others], values])[order]
