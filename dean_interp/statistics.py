"""Intervals and p-values for paired measurements of the same prompts.

Examples of one cluster (one prompt, asked with several answers) are not independent, so intervals treat clusters,
not rows, as the sample. Ranks among controls are exact: they assume only that the controls are exchangeable with the
edit under the null.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from dean_interp.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval, in the units of the data."""

    mean: float
    low: float
    high: float
    n_clusters: int


def clustered_interval(
    values: Float[np.ndarray, " example"], clusters: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """Mean of `values` with a cluster-robust t interval (CR1, Liang and Zeger 1986; `n_clusters - 1` degrees).

    For a paired comparison, hand in the differences. With one row a cluster this is the ordinary t interval.
    Raises `InputError` below two clusters, where no interval exists.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(clusters):
        raise InputError(f"values and clusters must have one entry an example, got {len(values)} and {len(clusters)}")
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        raise InputError(f"an interval needs at least 2 clusters, got {len(names)}")
    mean = float(values.mean())
    sums = np.zeros(len(names))
    np.add.at(sums, [names[cluster] for cluster in clusters], values - mean)
    scale = len(names) / (len(names) - 1)
    error = float(np.sqrt(scale * (sums**2).sum())) / len(values)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(names) - 1)) * error
    return Interval(mean, mean - half, mean + half, len(names))


def rank_p_value(observed: float, controls: Sequence[float]) -> float:
    """One-sided p that `observed` is larger than chance: `(1 + #{control >= observed}) / (n_controls + 1)`."""
    if np.isnan([observed, *controls]).any():
        raise InputError("a rank needs numbers, got NaN")
    return (1 + sum(control >= observed for control in controls)) / (len(controls) + 1)


def detectable_difference(
    standard_deviation: float, n_clusters: int, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Smallest true mean that a two-sided paired t test on `n_clusters` differences finds with probability `power`.

    Normal approximation to the noncentral t, `(t_(1-alpha/2) + t_power) * sd / sqrt(n)`; same units as the data.
    """
    if n_clusters < 2:
        raise InputError(f"a paired test needs at least 2 clusters, got {n_clusters}")
    degrees = n_clusters - 1
    quantiles = stats.t.ppf(0.5 + confidence / 2, degrees) + stats.t.ppf(power, degrees)
    return float(quantiles) * standard_deviation / float(np.sqrt(n_clusters))
