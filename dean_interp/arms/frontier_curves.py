"""Curves of an arm: the smaller of two rises at every KL, and the area under it, each with an interval over topics.

An interval is a bootstrap over topics, drawn anew for each behaviour and alike for all doses of an arm. Its quantiles
are moved outward for how few topics there are (the expanded percentile interval; Hesterberg 2015, section 4.5), so that
for a mean it is about as wide as the t interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import integrate, stats

from dean_interp.statistics import Interval, bootstrap_of_means

_TAIL = 0.025


@dataclass(frozen=True)
class MarginChanges:
    """The change of one behaviour's margin at every dose of an arm."""

    values: Float[np.ndarray, "dose example"]
    """Nats per token, one a prompt."""
    clusters: tuple[str, ...]
    """The topic of each prompt, or the prompt."""


def smaller_rises(first: MarginChanges, second: MarginChanges) -> list[Interval]:
    """The smaller of both mean changes, at each dose."""
    means = _smaller_means(first, second)
    draws = _smaller_draws(first, second)
    n_clusters = _n_clusters(first, second)
    lows, highs = np.quantile(draws, _ends(n_clusters), axis=0)
    intervals = []
    for mean, low, high in zip(means, lows, highs, strict=True):
        intervals.append(Interval(float(mean), float(low), float(high), n_clusters))
    return intervals


def area_under(
    kls: Sequence[float],
    first: MarginChanges,
    second: MarginChanges,
    *,
    largest: float,
) -> Interval:
    """The mean of the smaller rise over KLs from 0 to `largest` (`mean_under_curve`), nats per token."""
    means = _smaller_means(first, second)
    draws = _smaller_draws(first, second)
    (area,) = mean_under_curve(kls, means[None], largest)
    areas = mean_under_curve(kls, draws, largest)
    n_clusters = _n_clusters(first, second)
    low, high = np.quantile(areas, _ends(n_clusters))
    return Interval(float(area), float(low), float(high), n_clusters)


def _smaller_means(first: MarginChanges, second: MarginChanges) -> Float[np.ndarray, " dose"]:
    return np.minimum(first.values.mean(1), second.values.mean(1))


def _smaller_draws(first: MarginChanges, second: MarginChanges) -> Float[np.ndarray, "draw dose"]:
    first_draws = bootstrap_of_means(first.values, first.clusters, seed=0)
    second_draws = bootstrap_of_means(second.values, second.clusters, seed=1)
    return np.minimum(first_draws, second_draws)


def _ends(n_clusters: int) -> tuple[float, float]:
    """The quantiles between which 95 % lie, for so many clusters."""
    inflation = np.sqrt(n_clusters / (n_clusters - 1))
    t = stats.t.ppf(_TAIL, n_clusters - 1)
    low = float(stats.norm.cdf(inflation * t))
    return low, 1 - low


def _n_clusters(first: MarginChanges, second: MarginChanges) -> int:
    n_first = len(set(first.clusters))
    n_second = len(set(second.clusters))
    return min(n_first, n_second)


def mean_under_curve(
    kls: Sequence[float],
    rises: Float[np.ndarray, "draw point"],
    largest: float,
) -> Float[np.ndarray, " draw"]:
    """The mean height, from 0 to `largest`, of the straight lines from (0, 0) through the points of each draw.

    Points are put in the order of their KL. Behind the last one a line goes on level; what lies beyond `largest` is cut
    off.
    """
    # The points in order, behind (0, 0).
    order = np.argsort(kls, kind="stable")
    x = np.array([0.0, *np.asarray(kls)[order]])
    starts = np.zeros((len(rises), 1))
    y = np.hstack([starts, rises[:, order]])
    # Cut off at `largest`, where `interp` goes on level behind the last point.
    is_inside = x < largest
    heights_at_end = np.array([np.interp(largest, x, draw) for draw in y])
    x = np.append(x[is_inside], largest)
    y = np.hstack([y[:, is_inside], heights_at_end[:, None]])
    return np.asarray(integrate.trapezoid(y, x, axis=1)) / largest
