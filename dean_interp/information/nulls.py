"""How far an estimate can be believed: shuffled pairings, subsamples, and ranks among controls."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError, refuse_below_one
from dean_interp.information.estimate import CONSTANT, Estimate, Matrix, Pairings, Side, as_matrices
from dean_interp.information.gaussian import copula_mi, gaussian_mi, gaussian_of_pairings, normal_scores, reduced
from dean_interp.information.kernels import (
    Kernel,
    aligned,
    cka,
    median_distance,
    nhsic,
    smoother,
    spread,
    trace_of_pairings,
)
from dean_interp.information.neighbours import ksg_mi, ksg_of_pairings
from dean_interp.statistics import rank_p_value

Estimator = Literal["gaussian_mi", "copula_mi", "ksg_mi", "cka", "rbf_cka", "nhsic"]
"""Estimators by name. `cka` and `rbf_cka` are debiased; `ksg_mi` is on ranks with 5 neighbours."""
N_SHUFFLES = 999
KSG_NEIGHBOURS = 5
_ROUNDING = 1e-9
"""Nats by which the changes of a layer may differ though nothing moved it."""
Core = Callable[[Matrix, Matrix, Pairings], Float[Tensor, " pairing"]]
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
        estimator: its name. The test is one-sided, since all estimators grow with dependence.
        groups: the group of each row. Rows are shuffled within groups only: the null keeps what these alone explain.
        k: principal components of each side that are taken first; None takes the sides as they are.
        n_shuffles: how many random pairings are drawn.
        seed: seed for the shuffles.

    Raises:
        InputError: bad sides (see the estimators), `groups` of another length.
    """
    x, y = as_matrices(x, y)
    n_examples = len(x)
    names = [0] * n_examples if groups is None else list(groups)
    if len(names) != n_examples:
        raise InputError(f"groups must have one entry an example, got {len(names)} for {n_examples}")
    refuse_below_one(n_shuffles=n_shuffles)
    first, second = reduced(x, y, k)
    flags = estimated(estimator, first, second).flags
    if CONSTANT in flags:
        return _no_dependence(n_shuffles, flags)
    # the pairing as it is stands first, its shuffles after it
    as_it_is = torch.arange(n_examples)[None]
    shuffles = within_group_permutations(names, n_shuffles, seed=seed)
    pairings = torch.cat([as_it_is, shuffles])
    core = frozen_core(estimator, first, second)
    value, *null = core(first, second, pairings).tolist()
    return ShuffleTest(
        value=value,
        null_mean=float(np.mean(null)),
        null_sd=float(np.std(null)),
        p=rank_p_value(value, null),
        n_shuffles=n_shuffles,
        flags=flags,
    )


def _no_dependence(n_shuffles: int, flags: tuple[str, ...]) -> ShuffleTest:
    """The test of a constant side, which no shuffle changes."""
    return ShuffleTest(value=0.0, null_mean=0.0, null_sd=0.0, p=1.0, n_shuffles=n_shuffles, flags=flags)


def estimated(estimator: str, x: Matrix, y: Matrix) -> Estimate:
    """One estimate by the estimator's name, with its flags and errors."""
    match estimator:
        case "gaussian_mi":
            return gaussian_mi(x, y)
        case "copula_mi":
            return copula_mi(x, y)
        case "ksg_mi":
            return ksg_mi(x, y, k=KSG_NEIGHBOURS, scaling="ranks")
        case "cka":
            return cka(x, y)
        case "rbf_cka":
            return cka(x, y, kernel="rbf")
        case "nhsic":
            return nhsic(x, y)
    raise InputError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")


def frozen_core(estimator: str, x: Matrix, y: Matrix) -> Core:
    """An estimator's core, whose scales and bandwidths are those of these sides, whatever sides it is given later."""
    match estimator:
        case "gaussian_mi":
            return gaussian_of_pairings
        case "copula_mi":
            return _copula_of_pairings
        case "ksg_mi":
            return _ksg_of_ranks
        case "nhsic":
            return _frozen_nhsic(x, y)
        case "rbf_cka":
            widths = median_distance(x), median_distance(y)
            return _frozen_cka("rbf", widths)
    return _frozen_cka("linear", (None, None))


def _copula_of_pairings(x: Matrix, y: Matrix, pairings: Pairings) -> Tensor:
    return gaussian_of_pairings(normal_scores(x), normal_scores(y), pairings)


def _ksg_of_ranks(x: Matrix, y: Matrix, pairings: Pairings) -> Tensor:
    return ksg_of_pairings(normal_scores(x), normal_scores(y), pairings, k=KSG_NEIGHBOURS)


def _frozen_nhsic(x: Tensor, y: Tensor) -> Core:
    scale_x = spread(x)
    scale_y = spread(y)

    def core(x: Matrix, y: Matrix, pairings: Pairings) -> Tensor:
        first = smoother(x, scale=scale_x)
        second = smoother(y, scale=scale_y)
        return trace_of_pairings(first, second, pairings)

    return core


