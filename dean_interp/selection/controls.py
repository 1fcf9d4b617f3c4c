"""Random selections that differ from the one under test in nothing but which units they hold.

Large activations and large weights move a model more than small ones whatever they mean. So a fair random neuron has
the same site and the same decile of activation norm; a fair random weight the same matrix, the same decile of `|W|` and
the same decile of what its matrix reads. Scores play no part: a control matched on them would be the edit again.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import weight
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores, Top
from dean_interp.selection.coupling import Coupling
from dean_interp.selection.selection import Selection, strongest

N_DECILES = 10
Strata = Mapping[Site, Int16[Tensor, "..."]]


def strata(
    model: HookedModel, scores: Sequence[Scores], *, general: Scores | None = None
) -> dict[Site, Int16[Tensor, "..."]]:
    """The stratum of every scored unit, in the shape of its site: what a random control is matched on.

    For neurons the decile of activation norm over all behaviours, each weighing the same; for weights that of `|W|`
    within its matrix and that of the norm of what it reads, as ten times one plus the other.

    Args:
        general: match on the decile of this score too, a hundred each. Where a file kept the highest scores of a matrix
            only, these stand for the deciles: kept or not.
    """
    if any(not one.activation_norm for one in scores):
        raise InputError("strata need activation norms, which scores that saw no example (magnitude, random) lack")
    found = {}
    for site, norm in pooled_norm(scores).items():
        found[site] = deciles(norm)
        if site.unit == "weight":
            size = deciles(weight(model, site).detach().float().abs().cpu().flatten()).reshape(scores[0].shapes[site])
            found[site] = N_DECILES * size + found[site][:, None]
    return found if general is None else by_general_score(found, general)


def by_general_score(strata: Strata, general: Scores) -> dict[Site, Int16[Tensor, "..."]]:
    """Strata divided further, by the decile of the general score: what `strata(..., general=general)` gives."""
    return {site: N_DECILES**2 * _score_deciles(general, site) + codes for site, codes in strata.items()}


def _score_deciles(scores: Scores, site: Site) -> Int16[Tensor, "..."]:
    value = scores.values[site]
    if not isinstance(value, Top):
        return deciles(value.abs().flatten()).reshape(value.shape)
    kept = torch.zeros(value.numel(), dtype=torch.int16)
    kept[value.indices] = N_DECILES - 1
    return kept.reshape(value.shape)


def pooled_norm(scores: Sequence[Scores]) -> dict[Site, Float[Tensor, " _"]]:
    """Root mean square activation (of a matrix: input) over all behaviours, each weighing the same."""
    return {
        site: torch.stack([one.activation_norm[site].square() for one in scores]).mean(0).sqrt()
        for site in scores[0].activation_norm
    }


def random_like(selection: Selection, strata: Strata, *, seed: int, growth: float = 1.0) -> Selection:
    """Random units from outside `selection`, as many per site and stratum.

    Every unit has a turn: the k-th of a stratum that holds c selected units comes at growth (k - u) / c, with u
    uniform. A draw is the first `round(growth * len(selection))` in turn, so a larger growth adds units and drops none,
    and at 1 every stratum has its count.

    Args:
        selection: the set to imitate; sites where it has no unit get none.
        strata: of every unit, from `strata`.
        seed: of the draw.
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
    drawn, reach = [(np.zeros(0), np.zeros(0))], growth + 1
    while sum(len(turns) for turns, _ in drawn) < n_wanted:  # more than once where strata run out of units
        drawn = [
            _turns(selection.units[site].numpy(), strata[site].numpy().ravel(), reach, np.random.default_rng([seed, i]))
            for i, site in enumerate(sites)
        ]
        reach *= 2
    turn, unit = (np.concatenate([one[k] for one in drawn]) for k in (0, 1))
    place = np.repeat(np.arange(len(sites)), [len(one[0]) for one in drawn])
    first = np.lexsort((unit, place, turn))[:n_wanted]
    units = {site: torch.zeros(0, dtype=torch.int64) for site in selection.units}
    for i, site in enumerate(sites):
        units[site] = torch.from_numpy(np.sort(unit[first[place[first] == i]]).astype(np.int64))
    return Selection(units, selection.shapes, selection.prompt_hashes)


