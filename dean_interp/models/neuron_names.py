"""What neurons are called: `L17.1042` in a dense layer, `L17.E5.42` in expert 5, `L17.shared.42` in a shared expert.

A neuron is a site and its number there. A site counts the neurons of routed experts expert by expert; a name says the
expert and the number in it. So the width of an expert stands between the two, and a name is turned into a neuron by the
model.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from dean_interp.errors import InputError, refuse_other_type
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sites import NEURONS, Site
from dean_interp.models.sizes import neuron_shapes

Neuron = tuple[Site, int]
"""A site of neurons, and the number of one of them there."""
_SHARED = "shared"
_WRITTEN = re.compile(r"[Ll](\d+)\.(?:([Ee]\d+|shared)\.)?(\d+)")


class NeuronName(NamedTuple):
    """The name of a neuron in its parts; `str` writes it."""

    layer: int
    index: int
    """Its number in its MLP or in its expert."""
    owner: str = ""
    """`E5` of expert 5, `shared` of the expert of every token; empty in a dense layer."""

    def __str__(self) -> str:
        layer = f"L{self.layer}"
        if not self.owner:
            return f"{layer}.{self.index}"
        return f"{layer}.{self.owner}.{self.index}"


def name_of(neuron: Neuron, n_neurons: int) -> NeuronName:
    """The name of a neuron whose site has so many neurons."""
    site, index = neuron
    if site.is_of_experts:
        d_expert = n_neurons // site.n_experts
        expert, index = divmod(index, d_expert)
        return NeuronName(site.layer, index, f"E{expert}")
    owner = _SHARED if site.part == "shared" else ""
    return NeuronName(site.layer, index, owner)


def parse_name(text: str) -> NeuronName:
    """The parts of a written name, the inverse of `str`. Raises `InputError` for another form."""
    match = _WRITTEN.fullmatch(text.strip())
    if not match:
        raise InputError(
            "a neuron is named by its layer, by its expert where it has one (E5, or shared), and by its index, as "
            f"L17.E5.42 or as L17.1042; got {text!r}"
        )
    layer, owner, index = match.groups(default="")
    # One neuron has one name: `e05` is written `E5`.
    if owner and owner != _SHARED:
        owner = f"E{int(owner[1:])}"
    return NeuronName(int(layer), int(index), owner)


def neuron_of(model: HookedModel, name: NeuronName) -> Neuron:
    """The neuron of a name. Raises `InputError` where the model has none of this name."""
    neuron = neuron_among(neuron_shapes(model), name)
    if neuron is None:
        raise _unknown(model, str(name), name.layer)
    return neuron


def neuron_among(shapes: Mapping[Site, tuple[int, ...]], name: NeuronName) -> Neuron | None:
    """The neuron of a name among sites of these shapes; None where they have none of this name."""
    part = {"": "neurons", _SHARED: "shared"}.get(name.owner, "experts")
    for site, (n_neurons,) in shapes.items():
        if site.layer != name.layer or site.part != part:
            continue
        # A dense layer counts as one expert.
        d_expert = n_neurons // site.n_experts
        expert = int(name.owner[1:]) if site.is_of_experts else 0
        if expert < site.n_experts and name.index < d_expert:
            return site, expert * d_expert + name.index
    return None


def refuse_unknown(model: HookedModel, neuron: Neuron) -> None:
    """Raise `InputError` where the model does not have a neuron."""
    site, index = neuron
    refuse_other_type("the site of a neuron", site, Site, 'Site(17, "neurons")')
    if site.unit != "neuron":
        raise InputError(f"{site} is a matrix of weights, and neurons are at the parts {NEURONS}")
    (n_neurons,) = neuron_shapes(model).get(site, (0,))
    if not 0 <= index < n_neurons:
        # Without the site there is no width of an expert, and so no name.
        has_name = n_neurons or not site.is_of_experts
        name = str(name_of(neuron, n_neurons)) if has_name else f"{index} of {site}"
        raise _unknown(model, name, site.layer)


def _unknown(model: HookedModel, name: str, layer: int) -> InputError:
    """The error for a neuron that the model does not have: it says what is in its place."""
    shapes = neuron_shapes(model)
    last_layer = len(model.blocks) - 1
    first = shapes.get(Site(0, "neurons"))
    is_dense = all(site.part == "neurons" for site in shapes)
    if first and is_dense:
        (width,) = shapes.get(Site(layer, "neurons"), first)
        what_is_there = f"layers 0 to {last_layer} of {_counted(width)}"
    elif layer > last_layer:
        what_is_there = f"layers 0 to {last_layer}"
    else:
        kinds = [_described(site, width) for site, (width,) in shapes.items() if site.layer == layer]
        what_is_there = f"in layer {layer} {' and '.join(kinds)}"
    return InputError(f"no neuron {name}: this model has {what_is_there}")


def _described(site: Site, n_neurons: int) -> str:
    """The neurons of a site in words."""
    if site.is_of_experts:
        d_expert = n_neurons // site.n_experts
        return f"experts E0 to E{site.n_experts - 1} of {_counted(d_expert)}"
    if site.part == "shared":
        return f"a shared expert of {_counted(n_neurons)}"
    return _counted(n_neurons)


def _counted(n_neurons: int) -> str:
    """How many neurons, and their numbers."""
    return f"{n_neurons} neurons (0 to {n_neurons - 1})"
