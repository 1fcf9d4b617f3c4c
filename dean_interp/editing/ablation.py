"""Silencing a selection while a context is open, through hooks and nothing else.

A neuron that is silenced at `hook_post` writes nothing: the output equals that of a model whose rows of `W_out` are
zero. The contribution `x[:, i] * W[i, j]` of a silenced weight is subtracted from what its matrix writes: the output
equals that of a model where the weight is zero. The parameters are never touched, and the hooks are removed even when
the body raises.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.editing.reusable import reusable
from dean_interp.editing.values import (
    Multiply,
    Restore,
    Value,
    Zero,
    activation_change,
    multipliers_of,
    new_weights,
)
from dean_interp.errors import InputError
from dean_interp.models.experts import by_expert
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import OnProduct, bias, on_products, shape, weight, weight_sites
from dean_interp.models.neurons import multiplied, read_neurons, routed_ids, with_neurons
from dean_interp.models.notes import AblatedWeights, WeightChange, notes
from dean_interp.models.positions import token_positions
from dean_interp.models.scored_prompts import noting_scored_prompts
from dean_interp.models.sites import MATRICES, Modules, Site
from dean_interp.models.sizes import neuron_counts, neuron_shapes, residual_width
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection

Positions = Literal["all", "prompt", "response"]


@reusable
@contextmanager
def ablate(
    model: HookedModel,
    selection: Selection,
    *,
    value: Value = Zero(),  # noqa: B008 - frozen
    positions: Positions = "all",
) -> Iterator[None]:
    """Silence the selected units in every forward pass and generation inside the `with` block.

    Ablations nest, and one can be opened again, also inside itself. Where two change the same unit the inner one
    counts. An ablation of weights costs a product with the rows and columns that it touches, not a second product with
    the whole matrix.

    Args:
        selection: neurons or weights of this model.
        value: what takes a unit's place, fixed beforehand (`editing.values`): nothing, or a mean, noise, another
            example's activation, the unit scaled down, another checkpoint's weight.
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
    # Each site of neurons gets a hook on its activation.
    watch = _Watch()
    silencers = _silencers(model, selection, value=value, positions=positions, watch=watch)
    # Each matrix gets a hook on its product. Ablations that are open already have changed some of its weights.
    outer: AblatedWeights = notes(model).ablated_weights
    inner, removers = dict(outer), {}
    for site, change in _weight_changes(model, selection, value=value, positions=positions, outer=outer).items():
        removers[site] = _remover(model, site, change, positions)
        inner[site, positions] = _joined(outer.get((site, positions)), change)
        # An ablation of weights alone changes every pass or none, so it is known now whether it does.
        watch.expects_change = not silencers
        watch.changed |= bool((change.old != change.new).any())
    with _noted(model, inner, selection.prompt_hashes), model.hooks(fwd_hooks=silencers), on_products(model, removers):
        yield
    if watch.expects_change and not watch.changed:
        warnings.warn(f"the ablation of {selection} changed nothing", stacklevel=4)


@reusable
@contextmanager
def gated(model: HookedModel, gates: Gates, *, positions: Positions = "all") -> Iterator[None]:
    """Multiply every neuron by its gate in every forward pass and generation inside the `with` block.

    It is `ablate` of the neurons that change, with the value `Multiply(gates)`: nested gates multiply, and an inner
    ablation of the same neuron counts. Raises `InputError` as `ablate` does, also where no gate differs from 1.
    """
    with ablate(model, gates.selection, value=Multiply(gates), positions=positions):
        yield


def weights_that_make(model: HookedModel, selection: Selection, other: HookedModel) -> Selection:
    """The weights of neurons: their columns of `gate` and `in` and their rows of `out`. Weights stay as they are.

    Raises `InputError` where the two models' biases of these neurons differ: weights alone would not restore them.
    """
    neurons = {site: units for site, units in selection.units.items() if site.unit == "neuron" and len(units)}
    if not neurons:
        return selection
    # Neuron i is column i of `gate` and `in` and row i of `out`; flat indices count row by row.
    weights, shapes = {}, {}
    for site in weight_sites(model):
        units = neurons.get(site.neurons, torch.zeros(0, dtype=torch.int64))
        n_rows, n_columns = shape(model, site)
        shapes[site] = (n_rows, n_columns)
        if site == site.neurons.out:
            flat = units[:, None] * n_columns + torch.arange(n_columns)
        else:
            flat = torch.arange(n_rows)[:, None] * n_columns + units
            _refuse_other_bias(model, other, site, units)
        weights[site] = flat.flatten().sort().values
    return Selection(weights, shapes, selection.prompt_hashes)


