"""Random selections that differ from the one under test in nothing but which units they hold.

They are matched by site and stratum (`selection.strata`), and grown where they should do as much damage as an edit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import Strata


def random_like(selection: Selection, strata: Strata, *, seed: int, growth: float = 1.0) -> Selection:
    """Random units from outside `selection`, as many per site and stratum.

    Every unit has a turn: the k-th of a stratum that holds c selected units comes at growth (k - u) / c, with u
    uniform. A draw is the first `round(growth * len(selection))` in turn, so a larger growth adds units and drops none,
    and at 1 every stratum has its count.

    Args:
        selection: the set to imitate; sites where it has no unit get none.
        strata: of every unit, from `strata`.
        seed: seed of the draw.
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
    sites = [site for site, chosen in selection.units.items() if len(chosen)]
    # All turns up to some growth; strata that run out of units need those of a larger one.
    drawn, reach, n_drawn = [(np.zeros(0), np.zeros(0))], growth + 1, 0
    while n_drawn < n_wanted:
        drawn = []
        for number, site in enumerate(sites):
            generator = np.random.default_rng([seed, number])
            drawn.append(_turns(selection.units[site].numpy(), strata[site].numpy().ravel(), reach, generator))
        n_drawn = sum(len(turns) for turns, _ in drawn)
        reach *= 2
    # The first in turn, over all sites; ties go by site, then by index.
    turn = np.concatenate([turns for turns, _ in drawn])
    unit = np.concatenate([units for _, units in drawn])
    site_number = np.repeat(np.arange(len(sites)), [len(turns) for turns, _ in drawn])
    first = np.lexsort((unit, site_number, turn))[:n_wanted]
    units = {site: torch.zeros(0, dtype=torch.int64) for site in selection.units}
    for number, site in enumerate(sites):
        chosen = unit[first[site_number[first] == number]]
        units[site] = torch.from_numpy(np.sort(chosen).astype(np.int64))
    return Selection(units, selection.shapes, selection.prompt_hashes)


def split_like(drawn: Selection, parts: Sequence[Selection], strata: Strata, *, seed: int) -> list[Selection]:
    """A random selection divided at random into sets like `parts`, as many per site, and per stratum where it can be.

    `drawn` is like the union of the parts (`random_like`), which share no unit.
    """
    units: list[dict[Site, Tensor]] = [{} for _ in parts]
    for number, (site, chosen) in enumerate(drawn.units.items()):
        generator = np.random.default_rng([seed, number])
        codes = strata[site].numpy().ravel()
        members = torch.cat([part.units[site] for part in parts]).numpy()
        owner = np.repeat(np.arange(len(parts)), [len(part.units[site]) for part in parts])
        if len(members) != len(chosen):
            raise InputError(f"{len(chosen)} units of {site} were drawn for parts that hold {len(members)}")
        # Both in the order of their strata, at random within one: the k-th unit drawn takes the k-th member's part.
        units_drawn = _by_stratum(chosen.numpy(), codes, generator)
        members_in_order = _by_stratum(members, codes, generator)
        part_of = dict(zip(members.tolist(), owner.tolist(), strict=True))
        part_number = np.array([part_of[unit] for unit in members_in_order.tolist()], dtype=np.int64)
        for k, part in enumerate(units):
            part[site] = torch.from_numpy(np.sort(units_drawn[part_number == k]).astype(np.int64))
    return [Selection(part, drawn.shapes, drawn.prompt_hashes) for part in units]


def _by_stratum(units: np.ndarray, codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The units in the order of their strata, at random within one."""
    return units[np.lexsort((generator.random(len(units)), codes[units]))]


def n_units_outside(selection: Selection) -> int:
    """How many units the sites of a selection have that it does not hold; sites without one do not count."""
    counts = selection.counts()
    return sum(math.prod(selection.shapes[site]) - n for site, n in counts.items() if n)


def _turns(
    chosen: np.ndarray, stratum: np.ndarray, reach: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """When units of a site outside `chosen` are drawn, and which: all those whose turn comes up to growth `reach`."""
    counts = np.bincount(stratum[chosen])
    is_free = np.ones(len(stratum), dtype=bool)
    is_free[chosen] = False
    turns, units, missing = [], [], []
    for code in np.flatnonzero(counts):
        members = generator.permutation(np.flatnonzero((stratum == code) & is_free))
        times = (np.arange(1, int(reach * counts[code]) + 2) - generator.random()) / counts[code]
        turns.append(times[: len(members)])
        units.append(members[: len(times)])
        missing.append(times[len(members) :])
    times = np.sort(np.concatenate(missing))
    # Where a stratum ran out, units of strata without a chosen one fill in.
    if len(times):
        others = generator.permutation(np.flatnonzero(~np.isin(stratum, np.flatnonzero(counts))))
        turns.append(times[: len(others)])
        units.append(others[: len(times)])
    return np.concatenate(turns), np.concatenate(units)
