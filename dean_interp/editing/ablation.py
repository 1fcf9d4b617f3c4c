"""Silencing a selection while a context is open, through hooks and nothing else.

A neuron that is silenced at `hook_post` writes nothing: the output equals that of a model whose rows of `W_out` are
zero. The contribution `x[:, i] * W[i, j]` of a silenced weight is subtracted from what its matrix writes: the output
equals that of a model where the weight is zero. The parameters are never touched, and the hooks are removed even when
the body raises.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.editing.ablated_positions import Positions, is_ablated, positions_in_texts
from dean_interp.editing.reusable import reusable
from dean_interp.editing.values import (
    Multiply,
    Restore,
    Value,
    Zero,
    activation_change,
    multipliers_of,
)
from dean_interp.editing.weight_removal import joined, remover, weight_changes
from dean_interp.errors import InputError, refuse_other_type
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import bias, on_products, shape, weight_sites
from dean_interp.models.neurons import multiplied, read_neurons, with_neurons
from dean_interp.models.notes import AblatedWeights, WeightChange, notes
from dean_interp.models.scored_prompts import noting_scored_prompts
from dean_interp.models.sites import MATRICES, Modules, Site
from dean_interp.models.sizes import neuron_counts, neuron_shapes, residual_width
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection


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
    refuse_other_type("the selection", selection, Selection, "couple(...).coupled or load_selection(file)")
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
    changes = weight_changes(model, selection, value=value, positions=positions, outer=outer)
    removers = {site: remover(model, site, change, positions) for site, change in changes.items()}
    # An ablation of weights alone changes every pass or none, so it is known now whether it does.
    watch.expects_change = bool(changes) and not silencers
    watch.changed = any(bool((change.old != change.new).any()) for change in changes.values())
    inner = _nested(outer, changes, positions)
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

    Raises `InputError` where the other model has other layers, and where the models' biases of these neurons differ,
    since weights alone would not restore them.
    """
    if neuron_shapes(model) != neuron_shapes(other) or _mlp_matrices(model) != _mlp_matrices(other):
        raise InputError(
            f"{other.cfg.model_name} has other layers than {model.cfg.model_name}: weights are restored from a model "
            "of which this one is a fine-tuned copy"
        )
    neurons = {site: units for site, units in selection.units.items() if site.unit == "neuron"}
    if not any(map(len, neurons.values())):
        return selection
    # Neuron i is column i of `gate` and `in` and row i of `out`; flat indices count row by row.
    none = torch.zeros(0, dtype=torch.int64)
    weights, shapes = {}, {}
    for site in weight_sites(model):
        units = neurons.get(site.neurons, none)
        n_rows, n_columns = shape(model, site)
        shapes[site] = (n_rows, n_columns)
        if site == site.neurons.out:
            flat = units[:, None] * n_columns + torch.arange(n_columns)
        else:
            flat = torch.arange(n_rows)[:, None] * n_columns + units
            _refuse_other_bias(model, other, site, units)
        weights[site] = flat.flatten().sort().values
    return Selection(weights, shapes, selection.prompt_hashes)


def _mlp_matrices(model: HookedModel) -> list[tuple[Site, ...]]:
    return [adapter_of(model).mlp_matrices(layer) for layer in range(len(model.blocks))]


def _refuse_other_bias(
    model: HookedModel,
    other: HookedModel,
    site: Site,
    units: Int[Tensor, " neuron"],
) -> None:
    bias_here = bias(model, site)
    bias_there = bias(other, site)
    if bias_here is None and bias_there is None:
        return
    are_equal = False
    if bias_here is not None and bias_there is not None:
        are_equal = torch.equal(bias_here[units], bias_there[units].to(bias_here))
    if not are_equal:
        raise InputError(f"the biases of the neurons of {site} differ: restore the layer's checkpoint instead")