def _refuse_other_bias(model: HookedModel, other: HookedModel, site: Site, units: Tensor) -> None:
    mine, theirs = bias(model, site), bias(other, site)
    if mine is None or theirs is None:
        return
    if not torch.equal(mine[units], theirs[units].to(mine)):
        raise InputError(f"the biases of the neurons of {site} differ: restore the layer's checkpoint instead")


def refuse_foreign(model: HookedModel, selection: Selection) -> None:
    """Raise `InputError` where the selection's sites are not this model's."""
    shapes = neuron_shapes(model)
    parts = {site.part for site in selection.shapes}
    kinds: tuple[Modules, ...] = ("mlp", "attention")
    for modules in kinds:
        if parts & set(MATRICES[modules]):
            shapes |= {site: shape(model, site) for site in weight_sites(model, modules)}
    if any(shapes.get(site) != shape for site, shape in selection.shapes.items()):
        counts = neuron_counts(model)
        width = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
        raise InputError(
            f"the selection is not of this model: {model.cfg.model_name} has {len(counts)} layers of {width} neurons "
            f"at width {residual_width(model)}"
        )


@dataclass
class _Watch:
    """Whether any pass was changed."""

    expects_change: bool = False
    changed: bool = False


@contextmanager
def _noted(model: HookedModel, changed: AblatedWeights, prompt_hashes: frozenset[str]) -> Iterator[None]:
    """While open, the model has notes of its changed weights, and of the prompts that the selection was scored on."""
    outer = notes(model).ablated_weights
    notes(model).ablated_weights = changed
    try:
        with noting_scored_prompts(model, prompt_hashes):
            yield
    finally:
        notes(model).ablated_weights = outer


def _silencers(
    model: HookedModel, selection: Selection, *, value: Value, positions: Positions, watch: _Watch
) -> list[tuple[str, Callable[..., Tensor]]]:
    """The hooks of the selected neurons, by the hook points' names."""
    hooks = []
    for site, units in selection.units.items():
        if site.unit == "neuron" and len(units):
            hooks.append((site.hook_name, _silencer(model, site, units, value, positions=positions, watch=watch)))
    return hooks


def _silencer(
    model: HookedModel, site: Site, units: Tensor, value: Value, *, positions: Positions, watch: _Watch
) -> Callable[..., Tensor]:
    """A hook that changes the chosen neurons' activations, and notes whether it did."""
    change = activation_change(value, site, units)

    def silence(activation: Tensor, hook: object) -> Tensor:
        # Gates of all neurons need no copy of the columns that they change.
        is_whole = not site.is_of_experts and len(units) == activation.shape[-1]
        old = activation if is_whole else read_neurons(model, site, activation, units)
        new = change(old, _positions_in_texts(model, old)).to(old)
        if positions != "all":
            new = torch.where(_is_ablated(model, old, positions)[..., None], new, old)
        changed = new if is_whole else with_neurons(model, site, activation, units, new)
        watch.expects_change = True
        if site.is_of_experts:
            watch.changed = watch.changed or bool((changed != activation).any())
        else:
            watch.changed = watch.changed or bool((new != old).any())
        return changed

    multipliers = multipliers_of(value, site, units) if site.is_of_experts else None
    if multipliers is None:
        return silence

    def multiply(activation: Tensor, hook: object) -> Tensor:
        changed = multiplied(model, site, activation, units, multipliers)
        if positions != "all":
            is_ablated = _is_ablated(model, activation[:, :, 0], positions)
            changed = torch.where(is_ablated[..., None, None], changed, activation)
        watch.expects_change = True
        watch.changed = watch.changed or bool((changed != activation).any())
        return changed

    return multiply


def _weight_changes(
    model: HookedModel, selection: Selection, *, value: Value, positions: Positions, outer: AblatedWeights
) -> dict[Site, WeightChange]:
    """What an ablation makes of the selected weights of each matrix."""
    changes = {}
    for site, units in selection.units.items():
        if site.unit == "weight" and len(units):
            new = new_weights(value, model, site, units)
            old = _current_weights(model, site, units, outer=outer, positions=positions)
            changes[site] = WeightChange(units, old, new)
    return changes


