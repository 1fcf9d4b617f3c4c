"""Coupled units: important to both behaviours, not to general ability (arXiv 2410.16672, section 4).

They are a set intersection. The released code intersects positions in two sorted lists instead
(`docs/from_the_paper.md`).
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import Top, rounded_up
from dean_interp.selection.selection import Selection, top_fraction

Fraction = float | tuple[float, float, float]
"""The fraction of a site's units in a top: one for all three tops, or one each for first, second and general."""


@dataclass(frozen=True)
class Coupling(Framed):
    """The coupled units, and every set on the way to them."""

    first: Selection
    second: Selection
    general: Selection
    both: Selection
    """Units in the tops of both behaviours."""
    coupled: Selection
    """Units in both tops but not in general's."""
    fractions: tuple[float, float, float]
    """The fractions of the tops of first, second and general."""

    def __repr__(self) -> str:
        sizes = self.sizes()
        return f"Coupling({sizes['coupled']} coupled of {sizes['both']} in both tops, fractions {self.fractions})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: how many units of it each set holds."""
        counts = {name: selection.layer_counts() for name, selection in self._sets().items()}
        return pd.DataFrame(counts).rename_axis("layer").reset_index()

    def sizes(self) -> dict[str, int]:
        """How many units each set holds, in the order in which they are made."""
        return {name: len(selection) for name, selection in self._sets().items()}

    def _sets(self) -> dict[str, Selection]:
        return {
            "first": self.first,
            "second": self.second,
            "general": self.general,
            "both": self.both,
            "coupled": self.coupled,
        }


def couple(
    first: Scores,
    second: Scores,
    general: Scores,
    *,
    fraction: Fraction,
) -> Coupling:
    """Units in the top `fraction` for both behaviours but not for general text (arXiv 2410.16672, section 4).

    The coupled set may be empty (`refuse_empty`). Raises `InputError` where a fraction is not in (0, 1], or selects no
    unit of its scores.
    """
    fractions = each_fraction(fraction)
    first_top = top_fraction(first, fractions[0])
    second_top = top_fraction(second, fractions[1])
    general_top = top_fraction(general, fractions[2])
    both = first_top & second_top
    return Coupling(
        first=first_top,
        second=second_top,
        general=general_top,
        both=both,
        coupled=both - general_top,
        fractions=fractions,
    )


def each_fraction(fraction: Fraction) -> tuple[float, float, float]:
    """The fractions of first, second and general. Raises `InputError` where one is not in (0, 1]."""
    if isinstance(fraction, float | int):
        fractions = (fraction, fraction, fraction)
    else:
        fractions = tuple(fraction)
    are_fractions = all(0 < part <= 1 for part in fractions)
    if len(fractions) != 3 or not are_fractions:
        raise InputError(f"fraction must be in (0, 1], one or one each for first, second, general; got {fraction}")
    return fractions


def refuse_empty(
    coupling: Coupling,
    first: Scores,
    second: Scores,
    general: Scores,
) -> None:
    """Raise `InputError` where no unit is coupled, with the smallest fraction (for all three) that gives one."""
    if len(coupling.coupled):
        return
    smallest = smallest_coupling_fraction(first, second, general)
    if smallest is None:
        hint = "no fraction gives one"
    else:
        hint = f"the smallest fraction with one is {rounded_up(smallest)}"
    is_one_fraction = len(set(coupling.fractions)) == 1
    fractions = coupling.fractions[0] if is_one_fraction else coupling.fractions
    raise InputError(f"no coupled unit at fraction {fractions} (sizes {coupling.sizes()}); {hint}")


def opposite_sign(selection: Selection, first: Scores, second: Scores) -> Selection:
    """The selected units whose effects on the two behaviours have opposite signs: what helps one hurts the other.

    Raises `InputError` where the scores hold no signed means (`Scores.signed_means`), or not those of all these units.
    """
    units = {}
    for site, indices in selection.units.items():
        # Signs alone: a product of two small effects may round to 0.
        product = first.signed_at(site, indices).sign() * second.signed_at(site, indices).sign()
        units[site] = indices[product < 0]
    prompt_hashes = selection.prompt_hashes | first.prompt_hashes | second.prompt_hashes
    return Selection(units, selection.shapes, prompt_hashes)


def smallest_coupling_fraction(
    first: Scores,
    second: Scores,
    general: Scores,
) -> float | None:
    """The smallest fraction at which some unit is coupled, or None where there is none at any (of what was kept).

    A unit is coupled while the fraction passes both behaviours' ranks and not yet general's.
    """
    smallest = []
    for site, shape in first.shapes.items():
        n_units = torch.Size(shape).numel()
        # A unit is in both tops from the worse of its two ranks on. Ranks of n_units are those of units not kept.
        in_both_from = torch.maximum(_ranks(first, site), _ranks(second, site))
        is_ranked = in_both_from < n_units
        is_before_general = in_both_from < _ranks(general, site)
        candidates = in_both_from[is_ranked & is_before_general]
        if len(candidates):
            # The smallest float fraction with int(fraction * n_units) above the rank.
            n_selected = float(candidates.min() + 1)
            smallest.append(n_selected / n_units * (1 + 1e-9))
    return min(smallest, default=None)


def _ranks(scores: Scores, site: Site) -> Int[Tensor, " unit"]:
    """The rank of every unit, 0 for the highest score; ties by index. Units that were not kept come last, all alike."""
    value = scores.values[site]
    n_units = value.numel()
    if isinstance(value, Top):
        indices = value.indices
        values = value.values
    else:
        indices = torch.arange(n_units)
        values = value.flatten()
    order = torch.sort(values.abs(), descending=True, stable=True).indices
    ranks = torch.full((n_units,), n_units)
    ranks[indices[order]] = torch.arange(len(order))
    return ranks