def refuse_foreign(model: HookedModel, selection: Selection) -> None:
    """Raise `InputError` where the selection's sites are not this model's."""
    shapes = neuron_shapes(model)
    parts = {site.part for site in selection.shapes}
    kinds: tuple[Modules, ...] = ("mlp", "attention", "router")
    for modules in kinds:
        if parts & set(MATRICES[modules]):
            shapes |= {site: shape(model, site) for site in weight_sites(model, modules)}
    if all(shapes.get(site) == shape for site, shape in selection.shapes.items()):
        return
    counts = neuron_counts(model)
    fewest = min(counts)
    most = max(counts)
    n_neurons = str(most) if fewest == most else f"{fewest} to {most}"
    raise InputError(
        f"the selection is not of this model: {model.cfg.model_name} has {len(counts)} layers of {n_neurons} neurons "
        f"at width {residual_width(model)}"
    )


@dataclass
class _Watch:
    """Whether any pass was changed."""

    expects_change: bool = False
    changed: bool = False

    def note(self, before: Tensor, after: Tensor) -> None:
        """Note what one pass changed. Once any was changed, no other is compared."""
        self.expects_change = True
        self.changed = self.changed or bool((after != before).any())


def _nested(
    outer: AblatedWeights,
    changes: Mapping[Site, WeightChange],
    positions: Positions,
) -> AblatedWeights:
    """What the weights are changed to inside open ablations."""
    inner = dict(outer)
    for site, change in changes.items():
        inner[site, positions] = joined(outer.get((site, positions)), change)
    return inner


@contextmanager
def _noted(
    model: HookedModel,
    changed: AblatedWeights,
    prompt_hashes: frozenset[str],
) -> Iterator[None]:
    """While open, the model has notes of its changed weights, and of the prompts that the selection was scored on."""
    known = notes(model)
    outer = known.ablated_weights
    known.ablated_weights = changed
    known.n_ablations += 1
    try:
        with noting_scored_prompts(model, prompt_hashes):
            yield
    finally:
        known.n_ablations -= 1
        # Where they are not closed in the order of their opening, what this one was opened in may be closed.
        known.ablated_weights = outer if known.n_ablations else {}


def _silencers(
    model: HookedModel,
    selection: Selection,
    *,
    value: Value,
    positions: Positions,
    watch: _Watch,
) -> list[tuple[str, Callable[..., Tensor]]]:
    """The hooks of the selected neurons, by the hook points' names."""
    hooks = []
    for site, units in selection.units.items():
        if site.unit == "neuron" and len(units):
            hook = _silencer(model, site, units, value, positions=positions, watch=watch)
            hooks.append((site.hook_name, hook))
    return hooks


def _silencer(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " neuron"],
    value: Value,
    *,
    positions: Positions,
    watch: _Watch,
) -> Callable[..., Tensor]:
    """A hook that changes the chosen neurons' activations, and notes whether it did."""
    if site.is_of_experts:
        multipliers = multipliers_of(value, site, units)
        if multipliers is not None:
            return _expert_multiplier(model, site, units, multipliers, positions=positions, watch=watch)
    change = activation_change(value, site, units)

    def silence(activation: Tensor, hook: object) -> Tensor:
        # Gates of all neurons need no copy of the columns that they change.
        is_whole = not site.is_of_experts and len(units) == activation.shape[-1]
        old = activation if is_whole else read_neurons(model, site, activation, units)
        place_in_text = positions_in_texts(model, old)
        new = change(old, place_in_text).to(old)
        if positions != "all":
            here = is_ablated(model, old, positions)
            new = torch.where(here[..., None], new, old)
        changed = new if is_whole else with_neurons(model, site, activation, units, new)
        if site.is_of_experts:
            watch.note(activation, changed)
        else:
            watch.note(old, new)
        return changed

    return silence


def _expert_multiplier(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " neuron"],
    multipliers: Float[Tensor, " neuron"],
    *,
    positions: Positions,
    watch: _Watch,
) -> Callable[..., Tensor]:
    """A hook that multiplies activations of experts' neurons where they lie, and notes whether it changed any."""

    def multiply(activation: Tensor, hook: object) -> Tensor:
        changed = multiplied(model, site, activation, units, multipliers)
        if positions != "all":
            here = is_ablated(model, activation[:, :, 0], positions)
            changed = torch.where(here[..., None, None], changed, activation)
        watch.note(activation, changed)
        return changed

    return multiply
