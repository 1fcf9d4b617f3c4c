"""Intervals and p-values for paired measurements of the same prompts.

Examples of one cluster are not independent, so intervals and tests treat clusters, not rows, as the sample. One rule
says what a cluster is: the topic of a prompt, else the prompt (`evaluation.outcomes.clusters_of`). Ranks among controls
are exact: they assume only that the controls are exchangeable with the edit under the null.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from dean_interp.errors import InputError

Clusters = Sequence[Hashable]
"""The cluster of each example."""
_BATCH_NUMBERS = 2_000_000
"""Numbers that a batch of resamples may hold."""
_LEAST_ERROR = 1e-9
"""Smaller standard errors of a share are rounding, where all clusters have one share."""


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval, in the units of the data."""

    mean: float
    low: float
    high: float
    n_clusters: int

    @property
    def digits(self) -> int:
        """The decimals with which it is written."""
        return interval_digits(self.low, self.high)

    def __str__(self) -> str:
        digits = self.digits
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def interval_digits(low: float, high: float) -> int:
    """The decimals of an interval: more of a small one, so that small effects are not all 0.000."""
    return 3 if max(abs(low), abs(high)) >= 0.01 else 5


def clustered_interval(
    values: Float[np.ndarray, " example"],
    clusters: Clusters,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `values` with a cluster-robust t interval (CR1, Liang and Zeger 1986; `n_clusters - 1` degrees).

    For a paired comparison, hand in the differences. With one row a cluster this is the ordinary t interval.
    Raises `InputError` below two clusters, where no interval exists.
    """
    sums, sizes = _by_cluster(values, clusters)
    n_clusters = len(sums)
    mean = float(sums.sum() / sizes.sum())
    error = standard_error(values, clusters)
    half_width = _t_quantile(confidence, n_clusters - 1) * error
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width, n_clusters=n_clusters)


def standard_error(values: Float[np.ndarray, " example"], clusters: Clusters) -> float:
    """Cluster-robust standard error of the mean of `values`, in their units (CR1, Liang and Zeger 1986).

    Raises `InputError` below two clusters.
    """
    sums, sizes = _by_cluster(values, clusters)
    n_clusters = len(sums)
    n_values = sizes.sum()
    mean = sums.sum() / n_values
    # how far each cluster's sum is from what the mean would give it
    residuals = sums - mean * sizes
    squares = (residuals**2).sum()
    # CR1 is exact for one value a cluster: n / (n - 1)
    correction = n_clusters / (n_clusters - 1)
    return float(np.sqrt(correction * squares) / n_values)


def bootstrap_of_means(
    values: Float[np.ndarray, "quantity example"],
    clusters: Clusters,
    *,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Float[np.ndarray, "resample quantity"]:
    """Means of several quantities of the same examples over redrawn clusters, each draw the same for all quantities.

    For an interval of a function of these means. Raises `InputError` below two clusters.
    """
    columns = []
    for quantity in values:
        sums, sizes = _by_cluster(quantity, clusters)
        columns.append(sums)
    # how often each cluster is in each resample
    n_clusters = len(sizes)
    shares = np.full(n_clusters, 1 / n_clusters)
    draws = np.random.default_rng(seed).multinomial(n_clusters, shares, n_resamples)
    drawn_sums = draws @ np.stack(columns).T
    drawn_sizes = draws @ sizes
    return drawn_sums / drawn_sizes[:, None]


def sign_flip_p_value(
    differences: Float[np.ndarray, " example"],
    clusters: Clusters,
    *,
    n_resamples: int = 9999,
    seed: int = 0,
) -> float:
    """Two-sided p that paired differences are 0 on average, by flipping the sign of whole clusters.

    All sign patterns are tried where there are no more than `n_resamples`, else that many are drawn. For differences of
    one 0/1 outcome with one row a cluster, this is McNemar's test. Raises `InputError` for a difference that is not
    finite, and below two clusters.
    """
    sums, _ = _by_cluster(differences, clusters)
    if not np.isfinite(sums).all():
        raise InputError("signs can be flipped of finite differences alone, got NaN or infinity")
    if not sums.any():
        return 1.0
    test = stats.permutation_test(
        (sums,),
        lambda sums, axis: sums.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=_n_in_batch(len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for how many there are, so that the family errs no more often than one test (Holm 1979).

    Raises `InputError` for one that is NaN or not from 0 to 1: it would have no place among the others.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise InputError(f"a p-value must be from 0 to 1, got {p} for {name!r}")
    n_left = len(p_values)
    largest = 0.0
    adjusted = dict.fromkeys(p_values, largest)
    # step down: the smallest p counts for all, the next one for all but one; none is below the one before
    for name in sorted(p_values, key=p_values.__getitem__):
        scaled = min(1.0, n_left * p_values[name])
        largest = max(largest, scaled)
        adjusted[name] = largest
        n_left -= 1
    return adjusted


def proportion(n_yes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """A share with its Wilson (1927) score interval; `n` independent trials."""
    if not 0 <= n_yes <= n or n < 1:
        raise InputError(f"a share needs 0 <= n_yes <= n and n of at least 1, got {n_yes} of {n}")
    share = n_yes / n
    low, high = _wilson(share, float(n), confidence)
    return Interval(share, low, high, n)


def share_interval(
    values: Float[np.ndarray, " example"],
    clusters: Clusters,
    *,
    confidence: float = 0.95,
) -> Interval:
    """A share (values 0 or 1) with a Wilson interval at its effective size (Korn and Graubard 1998).

    The effective size is that of independent trials with the variance that the clusters show, at most the number of
    values; where all values are alike it is the number of clusters, so that 0 of 30 does not look certain. Errors as
    of `clustered_interval`.
    """
    robust = clustered_interval(values, clusters, confidence=confidence)
    share = robust.mean
    n_clusters = robust.n_clusters
    size = float(n_clusters)
    half_width = robust.high - share
    error = half_width / _t_quantile(confidence, n_clusters - 1)
    # the share of so many independent trials has this error
    if 0 < share < 1:
        variance = share * (1 - share)
        size = min(float(len(values)), variance / max(error, _LEAST_ERROR) ** 2)
    low, high = _wilson(share, size, confidence)
    return Interval(share, low, high, n_clusters)


def rank_p_value(observed: float, controls: Sequence[float]) -> float:
    """One-sided p that `observed` is larger than chance: `(1 + #{control >= observed}) / (n_controls + 1)`."""
    if np.isnan([observed, *controls]).any():
        raise InputError("a rank needs numbers, got NaN")
    n_as_large = sum(control >= observed for control in controls)
    return (1 + n_as_large) / (1 + len(controls))


def smallest_rank_p(n_controls: int) -> float:
    """The smallest p that a rank among so many controls can give."""
    return 1 / (1 + n_controls)


def detectable_difference(
    standard_error: float, n_clusters: int, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Smallest true mean change that the clustered interval excludes 0 for with probability `power`.

    Normal approximation to the noncentral t, `(t_(1-alpha/2) + t_power) * standard_error` with `n_clusters - 1`
    degrees, in the units of the standard error, which is that of a mean over the same design (`standard_error`).
    Raises `InputError` below two clusters.
    """
    if n_clusters < 2:
        raise InputError(f"a paired test needs at least 2 clusters, got {n_clusters}")
    degrees = n_clusters - 1
    quantile = _t_quantile(confidence, degrees)
    power_quantile = float(stats.t.ppf(power, degrees))
    return (quantile + power_quantile) * standard_error


def _t_quantile(confidence: float, degrees: int) -> float:
    """How many standard errors a two-sided t interval reaches to either side."""
    level = 0.5 + confidence / 2
    return float(stats.t.ppf(level, degrees))


def _wilson(share: float, n: float, confidence: float) -> tuple[float, float]:
    """Score interval of a share of `n` trials; `n` need not be whole."""
    level = 0.5 + confidence / 2
    z = float(stats.norm.ppf(level))
    # as if z^2 trials were added, half of them with yes
    shrinkage = 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / shrinkage
    variance = share * (1 - share) / n
    half_width = z * np.sqrt(variance + z**2 / (4 * n**2)) / shrinkage
    low = float(middle - half_width)
    high = float(middle + half_width)
    # rounding may lead out of the range of shares
    return max(0.0, low), min(1.0, high)


def _by_cluster(
    values: Float[np.ndarray, " example"], clusters: Clusters
) -> tuple[Float[np.ndarray, " cluster"], Float[np.ndarray, " cluster"]]:
    """Sum and number of values of each cluster. Raises `InputError` below two clusters."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(clusters):
        raise InputError(f"values and clusters must have one entry an example, got {len(values)} and {len(clusters)}")
    distinct = dict.fromkeys(clusters)
    if len(distinct) < 2:
        raise InputError(f"an interval needs at least 2 clusters, got {len(distinct)}")
    number_of = {cluster: number for number, cluster in enumerate(distinct)}
    numbers = [number_of[cluster] for cluster in clusters]
    sums = np.bincount(numbers, values)
    sizes = np.bincount(numbers).astype(np.float64)
    return sums, sizes


def _n_in_batch(n_clusters: int) -> int:
    """How many resamples scipy holds at a time."""
    return max(1, _BATCH_NUMBERS // n_clusters)