def _frozen_cka(kernel: Kernel, widths: tuple[float | None, float | None]) -> Core:
    def core(x: Matrix, y: Matrix, pairings: Pairings) -> Tensor:
        first, second, norm = aligned(x, y, kernel, widths=widths)
        traces = trace_of_pairings(first, second, pairings)
        # a side that does not depend on itself depends on nothing
        return traces / (norm or float("inf"))

    return core


def within_group_permutations(
    groups: Sequence[Hashable], n_shuffles: int, *, seed: int, block: int = 1
) -> Int[Tensor, "shuffle example"]:
    """Permutations that move an example only among those of its own group.

    Two pooled prompt sets depend on each other through their topic alone; such a shuffle keeps that part. Every `block`
    rows that follow each other are one prompt (its answers): they move together, in a random order of their own.
    """
    generator = np.random.default_rng(seed)
    block_groups = list(groups[::block])
    n_blocks = len(block_groups)
    shuffles = np.tile(np.arange(n_blocks), (n_shuffles, 1))
    for group in dict.fromkeys(block_groups):
        members = np.array([i for i, name in enumerate(block_groups) if name == group])
        repeated = np.tile(members, (n_shuffles, 1))
        shuffles[:, members] = generator.permuted(repeated, axis=1)
    if block > 1:
        # from blocks to their rows, in a random order within each block
        in_order = np.tile(np.arange(block), (n_shuffles, n_blocks, 1))
        order = generator.permuted(in_order, axis=2)
        first_rows = block * shuffles[:, :, None]
        shuffles = (first_rows + order).reshape(n_shuffles, n_blocks * block)
    return torch.from_numpy(shuffles)


def half_samples(
    clusters: Sequence[Hashable], groups: Sequence[Hashable], n_samples: int, *, seed: int, block: int = 1
) -> list[tuple[Int[Tensor, " row"], float]]:
    """Random rows, at least half of every group in whole clusters, each with what scales its deviation to all rows.

    An estimate on `m` of `n` rows drawn without replacement deviates by its own standard error times
    `sqrt((n - m) / m)` (Politis and Romano 1994; at one half the delete-half jackknife of Shao and Wu 1989); the factor
    is the inverse. Drawing with replacement would repeat rows, and an estimate from neighbours or kernels takes a
    repeated row for information. Where one cluster holds most of a group, no whole clusters make a half: its rows are
    drawn one by one, or, where every `block` rows are one prompt, its prompts.
    """
    generator = np.random.default_rng(seed)
    parts_of_groups = parts_to_halve(clusters, groups, block=block)
    samples = []
    for _ in range(n_samples):
        rows: list[int] = []
        for parts in parts_of_groups:
            rows += _half_of(parts, generator)
        n_left = max(1, len(clusters) - len(rows))
        factor = (len(rows) / n_left) ** 0.5
        samples.append((torch.tensor(sorted(rows)), factor))
    return samples


def parts_to_halve(
    clusters: Sequence[Hashable], groups: Sequence[Hashable], *, block: int = 1
) -> list[list[list[int]]]:
    """The rows of each cluster of every group; where one cluster holds most of a group, those of each of its blocks."""
    by_group: dict[Hashable, dict[Hashable, list[int]]] = {}
    for row, (cluster, group) in enumerate(zip(clusters, groups, strict=True)):
        by_group.setdefault(group, {}).setdefault(cluster, []).append(row)
    parts_of_groups = []
    for by_cluster in by_group.values():
        parts = list(by_cluster.values())
        rows = sorted(chain.from_iterable(parts))
        if 2 * max(map(len, parts)) > len(rows):
            parts = [rows[i : i + block] for i in range(0, len(rows), block)]
        parts_of_groups.append(parts)
    return parts_of_groups


def fewest_in_half(clusters: Sequence[Hashable]) -> int:
    """The fewest clusters that hold half of the rows: no half sample of whole clusters has fewer."""
    n_rows = 0
    n_clusters = 0
    for _, size in Counter(clusters).most_common():
        if 2 * n_rows >= len(clusters):
            break
        n_rows += size
        n_clusters += 1
    return n_clusters


def _half_of(parts: Sequence[Sequence[int]], generator: np.random.Generator) -> list[int]:
    """Whole parts in random order until they hold half of all rows; never all of several parts."""
    half = sum(map(len, parts)) / 2
    most = max(1, len(parts) - 1)
    order = generator.permutation(len(parts))
    rows: list[int] = []
    for i in order[:most]:
        if len(rows) < half:
            rows += parts[i]
    return rows


def largest_fall(change: Sequence[float], control_changes: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The layer of the largest standardised fall, and the p-value of a fall that large in any layer.

    Max-statistic: every layer's changes are standardised over the edit and its controls together, each takes its
    lowest, and the edit's is ranked among the controls'. Changes are in nats, one a layer.
    """
    changes = np.array([change, *control_changes])
    sd = changes.std(axis=0, ddof=1)
    # a layer that nothing can move (none lies upstream) differs by rounding alone: it takes no part
    scale = np.where(sd > _ROUNDING, sd, np.inf)
    standard = (changes - changes.mean(axis=0)) / scale
    # the edit stands first, its controls after it
    layer = int(standard[0].argmin())
    largest_falls = -standard.min(axis=1)
    p = rank_p_value(largest_falls[0], largest_falls[1:].tolist())
    return layer, p
