"""Signed coupling: units by what they do to two behaviours, of either kind, as sets.

The gain of a unit is how much the margin grows where the unit counts for more, to first order (`selection.gains`): of a
neuron by its gate, of a weight by a factor on it. A unit with a gain below 0 raises the margin when it is silenced.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import Top
from dean_interp.selection.gains import gains_at, has_errors, refuse_other_scores, towards_zero
from dean_interp.selection.selection import Selection


def signed_units(
    first: Scores, second: Scores, *, first_sign: int, second_sign: int, certainty: float = 1.0
) -> Selection:
    """Units whose gains have the given signs, each beyond `certainty` standard errors, clustered by topic.

    `first_sign=-1, second_sign=-1` are the units that raise both margins when silenced, `1, 1` when amplified, and
    opposite signs help one behaviour and hurt the other. Selections have set algebra: leave out what general text needs
    by `signed_units(...) - top_fraction(general, 0.01)`.

    Of weights, those count that both scores kept. Their errors are known where they have groups
    (`scoring.per_example.with_groups`, a further pass), or, where no two prompts share a topic, from the scoring pass
    itself (`importance(..., also=("squared",))`).

    Args:
        first: `importance(..., config=ScoringConfig(target="margin", signed=True, groups="cluster"))`.
        second: the other behaviour's.
        first_sign: -1 or 1.
        second_sign: -1 or 1.
        certainty: number of standard errors between a gain and 0.

    Raises:
        InputError: other scores, weights without errors, scores of other sites, a sign that is not -1 or 1.
    """
    if first_sign not in (-1, 1) or second_sign not in (-1, 1):
        raise InputError(f"a sign must be -1 or 1, got {first_sign} and {second_sign}")
    for scores in (first, second):
        refuse_other_scores(scores)
        without = sorted(site for site in scores.values if not has_errors(scores, site))
        if without:
            raise InputError(
                f"the scores of '{scores.behaviour}' have no groups of examples at {without[0]}, so their errors are "
                "not known: give the weights that were kept to scoring.per_example.with_groups, or, where no two "
                "prompts share a topic, score with also=('squared',)"
            )
    if first.shapes != second.shapes:
        raise InputError(f"'{first.behaviour}' and '{second.behaviour}' must be scored at the same sites")
    units: dict[Site, Tensor] = {}
    for site in first.values:
        candidates = _indices(first, site)
        candidates = candidates[torch.isin(candidates, _indices(second, site))]
        fits = first_sign * _bound(first, site, candidates, certainty) > 0
        fits &= second_sign * _bound(second, site, candidates, certainty) > 0
        units[site] = candidates[fits]
    return Selection(units, first.shapes, first.prompt_hashes | second.prompt_hashes)


def _indices(scores: Scores, site: Site) -> Int[Tensor, " unit"]:
    """The units of a site whose scores are held, ascending."""
    value = scores.values[site]
    return value.indices if isinstance(value, Top) else torch.arange(value.numel())


def _bound(scores: Scores, site: Site, units: Int[Tensor, " unit"], certainty: float) -> Float[Tensor, " unit"]:
    """The end of each gain's interval that is nearer to 0, or 0."""
    mean, error = gains_at(scores, site)
    places = torch.searchsorted(_indices(scores, site), units)
    return towards_zero(mean[places], certainty * error[places])
