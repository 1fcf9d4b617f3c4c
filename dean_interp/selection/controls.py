"""Random selections that differ from the one under test in nothing but which units they hold.

Large activations move a model more than small ones whatever they mean, so a fair random unit has the same site and the
same decile of activation norm. Scores play no part: a control matched on the scores would be the edit again.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import Coupling
from dean_interp.selection.selection import Selection, strongest

N_STRATA = 10


def pooled_activation_norm(scores: Sequence[Scores]) -> dict[Site, Float[Tensor, " _"]]:
    """Root mean square activation of every neuron over all behaviours, each weighing the same."""
    return {
        site: torch.stack([one.activation_norm[site].square() for one in scores]).mean(0).sqrt()
        for site in scores[0].activation_norm
    }


def random_like(
    selection: Selection,
    activation_norm: Mapping[Site, Float[Tensor, " _"]],
    *,
    seed: int,
    growth: float = 1.0,
) -> Selection:
    """Random units from outside `selection`, as many per site and per decile of activation norm.

    Every unit has a turn: the k-th of a decile that holds c selected units comes at growth (k - u) / c, with u uniform.
    A draw is the first `round(growth * len(selection))` in turn, so a larger growth adds units and drops none, and at
    1 every decile has its count.

    Args:
        selection: the set to imitate; sites where it has no unit get none.
        activation_norm: of every neuron, as stored with scores or pooled over them.
        seed: of the draw.
        growth: how many times the size of `selection`; what a decile cannot give comes from the rest of its site.

    Raises:
        InputError: `growth` not positive, or more units wanted than the sites have outside the selection.
    """
    if growth <= 0:
        raise InputError(f"growth must be positive, got {growth}")
    generator = np.random.default_rng(seed)
    turns = []  # (turn, site, unit)
    for site, chosen in selection.units.items():
        turns += [(turn, site, unit) for turn, unit in _turns(chosen.numpy(), activation_norm[site], generator)]
    n_wanted = round(growth * len(selection))
    if n_wanted > len(turns):
        raise InputError(f"{n_wanted} units were asked for; the sites have {len(turns)} outside the selection")
    drawn: dict[Site, list[int]] = {site: [] for site in selection.units}
    for _, site, unit in sorted(turns)[:n_wanted]:
        drawn[site].append(unit)
    units = {site: torch.tensor(sorted(some), dtype=torch.int64) for site, some in drawn.items()}
    return Selection(units, selection.shapes, selection.prompt_hashes)


def named_controls(found: Coupling, first: Scores, second: Scores, general: Scores) -> dict[str, Selection]:
    """Sets of about the coupled set's size at each site, chosen by other rules from the same scores.

    `first only` and `second only`: the strongest of one behaviour's top that are in neither other top. `all three`: the
    strongest, by general score, of the units in all three tops. Smaller where there are not enough.
    """
    counts = found.coupled.counts()
    return {
        f"{first.behaviour} only": strongest(first, found.first - found.second - found.general, counts),
        f"{second.behaviour} only": strongest(second, found.second - found.first - found.general, counts),
        "all three": strongest(general, found.both & found.general, counts),
    }


def _strata(norm: np.ndarray) -> np.ndarray:
    """The decile of every unit, by rank, so that ties and outliers cannot empty one."""
    ranks = np.argsort(np.argsort(norm, kind="stable"), kind="stable")
    return ranks * N_STRATA // len(norm)


def _turns(chosen: np.ndarray, norm: Tensor, generator: np.random.Generator) -> list[tuple[float, int]]:
    """When each unit of a site outside `chosen` is drawn. None, where the site has no chosen unit."""
    order = generator.permutation(len(norm))
    stratum = _strata(norm.numpy())
    free = order[~np.isin(order, chosen)]
    counts = np.bincount(stratum[chosen], minlength=N_STRATA)
    others = [unit for unit in free if not counts[stratum[unit]]]  # of deciles without a chosen unit: they only fill in
    turns, missing = [], []
    for s in np.flatnonzero(counts):
        own = free[stratum[free] == s]
        times = (np.arange(1, len(norm) + 1) - generator.random()) / counts[s]
        turns += zip(times.tolist(), own.tolist(), strict=False)
        missing += times[len(own) :].tolist()
    return turns + list(zip(sorted(missing), map(int, others), strict=False))
