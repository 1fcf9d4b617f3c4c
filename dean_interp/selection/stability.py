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
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.top import Top
from dean_interp.selection.selection import Selection, top_fraction
from dean_interp.selection.strata import Strata


def jaccard(first: Selection, second: Selection) -> float:
    """Units in both over units in either, in [0, 1]; 0 where both are empty."""
    n_either = len(first | second)
    return len(first & second) / max(n_either, 1)


def overlap_coefficient(first: Selection, second: Selection) -> float:
    """Units in both over the size of the smaller, in [0, 1]; 0 where one is empty."""
    smaller = min(len(first), len(second))
    return len(first & second) / max(smaller, 1)


def expected_overlap(first: Selection, second: Selection) -> float:
    """How many units two independent selections of these sizes at each site share on average."""
    expected = 0.0
    for site, indices in first.units.items():
        n_units = torch.Size(first.shapes[site]).numel()
        expected += len(indices) * len(second.units[site]) / n_units
    return expected


STABLE_PROBABILITY = 0.8
"""A unit is called stable if it is selected with at least this probability."""
N_SHUFFLES, N_SPLITS = 999, 50
"""Number of shuffles within strata that a floor comes from, and of random splits that overlaps of halves come from."""


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
    n_draws: int = N_SHUFFLES,
    seed: int = 0,
) -> Floor:
    """The floor under `first & second`: the second shuffled among the units of each site and stratum.

    In a stratum of `n` units with `a` and `b` selected the shuffled overlap is hypergeometric. So nothing is shuffled:
    overlaps are drawn from that distribution, whatever the number of units.

    Args:
        first: the selection that stays.
        second: the selection that is shuffled.
        strata: the stratum of every unit, from `selection.strata`. With `general=` the floor keeps the overlap that the
            general score explains.
        excluded: units that are left out of both selections and of the strata (general's top, for a coupling).
        n_draws: how many overlaps are drawn.
        seed: Seed for drawing overlaps.
    """
    if excluded is not None:
        first = first - excluded
        second = second - excluded
    # The overlap is the sum over sites and strata of independent hypergeometric draws.
    rng = np.random.default_rng(seed)
    shuffled = np.zeros(n_draws, dtype=np.int64)
    expected = 0.0
    for site in first.units:
        codes = strata[site].numpy().ravel().astype(np.int64)
        a = _counts_by_stratum(first, site, codes)
        b = _counts_by_stratum(second, site, codes)
        n = np.bincount(codes)
        if excluded is not None:
            n -= _counts_by_stratum(excluded, site, codes)
        # Only strata with units of both selections can contribute to the overlap.
        has_both = (a > 0) & (b > 0)
        a, b, n = a[has_both], b[has_both], n[has_both]
        expected += float((a * b / n).sum())
        draws = rng.hypergeometric(a, n - a, b, size=(n_draws, len(n)))
        shuffled += draws.sum(1)
    n_both = len(first & second)
    low, high = np.quantile(shuffled, (0.025, 0.975))
    n_as_large = int((shuffled >= n_both).sum())
    p = (1 + n_as_large) / (n_draws + 1)
    return Floor(n=n_both, expected=expected, low=float(low), high=float(high), p=p)


def _counts_by_stratum(selection: Selection, site: Site, codes: np.ndarray) -> np.ndarray:
    """How many units of a site are selected in each stratum; `codes` are the strata of all its units."""
    selected = selection.units[site].numpy()
    n_strata = int(codes.max()) + 1
    return np.bincount(codes[selected], minlength=n_strata)


@dataclass(frozen=True)
class Halves:
    """Jaccard overlaps of tops that come from disjoint halves of the examples, over random splits of them."""

    mean: float
    low: float
    high: float
    """The middle 95 % of the splits. They show how much the split matters, not how much another sample would."""


