"""Where a coupling stands between its floor (chance within strata) and its ceiling (one behaviour with itself)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dean_interp.models.neuron_names import name_of
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import Coupling, couple
from dean_interp.selection.selection import Selection
from dean_interp.selection.stability import (
    STABLE_PROBABILITY,
    Floor,
    Halves,
    chance_overlap,
    half_overlap,
    n_groups,
    overlap_coefficient,
    selection_probability,
)
from dean_interp.selection.strata import Strata, by_general_score


@dataclass(frozen=True)
class Chance:
    """Whether the coupling is more than chance, and whether other examples would give it."""

    floor: Floor
    """Units in both tops and not in general's, beside shuffles within strata (general score among them)."""
    overlap: Mapping[str, float]
    """Overlap coefficient of each pair of tops; the pairs with general text are of unrelated behaviours."""
    halves: Halves | None
    """Jaccard overlap of one behaviour's top on half of the examples with the other's on the other half."""
    ceiling: Mapping[str, Halves] | None
    """Jaccard overlaps of each behaviour's top on one half with its own top on the other half."""
    probability: Mapping[str, float] | None
    """How often each coupled unit is selected when the examples are drawn anew. None for weights, as the two above."""

    @property
    def stable(self) -> list[str]:
        """The coupled units that are selected often enough to be called stable."""
        if self.probability is None:
            return []
        return [name for name, share in self.probability.items() if share >= STABLE_PROBABILITY]


def chance_of(
    coupling: Coupling,
    scores: Sequence[Scores],
    strata: Strata,
    *,
    seed: int,
) -> Chance:
    """The coupling's floor, its ceiling, and how often each coupled unit is selected on other draws of the examples.

    Ceiling and stability need groups of examples, which neurons' scores hold. For weights they are None (see
    `scoring.per_example.with_groups`).
    """
    first, second, general = scores
    floor = chance_overlap(
        coupling.first,
        coupling.second,
        by_general_score(strata, general),
        excluded=coupling.general,
        seed=seed,
    )
    overlap = {
        f"{first.behaviour} and {second.behaviour}": overlap_coefficient(coupling.first, coupling.second),
        f"{first.behaviour} and {general.behaviour}": overlap_coefficient(coupling.first, coupling.general),
        f"{second.behaviour} and {general.behaviour}": overlap_coefficient(coupling.second, coupling.general),
    }
    if not all(map(_has_groups, scores)):
        return Chance(floor=floor, overlap=overlap, halves=None, ceiling=None, probability=None)
    fraction = max(coupling.fractions[:2])
    halves = half_overlap(first, second, fraction=fraction, seed=seed)
    ceiling = {
        first.behaviour: half_overlap(first, first, fraction=fraction, seed=seed),
        second.behaviour: half_overlap(second, second, fraction=fraction, seed=seed),
    }
    return Chance(
        floor=floor,
        overlap=overlap,
        halves=halves,
        ceiling=ceiling,
        probability=_coupled_probability(coupling, scores, seed),
    )


def _coupled_probability(
    coupling: Coupling,
    scores: Sequence[Scores],
    seed: int,
) -> dict[str, float]:
    """How often each coupled neuron is coupled when the examples are drawn anew, by name: `L3.17`."""

    def coupled(drawn: Sequence[Scores]) -> Selection:
        return couple(*drawn, fraction=coupling.fractions).coupled

    probability = selection_probability(scores, coupled, seed=seed)
    named = {}
    for site, indices in coupling.coupled.units.items():
        for index in indices.tolist():
            name = name_of((site, index), coupling.coupled.shapes[site][0])
            named[str(name)] = float(probability[site][index])
    return named


def _has_groups(scores: Scores) -> bool:
    return scores.groups.keys() == scores.values.keys() and n_groups(scores) >= 2
