"""Is a coupling more than chance, and would other examples give it again?

A **floor**: how much two selections overlap when only what units are like decides, not which they are. The second is
shuffled among units of its own stratum (deciles of size, of activation, of general score), so that what both behaviours
owe to strong or busy units stays in the floor. An overlap of two unrelated behaviours is a floor of another kind.

A **ceiling**: the same behaviour, scored on two halves of its examples. Two behaviours cannot be expected to share more
than one shares with itself. Shuffling the labels of examples between behaviours would give this ceiling again, not
chance: halves of a mixture overlap more than the behaviours do.

**Stability**: how often a unit is selected when the examples are drawn anew, with replacement, in 16 groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores, Top
from dean_interp.selection.selection import Selection, top_fraction
from dean_interp.selection.strata import Strata


def jaccard(first: Selection, second: Selection) -> float:
    """Units in both over units in either, in [0, 1]; 0 where both are empty."""
    return len(first & second) / max(len(first | second), 1)


def overlap_coefficient(first: Selection, second: Selection) -> float:
    """Units in both over the size of the smaller, in [0, 1]; 0 where one is empty."""
    return len(first & second) / max(min(len(first), len(second)), 1)


def expected_overlap(first: Selection, second: Selection) -> float:
    """How many units two independent selections of these sizes at each site share on average."""
    return sum(
        len(indices) * len(second.units[site]) / torch.Size(first.shapes[site]).numel()
        for site, indices in first.units.items()
    )


STABLE = 0.8
"""The probability of being selected from which a unit is called stable."""


@dataclass(frozen=True)
class Floor:
    """An overlap, beside what strata alone would give."""

    n: int
    """Units in both."""
    expected: float
    """Mean of the overlap when the second selection is shuffled within strata (closed form)."""
    low: float
    high: float
    """The middle 95 % of the shuffled overlaps."""
    p: float
    """One-sided rank of the overlap among the shuffled ones, itself counted; at least 1 / (n_draws + 1)."""


def chance_overlap(
    first: Selection,
    second: Selection,
    strata: Strata,
    *,
    excluded: Selection | None = None,
    n_draws: int = 999,
    seed: int = 0,
) -> Floor:
    """The floor under `first & second`: the second shuffled among the units of each site and stratum.

    In a stratum of `n` units with `a` and `b` selected the shuffled overlap is hypergeometric, so nothing needs to be
    shuffled: overlaps are drawn from that distribution, whatever the number of units.

    Args:
        excluded: units that are left out on all sides (general's top, for a coupling).
        strata: of every unit, from `controls.strata`; with `general=` the floor keeps what the general score explains.
    """
    if excluded is not None:
        first, second = first - excluded, second - excluded
    rng = np.random.default_rng(seed)
    shuffled, expected = np.zeros(n_draws, dtype=np.int64), 0.0
    for site in first.units:
        stratum = strata[site].numpy().ravel().astype(np.int64)
        n_strata = int(stratum.max()) + 1
        free = np.bincount(stratum, minlength=n_strata)
        if excluded is not None:
            free -= np.bincount(stratum[excluded.units[site].numpy()], minlength=n_strata)
        chosen = [np.bincount(stratum[one.units[site].numpy()], minlength=n_strata) for one in (first, second)]
        held = (chosen[0] > 0) & (chosen[1] > 0)
        if held.any():
            a, b, n = chosen[0][held], chosen[1][held], free[held]
            expected += float((a * b / n).sum())
            shuffled += rng.hypergeometric(a, n - a, b, size=(n_draws, len(n))).sum(1)
    n_both = len(first & second)
    low, high = np.quantile(shuffled, (0.025, 0.975))
    rank = (1 + int((shuffled >= n_both).sum())) / (n_draws + 1)
    return Floor(n_both, expected, float(low), float(high), rank)


@dataclass(frozen=True)
class Halves:
    """Jaccard overlaps of tops that come from disjoint halves of the examples, over random splits."""

    mean: float
    low: float
    high: float
    """The middle 95 % of the splits: they say how much the split matters, not how much another sample would."""


def half_overlap(first: Scores, second: Scores, *, fraction: float, n_splits: int = 50, seed: int = 0) -> Halves:
    """Jaccard overlap of the top `fraction` of `first` on half of its groups with that of `second` on the other half.

    The same scores twice give the ceiling; two behaviours' scores what to hold against it: both from half the examples.
    """
    _need_groups(first, second)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_splits):
        order = rng.permutation(n_groups(first))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        tops = [top_fraction(on_groups(one, half), fraction) for one, half in zip((first, second), halves, strict=True)]
        found.append(jaccard(*tops))
    low, high = np.quantile(found, (0.025, 0.975))
    return Halves(float(np.mean(found)), float(low), float(high))


def selection_probability(
    scores: Sequence[Scores], rule: Callable[[Sequence[Scores]], Selection], *, n_draws: int = 200, seed: int = 0
) -> dict[Site, Float[Tensor, "..."]]:
    """How often each unit is selected by `rule` when every behaviour's groups of examples are drawn anew.

    Args:
        rule: from scores to a selection, e.g. `lambda s: coupling(*s, fraction=0.01).coupled`.

    Returns:
        A share in [0, 1] for every unit of every site.
    """
    _need_groups(*scores)
    rng = np.random.default_rng(seed)
    counts = {site: torch.zeros(shape) for site, shape in scores[0].shapes.items()}
    for _ in range(n_draws):
        drawn = [on_groups(one, rng.integers(n_groups(one), size=n_groups(one))) for one in scores]
        for site, indices in rule(drawn).units.items():
            counts[site].view(-1)[indices] += 1
    return {site: count / n_draws for site, count in counts.items()}


def stable(probability: Mapping[Site, Float[Tensor, "..."]], selection: Selection, least: float = STABLE) -> Selection:
    """The units of a selection that are selected with at least this probability."""
    units = {site: indices[probability[site].flatten()[indices] >= least] for site, indices in selection.units.items()}
    return Selection(units, selection.shapes, selection.prompt_hashes)


def n_groups(scores: Scores) -> int:
    """How many groups of examples the scores hold."""
    return len(next(iter(scores.groups.values())))


def on_groups(scores: Scores, groups: Sequence[int] | np.ndarray) -> Scores:
    """The scores on some groups of examples, each as often as it is named. Of weights, those that were kept."""
    chosen = torch.as_tensor(np.asarray(groups))
    means = {site: values[chosen].mean(0) for site, values in scores.groups.items()}
    return replace(scores, values={
        site: replace(value, values=means[site]) if isinstance(value, Top) else means[site]
        for site, value in scores.values.items()
    })  # fmt: skip


def _need_groups(*scores: Scores) -> None:
    for one in scores:
        if one.groups.keys() != one.values.keys():
            raise InputError(
                f"the scores of {one.behaviour} hold no groups of examples for all their units: gradient scores of "
                "neurons do; for weights, `scoring.examples.with_groups` takes a second pass"
            )
        if n_groups(one) < 2:
            raise InputError(f"the scores of {one.behaviour} come from one example: halves need at least two")
