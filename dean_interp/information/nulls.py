"""What an estimate says when there is nothing to find: shuffled pairings, subsamples, and ranks among controls."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.estimate import CONSTANT, Estimate, Side, sides
from dean_interp.information.gaussian import copula_mi, gaussian_mi, gaussian_of_pairings, normal_scores, reduced
from dean_interp.information.kernels import (
    aligned,
    cka,
    median_distance,
    nhsic,
    smoother,
    spread,
    trace_of_pairings,
)
from dean_interp.information.neighbours import ksg_mi, ksg_of_pairings, scaled
from dean_interp.statistics import rank_p_value

Estimator = Literal["gaussian_mi", "copula_mi", "ksg_mi", "cka", "rbf_cka", "nhsic"]
"""Estimators by name. `cka` and `rbf_cka` are debiased; `ksg_mi` is on ranks with 5 neighbours."""
N_SHUFFLES = 999
KSG_NEIGHBOURS = 5
Core = Callable[
    [Float[Tensor, "example dim_x"], Float[Tensor, "example dim_y"], Int[Tensor, "pairing example"]],
    Float[Tensor, " pairing"],
]
"""The values of an estimator for several pairings of row `i` of the first side with row `pairing[i]` of the second."""


@dataclass(frozen=True)
class ShuffleTest:
    """An estimate beside the same estimate on shuffled pairings."""

    value: float
    null_mean: float
    null_sd: float
    p: float
    """One-sided: `(1 + #{shuffled >= value}) / (n_shuffles + 1)`."""
    n_shuffles: int
    flags: tuple[str, ...]

    @property
    def excess(self) -> float:
        """The value above the mean of its null, in the estimator's units."""
        return self.value - self.null_mean


def shuffle_test(
    x: Side,
    y: Side,
    *,
    estimator: Estimator = "gaussian_mi",
    groups: Sequence[Hashable] | None = None,
    k: int | None = None,
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
) -> ShuffleTest:
    """Test whether two sides depend on each other, by shuffling which rows belong together.

    Args:
        x: `(n, dim)`; a vector is one column.
        y: the other side, row by row.
        estimator: by name; one-sided, since all grow with dependence.
        groups: shuffle only within groups, which leaves in the null what the groups alone explain.
        k: take that many principal components of each side first.
        n_shuffles: random pairings.
        seed: of the shuffles.

    Raises:
        InputError: bad sides (see the estimators), `groups` of another length.
    """
    x, y = sides(x, y)
    names = [0] * len(x) if groups is None else list(groups)
    if len(names) != len(x):
        raise InputError(f"groups must have one entry an example, got {len(names)} for {len(x)}")
    if n_shuffles < 1:
        raise InputError(f"n_shuffles must be at least 1, got {n_shuffles}")
    first, second = reduced(x, y, k)
    flags = estimated(estimator, first, second).flags
    if CONSTANT in flags:
        return ShuffleTest(0.0, 0.0, 0.0, 1.0, n_shuffles, flags)
    shuffles = within_group_permutations(names, n_shuffles, seed=seed)
    pairings = torch.cat([torch.arange(len(x))[None], shuffles])
    value, *null = frozen(estimator, first, second)(first, second, pairings).tolist()
    return ShuffleTest(value, float(np.mean(null)), float(np.std(null)), rank_p_value(value, null), n_shuffles, flags)


def estimated(estimator: str, x: Float[Tensor, "example dim_x"], y: Float[Tensor, "example dim_y"]) -> Estimate:
    """One estimate by the estimator's name, with its flags and errors."""
    if estimator not in get_args(Estimator):
        raise InputError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")
    if estimator == "ksg_mi":
        return ksg_mi(x, y, k=KSG_NEIGHBOURS, scaling="ranks")
    if estimator == "rbf_cka":
        return cka(x, y, kernel="rbf")
    return {"gaussian_mi": gaussian_mi, "copula_mi": copula_mi, "cka": cka, "nhsic": nhsic}[estimator](x, y)


