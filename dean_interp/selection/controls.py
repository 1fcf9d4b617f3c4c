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


def pooled_activation_norm(scores: Sequence[Scores]) -> dict[Site, Float[Tensor, " d_mlp"]]:
    """Root mean square activation of every neuron over all behaviours, each weighing the same."""
    return {
        site: torch.stack([one.activation_norm[site].square() for one in scores]).mean(0).sqrt()
        for site in scores[0].activation_norm
    }


def random_like(
    selection: Selection,
    activation_norm: Mapping[Site, Float[Tensor, " d_mlp"]],
    *,
    seed: int,
    growth: float = 1.0,
) -> Selection:
    """Random units from outside `selection`, as many per site and per decile of activation norm.

    Args:
        selection: the set to imitate; sites where it has no unit get none.
        activation_norm: of every neuron, as stored with scores or pooled over them.
        seed: of the draw. One seed orders the units once: a larger `growth` adds units and drops none.
        growth: how many times the size of `selection`; what a decile cannot give is drawn from the rest of its site.

    Raises:
        InputError: `growth` not positive, or more units wanted at a site than it has outside the selection.
    """
    if growth <= 0:
        raise InputError(f"growth must be positive, got {growth}")
    generator = np.random.default_rng(seed)
    units = {}
    for site, chosen in selection.units.items():
        norm = activation_norm[site].flatten().numpy()
        order = generator.permutation(len(norm))
        stratum = _strata(norm)
        free = np.ones(len(norm), dtype=bool)
        free[chosen.numpy()] = False
        n_wanted = round(growth * len(chosen))
        if n_wanted > free.sum():
            raise InputError(f"{site} has {free.sum()} units outside the selection, {n_wanted} were asked for")
        quotas = _quotas(np.bincount(stratum[chosen.numpy()], minlength=N_STRATA), n_wanted)
        drawn = [order[free[order] & (stratum[order] == s)][:quota] for s, quota in enumerate(quotas)]
        taken = np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)
        rest = order[free[order] & ~np.isin(order, taken)][: n_wanted - len(taken)]
        units[site] = torch.from_numpy(np.sort(np.concatenate([taken, rest])).astype(np.int64))
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


def _quotas(counts: np.ndarray, n_wanted: int) -> np.ndarray:
    """`n_wanted` shared out in proportion to `counts`; what rounding leaves goes to the largest remainders."""
    if not counts.sum():
        return counts
    shares = counts * (n_wanted / counts.sum())
    quotas = np.floor(shares).astype(int)
    left = n_wanted - quotas.sum()
    quotas[np.argsort(quotas - shares, kind="stable")[:left]] += 1
    return quotas
