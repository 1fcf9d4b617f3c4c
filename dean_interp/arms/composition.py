"""What an edit is made of: where its neurons sit, how few they are, whether other topics would give them again.

A neuron's part in an edit is its change times its scaled gains, so that the parts of gates add up to the rise that they
predict; in a set that is silenced every neuron has the same part. Chance is always that of random neurons in the same
layers: how many units two sets share is then hypergeometric, layer by layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import Gains, gains_of
from dean_interp.selection.gates import Gates
from dean_interp.selection.gating import PerNeuron
from dean_interp.selection.selection import Selection
from dean_interp.selection.stability import Floor, chance_overlap, jaccard
from dean_interp.statistics import Interval, clustered_interval

HALF, MOST = 0.5, 0.9
"""Shares of an edit whose fewest neurons and layers are counted."""


@dataclass(frozen=True)
class Spread:
    """How an edit is spread over layers and neurons."""

    by_layer: tuple[float, ...]
    """Each layer's share of the edit, the first layer first; their sum is 1, or 0 for an empty set."""
    layers_for_half: int
    """The fewest layers that hold half of it."""
    layers_for_most: int
    """The fewest layers that hold nine tenths of it."""
    neurons_for_half: int
    neurons_for_most: int
    effective_neurons: float
    """The participation ratio `(sum of parts)^2 / sum of parts^2`: n equal parts have n."""

    @property
    def depth(self) -> float:
        """The mean of the layers, weighted by their shares, from 0 (the first) to 1 (the last)."""
        last = max(len(self.by_layer) - 1, 1)
        mean = sum(number * share for number, share in enumerate(self.by_layer))
        return mean / last


def spread_of(parts: PerNeuron) -> Spread:
    """How the parts of all neurons are spread."""
    by_layer: dict[int, float] = {}
    for site in sorted(parts):
        by_layer.setdefault(site.layer, 0.0)
        by_layer[site.layer] += float(parts[site].double().sum())
    layers = np.array(list(by_layer.values()))
    neurons = torch.cat([parts[site] for site in sorted(parts)]).double().numpy()
    total = layers.sum()
    shares = layers / total if total else np.zeros(len(layers))
    sum_of_squares = float((neurons**2).sum())
    participation = float(neurons.sum() ** 2 / sum_of_squares) if sum_of_squares else 0.0
    return Spread(
        by_layer=tuple(shares.tolist()),
        layers_for_half=n_holding(layers, HALF),
        layers_for_most=n_holding(layers, MOST),
        neurons_for_half=n_holding(neurons, HALF),
        neurons_for_most=n_holding(neurons, MOST),
        effective_neurons=participation,
    )


def mean_spread(spreads: Sequence[Spread]) -> Spread:
    """The mean of several spreads, counts rounded."""
    shares = np.mean([spread.by_layer for spread in spreads], axis=0)
    return Spread(
        by_layer=tuple(shares.tolist()),
        layers_for_half=round(np.mean([spread.layers_for_half for spread in spreads])),
        layers_for_most=round(np.mean([spread.layers_for_most for spread in spreads])),
        neurons_for_half=round(np.mean([spread.neurons_for_half for spread in spreads])),
        neurons_for_most=round(np.mean([spread.neurons_for_most for spread in spreads])),
        effective_neurons=float(np.mean([spread.effective_neurons for spread in spreads])),
    )


def n_holding(parts: Float[np.ndarray, " part"], share: float) -> int:
    """The fewest parts whose sum is that share of the sum of all; parts below 0 count against it."""
    total = parts.sum()
    if total <= 0:
        return 0
    sums_of_largest = np.sort(parts)[::-1].cumsum()
    # Sums of floats: a share that is met to the last digits is met.
    is_reached = sums_of_largest >= share * total * (1 - 1e-9)
    return int(is_reached.argmax()) + 1


def parts_of_set(selection: Selection) -> dict[Site, Tensor]:
    """Every neuron of a set has the same part."""
    return {site: selection.mask(site).float() for site in selection.units}


def parts_of_gates(gates: Gates, benefit: PerNeuron) -> dict[Site, Tensor]:
    """Each neuron's part in the predicted rise: its change times its benefit (`selection.gating.benefit_of`)."""
    return {site: change * benefit[site] for site, change in gates.changes.items()}


@dataclass(frozen=True)
class Edits:
    """What stands beside each other: gates, and sets of neurons."""

    gates: Gates
    dose: float
    """The dose that they are at."""
    parts: PerNeuron
    """Each neuron's part in the rise that they predict."""
    sets: Mapping[str, Selection]
    """The sets of neurons, by name."""


@dataclass(frozen=True)
class SharedUnits:
    """The units that two sets share, beside random sets of the same sizes in the same layers."""

    n_first: int
    n_second: int
    n_both: int
    expected: float
    """How many units random sets share on average."""
    p: float
    """One-sided: how often random sets share as many; at least 1 in 1000."""
    jaccard: float
    jaccard_by_chance: float


def shared_units(first: Selection, second: Selection) -> SharedUnits:
    """What two sets share, beside chance within layers."""
    floor = overlap_within_layers(first, second)
    n_either = len(first) + len(second) - floor.expected
    return SharedUnits(
        n_first=len(first),
        n_second=len(second),
        n_both=floor.n,
        expected=floor.expected,
        p=floor.p,
        jaccard=jaccard(first, second),
        jaccard_by_chance=floor.expected / n_either if n_either else 0.0,
    )


