"""Where an estimand is estimated: every layer by itself, and all layers that the ablation can reach as one."""

from collections.abc import Iterable
from dataclasses import dataclass

from dean_interp.information.activations import Activations
from dean_interp.information.estimands import WITH_SILENCED, Estimand, InformationArm
from dean_interp.models.sites import MATRICES, Site


@dataclass(frozen=True)
class Place:
    """A layer, or several layers taken as one."""

    name: str
    layers: tuple[int, ...]

    def sites_among(self, sites: Iterable[Site]) -> list[Site]:
        """Those of some sites that lie in its layers, layer by layer: in a mixture a layer has several of neurons."""
        return sorted(site for site in sites if site.layer in self.layers)


def places_of(estimand: Estimand, before: Activations, edit: InformationArm) -> list[Place]:
    """Every layer by itself, and those that the ablation can reach as one."""
    if estimand == "paper_nhsic":
        return _single_layers(sorted(before.residual))
    # where no layer has a neuron to compare, every layer says so
    sites = before.values or before.units.units
    places = _single_layers(sorted({site.layer for site in sites}))
    reached = [place for place in places if is_reached(place, estimand, before, edit)] or places
    if len(reached) > 1:
        layers = tuple(place.layers[0] for place in reached)
        places.append(Place(f"layers {layers[0]} to {layers[-1]} as one", layers))
    return places


def _single_layers(layers: Iterable[int]) -> list[Place]:
    return [Place(f"layer {layer}", (layer,)) for layer in layers]


def is_reached(place: Place, estimand: Estimand, before: Activations, edit: InformationArm) -> bool:
    """Whether something that is changed can change the activations of the last layer of the place."""
    last = place.layers[-1]
    compared = place.sites_among(before.units.units)
    for site, units in edit.changed.units.items():
        if not len(units):
            continue
        if site.layer < last:
            return True
        if site.layer == last and (estimand in WITH_SILENCED or _feeds(site, compared)):
            return True
    return False


def _feeds(site: Site, compared: Iterable[Site]) -> bool:
    """Whether what is changed at a site comes before neurons of the same layer that are compared."""
    # a layer's own neurons stand after its attention, gate and in, and before its out
    if site.unit != "weight" or site == site.neurons.out:
        return False
    return site.part in MATRICES["attention"] or site.neurons in compared
