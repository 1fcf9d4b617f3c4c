"""Intervals and p-values for paired measurements of the same prompts.

Examples of one cluster are not independent, so intervals and tests treat clusters, not rows, as the sample. One rule
says what a cluster is: the topic of a prompt, else the prompt (`evaluation.outcomes.clusters_of`). Ranks among controls
are exact: they assume only that the controls are exchangeable with the edit under the null.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from dean_interp.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval, in the units of the data."""

    mean: float
    low: float
    high: float
    n_clusters: int

    def __str__(self) -> str:
        digits = 3 if max(abs(self.low), abs(self.high)) >= 0.01 else 5  # small effects are not all 0.000
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def clustered_interval(
    values: Float[np.ndarray, " example"], clusters: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """Mean of `values` with a cluster-robust t interval (CR1, Liang and Zeger 1986; `n_clusters - 1` degrees).

    For a paired comparison, hand in the differences. With one row a cluster this is the ordinary t interval.
    Raises `InputError` below two clusters, where no interval exists.
    """
    sums, sizes = _by_cluster(values, clusters)
    mean, n_clusters = float(sums.sum() / sizes.sum()), len(sums)
    half = float(stats.t.ppf(0.5 + confidence / 2, n_clusters - 1)) * standard_error(values, clusters)
    return Interval(mean=mean, low=mean - half, high=mean + half, n_clusters=n_clusters)


def standard_error(values: Float[np.ndarray, " example"], clusters: Sequence[Hashable]) -> float:
    """Cluster-robust standard error of the mean of `values`, in their units (CR1, Liang and Zeger 1986).

    Raises `InputError` below two clusters.
    """
    sums, sizes = _by_cluster(values, clusters)
    n_clusters, mean = len(sums), sums.sum() / sizes.sum()
    squares = ((sums - mean * sizes) ** 2).sum()
    return float(np.sqrt(n_clusters / (n_clusters - 1) * squares) / sizes.sum())


def bootstrap_interval(
    values: Float[np.ndarray, " example"],
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with a percentile interval over redrawn clusters (Field and Welsh 2007, cluster bootstrap).

    For means that are skewed or bounded (shares near 0 or 1), where a t interval leaves the range of the data.
    Raises `InputError` as `clustered_interval` does.
    """
    sums, sizes = _by_cluster(values, clusters)
    found = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=n_resamples,
        batch=max(1, 2_000_000 // len(sums)),
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), len(sums))


def bootstrap_of_means(
    values: Float[np.ndarray, "quantity example"],
    clusters: Sequence[Hashable],
    *,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Float[np.ndarray, "resample quantity"]:
    """Means of several quantities of the same examples over redrawn clusters, each draw the same for all quantities.

    For an interval of a function of these means. Raises `InputError` below two clusters.
    """
    sums = []
    for quantity in values:
        of_quantity, sizes = _by_cluster(quantity, clusters)
        sums.append(of_quantity)
    n_clusters = len(sizes)
    draws = np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), n_resamples)
    return (draws @ np.stack(sums).T) / (draws @ sizes)[:, None]


def sign_flip_p_value(
    differences: Float[np.ndarray, " example"],
    clusters: Sequence[Hashable],
    *,
    n_resamples: int = 9999,
    seed: int = 0,
) -> float:
    """Two-sided p that paired differences are 0 on average, by flipping the sign of whole clusters.

    All sign patterns are tried where there are no more than `n_resamples`, else that many are drawn. For differences of
    one 0/1 outcome with one row a cluster, this is McNemar's test.
    """
    sums, _ = _by_cluster(differences, clusters)
    if not sums.any():
        return 1.0
    found = stats.permutation_test(
        (sums,),
        lambda sums, axis: sums.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, 2_000_000 // len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def mcnemar_p_value(before: Bool[np.ndarray, " before"], after: Bool[np.ndarray, " after"]) -> float:
    """Two-sided exact p that a yes/no outcome of the same prompts did not change (McNemar 1947, binomial form).

    Only prompts whose outcome changed count: under the null each changes either way with probability one half. Prompts
    must not repeat; where they do, `sign_flip_p_value` takes clusters.
    """
    if len(before) != len(after):
        raise InputError(f"paired outcomes need one entry a prompt, got {len(before)} and {len(after)}")
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for how many there are, so that the family errs no more often than one test (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda each: each[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def proportion(n_yes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """A share with its Wilson (1927) score interval; `n` independent trials."""
    if not 0 <= n_yes <= n or n < 1:
        raise InputError(f"a share needs 0 <= n_yes <= n and n of at least 1, got {n_yes} of {n}")
    return Interval(n_yes / n, *_wilson(n_yes / n, float(n), confidence), n)


def share_interval(
    values: Float[np.ndarray, " example"], clusters: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """A share (values 0 or 1) with a Wilson interval at its effective size (Korn and Graubard 1998).

    The effective size is that of independent trials with the variance that the clusters show; where all values are
    alike it is the number of clusters, so that 0 of 30 does not look certain. Errors as of `clustered_interval`.
    """
    robust = clustered_interval(values, clusters, confidence=confidence)
    share, n = robust.mean, len(values)
    error = (robust.high - robust.mean) / float(stats.t.ppf(0.5 + confidence / 2, robust.n_clusters - 1))
    size = min(float(n), share * (1 - share) / error**2) if error > 0 else float(robust.n_clusters)
    return Interval(share, *_wilson(share, size, confidence), robust.n_clusters)


def rank_p_value(observed: float, controls: Sequence[float]) -> float:
    """One-sided p that `observed` is larger than chance: `(1 + #{control >= observed}) / (n_controls + 1)`."""
    if np.isnan([observed, *controls]).any():
        raise InputError("a rank needs numbers, got NaN")
    return (1 + sum(control >= observed for control in controls)) / (len(controls) + 1)


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
    quantiles = stats.t.ppf(0.5 + confidence / 2, degrees) + stats.t.ppf(power, degrees)
    return float(quantiles) * standard_error


def _wilson(share: float, n: float, confidence: float) -> tuple[float, float]:
    """Score interval of a share of `n` trials; `n` need not be whole."""
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _by_cluster(
    values: Float[np.ndarray, " example"], clusters: Sequence[Hashable]
) -> tuple[Float[np.ndarray, " cluster"], Float[np.ndarray, " cluster"]]:
    """Sum and number of values of each cluster. Raises `InputError` below two clusters."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(clusters):
        raise InputError(f"values and clusters must have one entry an example, got {len(values)} and {len(clusters)}")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(number) < 2:
        raise InputError(f"an interval needs at least 2 clusters, got {len(number)}")
    index = [number[cluster] for cluster in clusters]
    return np.bincount(index, values), np.bincount(index).astype(np.float64)
