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
    drawn = _smaller_of_draws(first, second)
    means = np.minimum(first.values.mean(1), second.values.mean(1))
    n_clusters = _n_clusters(first, second)
    low, high = np.quantile(drawn, _ends(n_clusters), axis=0)
    return [Interval(float(m), float(a), float(b), n_clusters) for m, a, b in zip(means, low, high, strict=True)]


def area_under(kls: Sequence[float], first: MarginChanges, second: MarginChanges, *, largest: float) -> Interval:
    """The mean of the smaller rise over KLs from 0 to `largest` (`mean_under_curve`), nats per token."""
    means = np.minimum(first.values.mean(1), second.values.mean(1))
    area = mean_under_curve(kls, means[None], largest)[0]
    n_clusters = _n_clusters(first, second)
    low, high = np.quantile(mean_under_curve(kls, _smaller_of_draws(first, second), largest), _ends(n_clusters))
    return Interval(float(area), float(low), float(high), n_clusters)


def _smaller_of_draws(first: MarginChanges, second: MarginChanges) -> Float[np.ndarray, "draw dose"]:
    drawn = [bootstrap_of_means(each.values, each.clusters, seed=n) for n, each in enumerate((first, second))]
    return np.minimum(drawn[0], drawn[1])


def _ends(n_clusters: int) -> tuple[float, float]:
    """The quantiles between which 95 % lie, for so many clusters."""
    reach = np.sqrt(n_clusters / (n_clusters - 1)) * stats.t.ppf(_TAIL, n_clusters - 1)
    low = float(stats.norm.cdf(reach))
    return low, 1 - low


def _n_clusters(first: MarginChanges, second: MarginChanges) -> int:
    return min(len(set(first.clusters)), len(set(second.clusters)))


def mean_under_curve(
    kls: Sequence[float], rises: Float[np.ndarray, "draw point"], largest: float
) -> Float[np.ndarray, " draw"]:
    """The mean height, from 0 to `largest`, of the straight lines from (0, 0) through the points of each draw.

    Points are put in the order of their KL. Behind the last one a line goes on level; what lies beyond `largest` is cut
    off.
    """
    order = np.argsort(kls, kind="stable")
    x = np.concatenate([[0.0], np.asarray(kls, dtype=float)[order]])
    y = np.concatenate([np.zeros((len(rises), 1)), np.asarray(rises, dtype=float)[:, order]], axis=1)
    inside = x < largest
    at_end = np.array([np.interp(largest, x, draw) for draw in y])
    x = np.concatenate([x[inside], [largest]])
    y = np.concatenate([y[:, inside], at_end[:, None]], axis=1)
    return np.asarray(integrate.trapezoid(y, x, axis=1)) / largest