def split_like(drawn: Selection, parts: Sequence[Selection], strata: Strata, *, seed: int) -> list[Selection]:
    """A random selection divided at random into sets like `parts`, as many per site, and per stratum where it can be.

    `drawn` is like the union of the parts (`random_like`), which share no unit.
    """
    units: list[dict[Site, Tensor]] = [{} for _ in parts]
    for i, (site, chosen) in enumerate(drawn.units.items()):
        generator = np.random.default_rng([seed, i])
        codes = strata[site].numpy().ravel()
        members = torch.cat([part.units[site] for part in parts]).numpy()
        owner = np.repeat(np.arange(len(parts)), [len(part.units[site]) for part in parts])
        if len(members) != len(chosen):
            raise InputError(f"{len(chosen)} units of {site} were drawn for parts that hold {len(members)}")
        # both in the order of their strata, at random within one: the k-th unit drawn takes the k-th member's part
        mine, theirs = (one[np.lexsort((generator.random(len(one)), codes[one]))] for one in (chosen.numpy(), members))
        part_of = dict(zip(members.tolist(), owner.tolist(), strict=True))
        given = np.array([part_of[unit] for unit in theirs.tolist()], dtype=np.int64)
        for k, part in enumerate(units):
            part[site] = torch.from_numpy(np.sort(mine[given == k]).astype(np.int64))
    return [Selection(one, drawn.shapes, drawn.prompt_hashes) for one in units]


def n_units_outside(selection: Selection) -> int:
    """How many units the sites of a selection have that it does not hold; sites without one do not count."""
    return sum(math.prod(selection.shapes[site]) - n for site, n in selection.counts().items() if n)


def named_controls(found: Coupling, first: Scores, second: Scores, general: Scores) -> dict[str, Selection]:
    """Sets of about the coupled set's size at each site, chosen by other rules from the same scores.

    `first only` and `second only`: the strongest of one behaviour's top that are in neither other top. `all three`: the
    strongest, by general score, of the units in all three tops. `general only`: the strongest of general's top that are
    in neither other. Smaller where there are not enough.
    """
    counts = found.coupled.counts()
    return {
        f"{first.behaviour} only": strongest(first, found.first - found.second - found.general, counts),
        f"{second.behaviour} only": strongest(second, found.second - found.first - found.general, counts),
        "all three": strongest(general, found.both & found.general, counts),
        f"{general.behaviour} only": strongest(general, found.general - found.first - found.second, counts),
    }


def deciles(values: Float[Tensor, " unit"]) -> Int16[Tensor, " unit"]:
    """The decile of every unit, by rank, so that ties and outliers cannot empty one."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values.numpy(), kind="stable")] = np.arange(len(values))
    return torch.from_numpy((ranks * N_DECILES // len(values)).astype(np.int16))


def _turns(
    chosen: np.ndarray, stratum: np.ndarray, reach: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """When units of a site outside `chosen` are drawn, and which: all those whose turn comes up to growth `reach`."""
    counts = np.bincount(stratum[chosen])
    is_free = np.ones(len(stratum), dtype=bool)
    is_free[chosen] = False
    turns, units, missing = [], [], []
    for s in np.flatnonzero(counts):
        own = generator.permutation(np.flatnonzero((stratum == s) & is_free))
        times = (np.arange(1, int(reach * counts[s]) + 2) - generator.random()) / counts[s]
        turns.append(times[: len(own)])
        units.append(own[: len(times)])
        missing.append(times[len(own) :])
    times = np.sort(np.concatenate(missing))
    if len(times):  # strata that ran out: units of those without a chosen one fill in
        others = generator.permutation(np.flatnonzero(~np.isin(stratum, np.flatnonzero(counts))))
        turns.append(times[: len(others)])
        units.append(others[: len(times)])
    return np.concatenate(turns), np.concatenate(units)