def half_overlap(
    first: Scores,
    second: Scores,
    *,
    fraction: float,
    n_splits: int = N_SPLITS,
    seed: int = 0,
) -> Halves:
    """Jaccard overlap of the top `fraction` of `first` on half of its groups with that of `second` on the other half.

    The same scores twice give the ceiling. The scores of two behaviours give an overlap that can be compared with it,
    since both come from half of the examples.
    """
    _refuse_without_groups(first, second)
    rng = np.random.default_rng(seed)
    overlaps = []
    for _ in range(n_splits):
        order = rng.permutation(n_groups(first))
        # The same scores twice need one order: else a group might be in both halves.
        is_as_many = n_groups(second) == len(order)
        order_of_second = order if is_as_many else rng.permutation(n_groups(second))
        first_half = on_groups(first, order[: len(order) // 2])
        second_half = on_groups(second, order_of_second[len(order_of_second) // 2 :])
        first_top = top_fraction(first_half, fraction)
        second_top = top_fraction(second_half, fraction)
        overlaps.append(jaccard(first_top, second_top))
    low, high = np.quantile(overlaps, (0.025, 0.975))
    return Halves(float(np.mean(overlaps)), float(low), float(high))


def selection_probability(
    scores: Sequence[Scores],
    rule: Callable[[Sequence[Scores]], Selection],
    *,
    n_draws: int = 200,
    seed: int = 0,
) -> dict[Site, Float[Tensor, "..."]]:
    """How often each unit is selected by `rule` when every behaviour's groups of examples are drawn anew.

    Args:
        scores: scores of one or more behaviours, with groups of examples.
        rule: a function from scores to a selection, e.g. `lambda s: couple(*s, fraction=0.01).coupled`.
        n_draws: how often the groups are drawn.
        seed: Seed for drawing groups.

    Returns:
        A share in [0, 1] for every unit of every site.
    """
    _refuse_without_groups(*scores)
    rng = np.random.default_rng(seed)
    counts = {site: torch.zeros(shape) for site, shape in scores[0].shapes.items()}
    for _ in range(n_draws):
        drawn = [_resampled(behaviour, rng) for behaviour in scores]
        selection = rule(drawn)
        for site, indices in selection.units.items():
            counts[site].view(-1)[indices] += 1
    return {site: count / n_draws for site, count in counts.items()}


def _resampled(scores: Scores, rng: np.random.Generator) -> Scores:
    """The scores on as many groups of examples, drawn with replacement (a bootstrap of the groups)."""
    n = n_groups(scores)
    return on_groups(scores, rng.integers(n, size=n))


def stable(
    probability: Mapping[Site, Float[Tensor, "..."]],
    selection: Selection,
    least: float = STABLE_PROBABILITY,
) -> Selection:
    """The units of a selection that are selected with at least the probability `least`."""
    units = {}
    for site, indices in selection.units.items():
        probability_here = probability[site].flatten()[indices]
        units[site] = indices[probability_here >= least]
    return Selection(units, selection.shapes, selection.prompt_hashes)


def n_groups(scores: Scores) -> int:
    """How many groups of examples the scores hold."""
    return len(next(iter(scores.groups.values())))


def on_groups(scores: Scores, groups: Sequence[int] | np.ndarray) -> Scores:
    """The scores on the examples of some groups. A group counts as often as it is named.

    For weights only the scores that were kept are given.
    """
    chosen = torch.as_tensor(np.asarray(groups))
    is_fisher = scores.facts.get("target") == "fisher"
    sizes = _answer_lengths(scores) if is_fisher else _n_examples(scores)
    sizes = sizes[chosen]
    values: dict[Site, Tensor | Top] = {}
    for site, value in scores.values.items():
        of_groups = scores.groups[site][chosen]
        # Groups hold means over their examples; of Fisher information the gradient of one answer, with its sign.
        totals = of_groups.square() if is_fisher else of_groups * sizes[:, None]
        mean = totals.sum(0) / sizes.sum()
        if isinstance(value, Top):
            values[site] = replace(value, values=mean)
        else:
            values[site] = mean
    return replace(scores, values=values, signed={}, squared={})


def _n_examples(scores: Scores) -> Int[Tensor, " group"]:
    """The number of examples of each group."""
    if scores.clusters:
        return torch.tensor(list(scores.clusters.values()))
    # Examples that are spread take turns. Scores without losses are taken to be of one example a group.
    n = n_groups(scores)
    n_examples = max(n, len(scores.loss))
    return torch.bincount(torch.arange(n_examples) % n)


def _answer_lengths(scores: Scores) -> Int[Tensor, " group"]:
    """The number of tokens of each group where each is one answer."""
    return torch.tensor(scores.facts["answer_lengths"])


def _refuse_without_groups(*behaviours: Scores) -> None:
    for scores in behaviours:
        if scores.groups.keys() != scores.values.keys():
            raise InputError(
                f"the scores of {scores.behaviour} hold no groups of examples for all their units: gradient scores of "
                "neurons do; for weights, `scoring.per_example.with_groups` takes a second pass"
            )
        if n_groups(scores) < 2:
            raise InputError(f"the scores of {scores.behaviour} come from one example: halves need at least two")
