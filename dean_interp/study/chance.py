"""Where a coupling stands between its floor (chance within strata) and its ceiling (one behaviour with itself)."""

from collections.abc import Sequence

from dean_interp.scoring.scores import Scores
from dean_interp.selection.controls import Strata, by_general_score
from dean_interp.selection.coupling import Coupling, couple
from dean_interp.selection.stability import (
    chance_overlap,
    half_overlap,
    n_groups,
    overlap_coefficient,
    selection_probability,
)
from dean_interp.study.results import Chance


def chance_of(found: Coupling, scores: Sequence[Scores], strata: Strata, *, seed: int) -> Chance:
    """The coupling's floor, its ceiling, and how often each coupled unit is selected on other draws of the examples.

    Ceiling and stability need groups of examples, which neurons' scores hold; weights' are None (see
    `scoring.examples.with_groups`).
    """
    first, second, general = (one.behaviour for one in scores)
    finer = by_general_score(strata, scores[2])
    floor = chance_overlap(found.first, found.second, finer, excluded=found.general, seed=seed)
    pairs = {
        f"{first} and {second}": overlap_coefficient(found.first, found.second),
        f"{first} and {general}": overlap_coefficient(found.first, found.general),
        f"{second} and {general}": overlap_coefficient(found.second, found.general),
    }
    if any(one.groups.keys() != one.values.keys() or n_groups(one) < 2 for one in scores):
        return Chance(floor, pairs, None, None, None)
    fraction = max(found.fractions[:2])
    halves = [half_overlap(one, other, fraction=fraction, seed=seed)
              for one, other in ((scores[0], scores[1]), (scores[0], scores[0]), (scores[1], scores[1]))]  # fmt: skip
    probability = selection_probability(
        scores, lambda drawn: couple(*drawn, fraction=found.fractions).coupled, seed=seed
    )
    chosen = {f"L{site.layer}.{index}": float(probability[site][index])
              for site, indices in found.coupled.units.items() for index in indices.tolist()}  # fmt: skip
    return Chance(floor, pairs, halves[0], {first: halves[1], second: halves[2]}, chosen)