def _remover(model: HookedModel, site: Site, change: WeightChange, positions: Positions) -> OnProduct:
    """A hook that subtracts `x[..., i] * (old - new)` of the given weights from the product.

    The chosen weights lie in a block of the rows and columns that hold any, zero elsewhere. A few weights make a small
    block; where it would be most of the matrix, the matrix itself costs no more.
    """
    matrix = weight(model, site).detach()
    rows = (change.units // matrix.shape[1]).to(matrix.device)
    columns = (change.units % matrix.shape[1]).to(matrix.device)
    excess = torch.zeros_like(matrix)
    excess[rows, columns] = (change.old - change.new).to(matrix)
    if site.is_of_experts:
        return _expert_remover(model, site, excess, positions)
    rows, columns = rows.unique(), columns.unique()
    is_large = 2 * len(rows) * len(columns) > matrix.numel()
    block = excess if is_large else excess[rows][:, columns].clone()

    def remove(x: Tensor, product: Tensor) -> Tensor:
        if positions != "all":
            x = x * _is_ablated(model, x, positions)[..., None]
        if is_large:
            return product - x @ block.to(x.device)
        # index_copy is several times faster over many positions than index_add.
        written = columns.to(product.device)
        removed = x.index_select(-1, rows.to(x.device)) @ block.to(x.device)
        return product.index_copy(-1, written, product.index_select(-1, written) - removed)

    return remove


def _expert_remover(
    model: HookedModel, site: Site, excess: Float[Tensor, "d_in d_out"], positions: Positions
) -> OnProduct:
    """The same for the matrices of routed experts, which lie side by side in `excess`."""
    blocks = excess.chunk(site.n_experts, 0 if site.part == "experts.out" else 1)
    changed = {expert: block.clone() for expert, block in enumerate(blocks) if bool(block.any())}

    def remove(x: Tensor, product: Tensor) -> Tensor:
        if positions != "all":
            x = x * _is_ablated(model, x[:, :, 0], positions)[..., None, None]
        read, written = x.flatten(0, 2), product.flatten(0, 2).clone()
        for expert, slots in by_expert(routed_ids(model, site)):
            if expert in changed:
                written[slots] -= read[slots] @ changed[expert].to(read.device)
        return written.reshape(product.shape)

    return remove


def _positions_in_texts(model: HookedModel, activation: Tensor) -> Int[Tensor, "..."]:
    """The place of every position in its own text; a bare pass counts from its first column."""
    current = token_positions(model)
    if current is not None:
        return current.position.reshape(activation.shape[:-1]).to(activation.device)
    return torch.arange(activation.shape[-2], device=activation.device).expand(activation.shape[:-1])


def _is_ablated(model: HookedModel, activation: Tensor, positions: Positions) -> Bool[Tensor, "..."]:
    """True at the positions of a pass that belong to prompts, or to responses."""
    current = token_positions(model)
    if current is None:
        raise InputError(
            f"positions={positions!r} needs a pass that knows where answers begin: importance, measure or generate"
        )
    is_answer = current.is_answer.reshape(activation.shape[:-1]).to(activation.device)
    return is_answer if positions == "response" else ~is_answer


def _current_weights(
    model: HookedModel, site: Site, units: Tensor, *, outer: AblatedWeights, positions: Positions
) -> Tensor:
    """What the weights are under the ablations that are open already."""
    matrix = weight(model, site).detach()
    current = matrix[units // matrix.shape[1], units % matrix.shape[1]].clone()
    for (changed_site, changed_positions), change in outer.items():
        if changed_site != site:
            continue
        is_changed = torch.isin(units, change.units)
        if not is_changed.any():
            continue
        if changed_positions != positions:
            raise InputError(
                f"some of these weights of {site} are ablated at positions={changed_positions!r} already: nest alike"
            )
        current[is_changed] = change.new[torch.searchsorted(change.units, units[is_changed])].to(current)
    return current


def _joined(outer: WeightChange | None, inner: WeightChange) -> WeightChange:
    """The changes of two nested ablations; where both change a weight the inner one counts."""
    if outer is None:
        return inner
    only_outer = ~torch.isin(outer.units, inner.units)
    units = torch.cat([outer.units[only_outer], inner.units])
    order = units.argsort()
    old = torch.cat([outer.old[only_outer], inner.old])
    new = torch.cat([outer.new[only_outer], inner.new])
    return WeightChange(units[order], old[order], new[order])
