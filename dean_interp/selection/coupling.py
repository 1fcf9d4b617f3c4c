"""Coupled units: important to both behaviours, not to general ability (arXiv 2410.16672, section 4).

A set intersection. (The released code intersects positions in two sorted lists instead: see `docs/from_the_paper.md`.)
"""

from dataclasses import dataclass

import torch

from dean_interp.errors import InputError
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection, rounded_up, top_fraction


@dataclass(frozen=True)
class Coupling:
    """Every set on the way to the coupled units; `len` of each is its size."""

    first: Selection
    second: Selection
    general: Selection
    both: Selection
    coupled: Selection
    fraction: float

    def sizes(self) -> dict[str, int]:
        """How many units each set holds, in the order in which they are made."""
        return {name: len(getattr(self, name)) for name in ("first", "second", "general", "both", "coupled")}


def coupling(first: Scores, second: Scores, general: Scores, *, fraction: float) -> Coupling:
    """Both behaviours' top `fraction` of each site, their intersection, and what is left without general's top."""
    tops = [top_fraction(scores, fraction) for scores in (first, second, general)]
    both = tops[0] & tops[1]
    return Coupling(*tops, both=both, coupled=both - tops[2], fraction=fraction)


def coupled(first: Scores, second: Scores, general: Scores, *, fraction: float) -> Selection:
    """Units in the top `fraction` for both behaviours but not for general text.

    Raises `InputError` where there is none, with the smallest fraction that gives one.
    """
    found = coupling(first, second, general, fraction=fraction)
    refuse_empty(found, first, second, general)
    return found.coupled


def refuse_empty(found: Coupling, first: Scores, second: Scores, general: Scores) -> None:
    """Raise `InputError` where no unit is coupled, with the smallest fraction that gives one."""
    if not len(found.coupled):
        smallest = smallest_coupling_fraction(first, second, general)
        hint = f"the smallest fraction with one is {rounded_up(smallest)}" if smallest else "no fraction gives one"
        raise InputError(f"no coupled unit at fraction {found.fraction} (sizes {found.sizes()}); {hint}")


def smallest_coupling_fraction(first: Scores, second: Scores, general: Scores) -> float | None:
    """The smallest fraction at which some unit is coupled, or None where there is none at any.

    A unit is coupled while the fraction passes both behaviours' ranks and not yet general's.
    """
    found = []
    for site, value in first.values.items():
        ranks = [_ranks(scores[site].flatten()) for scores in (first, second, general)]
        needed = torch.maximum(ranks[0], ranks[1])
        needed = needed[needed < ranks[2]]
        if len(needed):
            # the smallest float fraction whose int(fraction * n) reaches it
            found.append(float(needed.min() + 1) / value.numel() * (1 + 1e-9))
    return min(found, default=None)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Place of every unit, 0 for the highest score; ties by index."""
    order = torch.sort(values, descending=True, stable=True).indices
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