def overlap_within_layers(first: Selection, second: Selection) -> Floor:
    """`first & second`, where chance shuffles the second among the neurons of each layer."""
    layers = {site: torch.zeros(shape, dtype=torch.int16) for site, shape in first.shapes.items()}
    return chance_overlap(first, second, layers)


@dataclass(frozen=True)
class SetEffect:
    """What the neurons of a set do to both margins, to first order, and what gates do with them."""

    n: int
    when_silenced: Mapping[str, float]
    """Share of the neurons whose silencing raises both margins, the first or the second alone, or neither."""
    by_chance: Mapping[str, float]
    """The same of random neurons in the same layers."""
    p_both: float
    """One-sided: how often as many of random neurons would raise both when silenced. Small: the set hurts both."""
    p_neither: float
    """The same of neurons that raise neither: they lower both. Small: the set helps both."""
    silencing_all: Mapping[str, Interval]
    """Change of each margin when all of them are silenced, nats per token, clustered by topic."""
    silencing_chance: Mapping[str, float]
    """The same of random neurons in the same layers."""
    share_of_rise: float
    """Their share of the rise that gates predict."""
    n_lowered: int
    """Number that gates lower; the others are raised."""


def set_effect(
    selection: Selection,
    scores: Sequence[Scores],
    gates: Gates,
    parts: PerNeuron,
) -> SetEffect:
    """What a set does.

    Args:
        selection: the set.
        scores: scores of both margins by topic, as `gains_of` takes them.
        gates: the gates that it stands beside.
        parts: each neuron's part in the rise that they predict.
    """
    first, second = (gains_of(margin) for margin in scores[:2])
    floors = {}
    for name, neurons in _kinds_when_silenced(first, second).items():
        floors[name] = overlap_within_layers(selection, neurons)
    size = max(len(selection), 1)
    return SetEffect(
        n=len(selection),
        when_silenced={name: floor.n / size for name, floor in floors.items()},
        by_chance={name: floor.expected / size for name, floor in floors.items()},
        p_both=floors["both"].p,
        p_neither=floors["neither"].p,
        silencing_all={margin.behaviour: _silencing(selection, margin) for margin in scores[:2]},
        silencing_chance={gains.behaviour: _silencing_chance(selection, gains) for gains in (first, second)},
        share_of_rise=_share_of_rise(selection, parts),
        n_lowered=_n_lowered(selection, gates),
    )


def _share_of_rise(selection: Selection, parts: PerNeuron) -> float:
    total = sum(float(part.sum()) for part in parts.values())
    if not total:
        return 0.0
    of_set = sum(float(parts[site][units].sum()) for site, units in selection.units.items())
    return of_set / total


def _n_lowered(selection: Selection, gates: Gates) -> int:
    n_lowered = 0
    for site, units in selection.units.items():
        is_lowered = gates.changes[site][units] < 0
        n_lowered += int(is_lowered.sum())
    return n_lowered


def _kinds_when_silenced(first: Gains, second: Gains) -> dict[str, Selection]:
    """All neurons by the margins that rise when they are silenced: those with a gain below 0."""
    raises_first = _raised_when_silenced(first)
    raises_second = _raised_when_silenced(second)
    every_unit = {site: torch.arange(len(mean)) for site, mean in first.mean.items()}
    all_neurons = Selection(every_unit, raises_first.shapes)
    return {
        "both": raises_first & raises_second,
        first.behaviour: raises_first - raises_second,
        second.behaviour: raises_second - raises_first,
        "neither": all_neurons - raises_first - raises_second,
    }


def _raised_when_silenced(gains: Gains) -> Selection:
    units, shapes = {}, {}
    for site, mean in gains.mean.items():
        units[site] = torch.nonzero(mean < 0)[:, 0]
        shapes[site] = tuple(mean.shape)
    return Selection(units, shapes)


def _silencing(selection: Selection, scores: Scores) -> Interval:
    """The change of a margin when a set is silenced, by topic: minus the sum of its gains, which are minus scores."""
    by_topic = torch.zeros(len(scores.clusters), dtype=torch.float64)
    for site, units in selection.units.items():
        by_topic += scores.groups[site][:, units].double().sum(1)
    # Every example has its topic's mean.
    sizes = list(scores.clusters.values())
    by_example = np.repeat(by_topic.numpy(), sizes)
    topics = np.repeat(list(scores.clusters), sizes)
    return clustered_interval(by_example, topics.tolist())


def _silencing_chance(selection: Selection, gains: Gains) -> float:
    expected_gain = 0.0
    for site, units in selection.units.items():
        mean_gain = float(gains.mean[site].mean())
        expected_gain += len(units) * mean_gain
    return -expected_gain


def rank_correlation(first: Gates, second: Gates) -> float:
    """Spearman's correlation of the changes of all neurons under two gates."""
    sites = sorted(first.multipliers)
    ranks = []
    for gates in (first, second):
        changes = torch.cat([gates.changes[site] for site in sites])
        ranks.append(stats.rankdata(changes.numpy()))
    return float(np.corrcoef(ranks)[0, 1])
