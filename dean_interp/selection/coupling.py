"""Coupled units: important to both behaviours, not to general ability (arXiv 2410.16672, section 4).

A set intersection. (The released code intersects positions in two sorted lists instead: see `docs/from_the_paper.md`.)
"""

from dataclasses import dataclass

import pandas as pd
import torch

from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores, Top
from dean_interp.selection.selection import Selection, rounded_up, top_fraction

Fraction = float | tuple[float, float, float]
"""Of the units of a site: one for both behaviours and general, or one for each of the three."""


@dataclass(frozen=True)
class Coupling(Framed):
    """Every set on the way to the coupled units; `len` of each is its size."""

    first: Selection
    second: Selection
    general: Selection
    both: Selection
    coupled: Selection
    fractions: tuple[float, float, float]
    """Of first, second and general."""

    def __repr__(self) -> str:
        return f"Coupling({len(self.coupled)} coupled of {len(self.both)} in both tops, fractions {self.fractions})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer: how many units of it each set holds."""
        sets = {name: getattr(self, name).layer_counts() for name in self.sizes()}
        return pd.DataFrame(sets).rename_axis("layer").reset_index()

    def sizes(self) -> dict[str, int]:
        """How many units each set holds, in the order in which they are made."""
        return {name: len(getattr(self, name)) for name in ("first", "second", "general", "both", "coupled")}


def coupling(first: Scores, second: Scores, general: Scores, *, fraction: Fraction) -> Coupling:
    """Both behaviours' top `fraction` of each site, their intersection, and what is left without general's top.

    `fraction` is one for all three, or one each, in the order of the scores.
    """
    fractions = each_fraction(fraction)
    tops = [top_fraction(scores, one) for scores, one in zip((first, second, general), fractions, strict=True)]
    both = tops[0] & tops[1]
    return Coupling(*tops, both=both, coupled=both - tops[2], fractions=fractions)


def each_fraction(fraction: Fraction) -> tuple[float, float, float]:
    """The fractions of first, second and general. Raises `InputError` where one is not in (0, 1]."""
    fractions = (fraction,) * 3 if isinstance(fraction, float | int) else tuple(fraction)
    if len(fractions) != 3 or not all(0 < one <= 1 for one in fractions):
        raise InputError(f"fraction must be in (0, 1], one or one each for first, second, general; got {fraction}")
    return fractions


def coupled(first: Scores, second: Scores, general: Scores, *, fraction: Fraction) -> Selection:
    """Units in the top `fraction` for both behaviours but not for general text.

    Raises `InputError` where there is none, with the smallest fraction that gives one.
    """
    found = coupling(first, second, general, fraction=fraction)
    refuse_empty(found, first, second, general)
    return found.coupled


def opposite_sign(selection: Selection, first: Scores, second: Scores) -> Selection:
    """The selected units whose effects on the two behaviours have opposite signs: what helps one hurts the other.

    Raises `InputError` where the scores are not signed (`ScoringConfig(signed=True)`).
    """
    for scores in (first, second):
        if not scores.facts.get("signed"):
            raise InputError(f"the scores of {scores.behaviour} are not signed: score with ScoringConfig(signed=True)")
    units = {
        site: indices[first.at(site, indices) * second.at(site, indices) < 0]
        for site, indices in selection.units.items()
    }
    return Selection(units, selection.shapes, selection.prompt_hashes | first.prompt_hashes | second.prompt_hashes)


def refuse_empty(found: Coupling, first: Scores, second: Scores, general: Scores) -> None:
    """Raise `InputError` where no unit is coupled, with the smallest fraction (for all three) that gives one."""
    if not len(found.coupled):
        smallest = smallest_coupling_fraction(first, second, general)
        hint = f"the smallest fraction with one is {rounded_up(smallest)}" if smallest else "no fraction gives one"
        given = found.fractions[0] if len(set(found.fractions)) == 1 else found.fractions
        raise InputError(f"no coupled unit at fraction {given} (sizes {found.sizes()}); {hint}")


def smallest_coupling_fraction(first: Scores, second: Scores, general: Scores) -> float | None:
    """The smallest fraction at which some unit is coupled, or None where there is none at any (of what was kept).

    A unit is coupled while the fraction passes both behaviours' ranks and not yet general's.
    """
    found = []
    for site, value in first.values.items():
        ranks = [_ranks(scores, site) for scores in (first, second, general)]
        needed = torch.maximum(ranks[0], ranks[1])
        needed = needed[(needed < ranks[2]) & (needed < value.numel())]
        if len(needed):
            # the smallest float fraction whose int(fraction * n) reaches it
            found.append(float(needed.min() + 1) / value.numel() * (1 + 1e-9))
    return min(found, default=None)


def _ranks(scores: Scores, site: Site) -> torch.Tensor:
    """Place of every unit, 0 for the highest score; ties by index. Units that were not kept come last, all alike."""
    value = scores.values[site]
    n_units = value.numel()
    held = value.values if isinstance(value, Top) else value.flatten()
    indices = value.indices if isinstance(value, Top) else torch.arange(n_units)
    order = torch.sort(held.abs(), descending=True, stable=True).indices
    return torch.full((n_units,), n_units).scatter(0, indices[order], torch.arange(len(order)))


couple = coupling
