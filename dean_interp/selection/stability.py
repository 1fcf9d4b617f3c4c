"""Is a coupling more than chance, and would other examples give it again?

A **floor**: how much two selections overlap by chance. The second selection is shuffled among units of the same stratum
(deciles of size, of activation, of general score), so overlap that strong or active units cause stays in the floor. An
overlap of two unrelated behaviours is a floor of another kind.

A **ceiling**: how much a behaviour overlaps with itself, scored on two halves of its examples. Two behaviours cannot be
expected to share more. Shuffling the labels of examples between behaviours would give this ceiling again, not chance:
halves of a mixture overlap more than the behaviours do.

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
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import Top
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
    expected = 0.0
    for site, indices in first.units.items():
        expected += len(indices) * len(second.units[site]) / torch.Size(first.shapes[site]).numel()
    return expected


STABLE_PROBABILITY = 0.8
"""A unit is called stable if it is selected with at least this probability."""


@dataclass(frozen=True)
class Floor:
    """The overlap of two selections, and the overlap by chance within strata."""

    n: int
    """How many units are in both selections."""
    expected: float
    """Mean of the overlap when the second selection is shuffled within strata (closed form)."""
    low: float
    high: float
    """The middle 95 % of the shuffled overlaps."""
    p: float
    """One-sided rank p-value of the overlap among the shuffled ones; at least 1 / (n_draws + 1)."""


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

    In a stratum of `n` units with `a` and `b` selected the shuffled overlap is hypergeometric. So nothing is shuffled:
    overlaps are drawn from that distribution, whatever the number of units.

    Args:
        strata: the stratum of every unit, from `controls.strata`. With `general=` the floor keeps the overlap that the
            general score explains.
        excluded: units that are left out of both selections and of the strata (general's top, for a coupling).
        n_draws: how many overlaps are drawn.
        seed: Seed for drawing overlaps.
    """
    if excluded is not None:
        first, second = first - excluded, second - excluded
    # The overlap is the sum over sites and strata of independent hypergeometric draws.
    rng = np.random.default_rng(seed)
    shuffled, expected = np.zeros(n_draws, dtype=np.int64), 0.0
    for site in first.units:
        stratum = strata[site].numpy().ravel().astype(np.int64)
        n_strata = int(stratum.max()) + 1
        # `free` counts each stratum's units that are not excluded.
        free = np.bincount(stratum, minlength=n_strata)
        if excluded is not None:
            free -= np.bincount(stratum[excluded.units[site].numpy()], minlength=n_strata)
        in_first = np.bincount(stratum[first.units[site].numpy()], minlength=n_strata)
        in_second = np.bincount(stratum[second.units[site].numpy()], minlength=n_strata)
        # Only strata with units of both selections can contribute to the overlap.
        in_both = (in_first > 0) & (in_second > 0)
        if in_both.any():
            a, b, n = in_first[in_both], in_second[in_both], free[in_both]
            expected += float((a * b / n).sum())
            shuffled += rng.hypergeometric(a, n - a, b, size=(n_draws, len(n))).sum(1)
    n_both = len(first & second)
    low, high = np.quantile(shuffled, (0.025, 0.975))
    p = (1 + int((shuffled >= n_both).sum())) / (n_draws + 1)
    return Floor(n=n_both, expected=expected, low=float(low), high=float(high), p=p)


@dataclass(frozen=True)
class Halves:
    """Jaccard overlaps of tops that come from disjoint halves of the examples, over random splits of them."""

    mean: float
    low: float
    high: float
    """The middle 95 % of the splits. They show how much the split matters, not how much another sample would."""


def half_overlap(first: Scores, second: Scores, *, fraction: float, n_splits: int = 50, seed: int = 0) -> Halves:
    """Jaccard overlap of the top `fraction` of `first` on half of its groups with that of `second` on the other half.

    The same scores twice give the ceiling. The scores of two behaviours give an overlap that can be compared with it,
    since both come from half of the examples.
    """
    _refuse_without_groups(first, second)
    rng = np.random.default_rng(seed)
    overlaps = []
    for _ in range(n_splits):
        order = rng.permutation(n_groups(first))
        half = len(order) // 2
        first_top = top_fraction(on_groups(first, order[:half]), fraction)
        second_top = top_fraction(on_groups(second, order[half:]), fraction)
        overlaps.append(jaccard(first_top, second_top))
    low, high = np.quantile(overlaps, (0.025, 0.975))
    return Halves(float(np.mean(overlaps)), float(low), float(high))


def selection_probability(
    scores: Sequence[Scores], rule: Callable[[Sequence[Scores]], Selection], *, n_draws: int = 200, seed: int = 0
) -> dict[Site, Float[Tensor, "..."]]:
    """How often each unit is selected by `rule` when every behaviour's groups of examples are drawn anew.

    Args:
        scores: scores of one or more behaviours, with groups of examples.
        rule: a function from scores to a selection, e.g. `lambda s: couple(*s, fraction=0.01).coupled`.

    Returns:
        A share in [0, 1] for every unit of every site.
    """
    _refuse_without_groups(*scores)
    rng = np.random.default_rng(seed)
    counts = {site: torch.zeros(shape) for site, shape in scores[0].shapes.items()}
    for _ in range(n_draws):
        drawn = [_resampled(each, rng) for each in scores]
        for site, indices in rule(drawn).units.items():
            counts[site].view(-1)[indices] += 1
    return {site: count / n_draws for site, count in counts.items()}


def _resampled(scores: Scores, rng: np.random.Generator) -> Scores:
    """The scores on as many groups of examples, drawn with replacement (a bootstrap of the groups)."""
    n = n_groups(scores)
    return on_groups(scores, rng.integers(n, size=n))


def stable(
    probability: Mapping[Site, Float[Tensor, "..."]], selection: Selection, least: float = STABLE_PROBABILITY
) -> Selection:
    """The units of a selection that are selected with at least the probability `least`."""
    units = {}
    for site, indices in selection.units.items():
        units[site] = indices[probability[site].flatten()[indices] >= least]
    return Selection(units, selection.shapes, selection.prompt_hashes)


def n_groups(scores: Scores) -> int:
    """How many groups of examples the scores hold."""
    return len(next(iter(scores.groups.values())))


def on_groups(scores: Scores, groups: Sequence[int] | np.ndarray) -> Scores:
    """The scores on some groups of examples. A group counts as often as it is named.

    For weights only the scores that were kept are given.
    """
    chosen = torch.as_tensor(np.asarray(groups))
    values: dict[Site, Tensor | Top] = {}
    for site, value in scores.values.items():
        mean = scores.groups[site][chosen].mean(0)
        values[site] = replace(value, values=mean) if isinstance(value, Top) else mean
    return replace(scores, values=values, signed={}, squared={})


def _refuse_without_groups(*behaviours: Scores) -> None:
    for scores in behaviours:
        if scores.groups.keys() != scores.values.keys():
            raise InputError(
                f"the scores of {scores.behaviour} hold no groups of examples for all their units: gradient scores of "
                "neurons do; for weights, `scoring.per_example.with_groups` takes a second pass"
            )
        if n_groups(scores) < 2:
            raise InputError(f"the scores of {scores.behaviour} come from one example: halves need at least two")
