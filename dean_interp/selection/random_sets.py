"""Random selections that differ from the one under test in nothing but which units they hold.

They are matched by site and stratum (`selection.strata`), and grown where they should do as much damage as an edit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import Strata


def random_like(
    selection: Selection,
    strata: Strata,
    *,
    seed: int,
    growth: float = 1.0,
) -> Selection:
    """Random units from outside `selection`, as many per site and stratum.

    Every unit has a turn: the k-th of a stratum that holds c selected units comes at growth (k - u) / c, with u
    uniform. A draw is the first `round(growth * len(selection))` in turn, so a larger growth adds units and drops none,
    and at 1 every stratum has its count.

    Args:
        selection: the set to imitate; sites where it has no unit get none.
        strata: the stratum of every unit, from `strata`.
        seed: Seed for the draw.
        growth: how many times the size of `selection`; what a stratum cannot give comes from the rest of its site.

    Raises:
        InputError: `growth` not positive, or more units wanted than the sites have outside the selection.
    """
    if growth <= 0:
        raise InputError(f"growth must be positive, got {growth}")
    n_wanted = round(growth * len(selection))
    n_outside = n_units_outside(selection)
    if n_wanted > n_outside:
        raise InputError(f"{n_wanted} units were asked for; the sites have {n_outside} outside the selection")
    units = {site: torch.zeros(0, dtype=torch.int64) for site in selection.units}
    if n_wanted == 0:
        return Selection(units, selection.shapes, selection.prompt_hashes)

    # All turns up to some growth. Sites that run out of units need the turns of a larger one.
    reach = growth + 1
    turns = _turns_of_sites(selection, strata, reach, seed)
    while sum(site_turns.n_up_to(reach) for site_turns in turns.values()) < n_wanted:
        reach *= 2
        turns = _turns_of_sites(selection, strata, reach, seed)

    # The first in turn, over all sites; ties go by site, then by index.
    growths = np.concatenate([site_turns.growths for site_turns in turns.values()])
    indices = np.concatenate([site_turns.units for site_turns in turns.values()])
    n_turns = [len(site_turns) for site_turns in turns.values()]
    site_numbers = np.repeat(np.arange(len(turns)), n_turns)
    first = np.lexsort((indices, site_numbers, growths))[:n_wanted]
    for number, site in enumerate(turns):
        chosen = indices[first[site_numbers[first] == number]]
        units[site] = _ascending(chosen)
    return Selection(units, selection.shapes, selection.prompt_hashes)


def split_like(
    drawn: Selection,
    parts: Sequence[Selection],
    strata: Strata,
    *,
    seed: int,
) -> list[Selection]:
    """A random selection divided at random into sets like `parts`, as many per site, and per stratum where it can be.

    `drawn` is like the union of the parts (`random_like`), which share no unit.
    """
    units: list[dict[Site, Tensor]] = [{} for _ in parts]
    for number, (site, chosen) in enumerate(drawn.units.items()):
        members = torch.cat([part.units[site] for part in parts]).numpy()
        if len(members) != len(chosen):
            raise InputError(f"{len(chosen)} units of {site} were drawn for parts that hold {len(members)}")
        sizes = [len(part.units[site]) for part in parts]
        owners = np.repeat(np.arange(len(parts)), sizes)

        # Both in the order of their strata, at random within one: the k-th unit drawn takes the k-th member's part.
        generator = np.random.default_rng([seed, number])
        codes = strata[site].numpy().ravel()
        drawn_units = chosen.numpy()
        drawn_units = drawn_units[_by_stratum(drawn_units, codes, generator)]
        owners = owners[_by_stratum(members, codes, generator)]
        for part_number, part_units in enumerate(units):
            part_units[site] = _ascending(drawn_units[owners == part_number])
    return [Selection(part_units, drawn.shapes, drawn.prompt_hashes) for part_units in units]


def n_units_outside(selection: Selection) -> int:
    """How many units the sites of a selection have that it does not hold; sites without one do not count."""
    n_outside = 0
    for site, n_selected in selection.counts().items():
        if n_selected:
            n_outside += math.prod(selection.shapes[site]) - n_selected
    return n_outside


@dataclass(frozen=True)
class _Turns:
    """When the units of a site outside a selection are drawn."""

    units: np.ndarray
    growths: np.ndarray
    """The growth at which each of the units is drawn."""

    def __len__(self) -> int:
        return len(self.units)

    def n_up_to(self, growth: float) -> int:
        """How many of the units are drawn up to a growth."""
        return int((self.growths <= growth).sum())


def _turns_of_sites(
    selection: Selection,
    strata: Strata,
    reach: float,
    seed: int,
) -> dict[Site, _Turns]:
    """The turns of every site that holds a selected unit, up to growth `reach`."""
    sites = [site for site, chosen in selection.units.items() if len(chosen)]
    turns = {}
    for number, site in enumerate(sites):
        generator = np.random.default_rng([seed, number])
        codes = strata[site].numpy().ravel()
        turns[site] = _turns(selection.units[site].numpy(), codes, reach, generator)
    return turns


def _turns(
    chosen: np.ndarray,
    codes: np.ndarray,
    reach: float,
    generator: np.random.Generator,
) -> _Turns:
    """The units of a site outside `chosen` whose turn comes up to growth `reach`; `codes` are the units' strata.

    A few that come later stand among them.
    """
    n_chosen = np.bincount(codes[chosen])
    strata_with_chosen = np.flatnonzero(n_chosen)
    is_free = np.ones(len(codes), dtype=bool)
    is_free[chosen] = False
    # The turns of each stratum up to `reach`, and all its units with the turns that they have there.
    given, own = [], []
    for code in strata_with_chosen:
        is_member = (codes == code) & is_free
        members = generator.permutation(np.flatnonzero(is_member))
        # The k-th turn of a stratum with c chosen units comes at growth (k - u) / c.
        n_given = int(reach * n_chosen[code]) + 1
        k = np.arange(1, max(n_given, len(members)) + 1)
        turns = (k - generator.random()) / n_chosen[code]
        given.append(turns[:n_given])
        own.append(_Turns(members, turns[: len(members)]))
    unfilled = [turns[len(members) :] for turns, members in zip(given, own, strict=True)]
    to_fill = np.sort(np.concatenate(unfilled))
    if not len(to_fill):
        drawn = [members.units[: len(turns)] for turns, members in zip(given, own, strict=True)]
        return _Turns(np.concatenate(drawn), np.concatenate(given))

    # Where a stratum ran out, units of strata without a chosen one fill in.
    is_other = ~np.isin(codes, strata_with_chosen)
    others = generator.permutation(np.flatnonzero(is_other))[: len(to_fill)]
    own.append(_Turns(others, to_fill[: len(others)]))
    # All take the site's turns in the order of their own: where no unit filled in, the next ones come earlier.
    units = np.concatenate([members.units for members in own])
    own_growths = np.concatenate([members.growths for members in own])
    in_order = units[np.lexsort((units, own_growths))]
    growths = np.sort(np.concatenate(given))
    n_turns = min(len(growths), len(in_order))
    return _Turns(in_order[:n_turns], growths[:n_turns])


def _by_stratum(
    units: np.ndarray,
    codes: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """The order that sorts units by their strata, at random within one."""
    return np.lexsort((generator.random(len(units)), codes[units]))


def _ascending(units: np.ndarray) -> Int[Tensor, " unit"]:
    return torch.from_numpy(np.sort(units).astype(np.int64))