def frozen(estimator: str, x: Float[Tensor, "example dim_x"], y: Float[Tensor, "example dim_y"]) -> Core:
    """An estimator whose scales and bandwidths are those of these sides, whatever sides it is given later."""
    if estimator == "gaussian_mi":
        return gaussian_of_pairings
    if estimator == "copula_mi":
        return lambda x, y, pairings: gaussian_of_pairings(normal_scores(x), normal_scores(y), pairings)
    if estimator == "ksg_mi":
        return lambda x, y, pairings: ksg_of_pairings(
            scaled(x, "ranks"), scaled(y, "ranks"), pairings, k=KSG_NEIGHBOURS
        )
    if estimator == "nhsic":
        scales = spread(x), spread(y)
        return lambda x, y, pairings: trace_of_pairings(
            smoother(x, scale=scales[0]), smoother(y, scale=scales[1]), pairings
        )
    kernel = "rbf" if estimator == "rbf_cka" else "linear"
    widths = (median_distance(x), median_distance(y)) if kernel == "rbf" else (None, None)

    def alignment(x: Tensor, y: Tensor, pairings: Tensor) -> Tensor:
        first, second, norm = aligned(x, y, kernel, widths=widths)
        return trace_of_pairings(first, second, pairings) / (norm or float("inf"))

    return alignment


def within_group_permutations(
    groups: Sequence[Hashable], n_shuffles: int, *, seed: int, block: int = 1
) -> Int[Tensor, "shuffle example"]:
    """Permutations that move an example only among those of its own group.

    Two pooled prompt sets depend on each other through their topic alone; such a shuffle keeps that part. Every `block`
    rows that follow each other are one prompt (its answers): they move together, in a random order of their own.
    """
    generator = np.random.default_rng(seed)
    names = list(groups[::block])
    shuffles = np.tile(np.arange(len(names)), (n_shuffles, 1))
    for name in dict.fromkeys(names):
        members = np.array([i for i, one in enumerate(names) if one == name])
        shuffles[:, members] = generator.permuted(np.tile(members, (n_shuffles, 1)), axis=1)
    if block > 1:
        order = generator.permuted(np.tile(np.arange(block), (n_shuffles, len(names), 1)), axis=2)
        shuffles = (block * shuffles[:, :, None] + order).reshape(n_shuffles, len(names) * block)
    return torch.from_numpy(shuffles)


def half_samples(
    clusters: Sequence[Hashable], groups: Sequence[Hashable], n_samples: int, *, seed: int
) -> list[tuple[Int[Tensor, " row"], float]]:
    """Random rows, about half of every group in whole clusters, each with what scales its deviation to all rows.

    An estimate on `m` of `n` rows drawn without replacement deviates by its own standard error times
    `sqrt((n - m) / m)` (Politis and Romano 1994; at one half the delete-half jackknife of Shao and Wu 1989); the factor
    is the inverse. Drawing with replacement would repeat rows, and an estimate from neighbours or kernels takes a
    repeated row for information. Where a group is one cluster, its rows are drawn one by one.
    """
    generator = np.random.default_rng(seed)
    of_group: dict[Hashable, dict[Hashable, list[int]]] = {}
    for row, (cluster, group) in enumerate(zip(clusters, groups, strict=True)):
        of_group.setdefault(group, {}).setdefault(cluster, []).append(row)
    samples = []
    for _ in range(n_samples):
        rows: list[int] = []
        for members in of_group.values():
            parts = list(members.values()) if len(members) > 1 else [[row] for row in next(iter(members.values()))]
            wanted = len(rows) + sum(map(len, parts)) / 2
            for i in generator.permutation(len(parts))[: max(1, len(parts) - 1)]:
                if len(rows) < wanted:
                    rows += parts[i]
        n_left = max(1, len(clusters) - len(rows))
        samples.append((torch.tensor(sorted(rows)), (len(rows) / n_left) ** 0.5))
    return samples


def largest_fall(change: Sequence[float], control_changes: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The layer of the largest standardised fall, and the p-value of a fall that large in any layer.

    Max-statistic: every layer's changes are standardised over the edit and its controls together, each takes its
    lowest, and the edit's is ranked among the controls'. Changes are in nats, one a layer.
    """
    everyone = np.array([change, *control_changes])
    sd = everyone.std(axis=0, ddof=1)
    # a layer that nothing can move (none lies upstream) differs by rounding alone: it takes no part
    standard = (everyone - everyone.mean(axis=0)) / np.where(sd > 1e-9, sd, np.inf)
    lowest = standard.min(axis=1)
    return int(standard[0].argmin()), rank_p_value(-lowest[0], (-lowest[1:]).tolist())
