"""What an estimate says when there is nothing to find: shuffled pairings, and ranks among controls."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.information.estimators import cross_mi, rank
from dean_interp.statistics import rank_p_value


def within_group_permutations(groups: Sequence[str], n_shuffles: int, *, seed: int) -> Int[Tensor, "shuffle example"]:
    """Permutations that move an example only among those of its own group.

    Two pooled prompt sets depend on each other through their topic alone; such a shuffle keeps that part.
    """
    generator = np.random.default_rng(seed)
    names = np.asarray(groups)
    shuffles = np.tile(np.arange(len(names)), (n_shuffles, 1))
    for name in dict.fromkeys(groups):
        members = np.flatnonzero(names == name)
        shuffles[:, members] = generator.permuted(np.tile(members, (n_shuffles, 1)), axis=1)
    return torch.from_numpy(shuffles)


def shuffled_gaussian_mi(
    white_x: Float[Tensor, "example dim_x"],
    white_y: Float[Tensor, "example dim_y"],
    shuffles: Int[Tensor, "shuffle example"],
) -> Float[Tensor, " shuffle"]:
    """`gaussian_mi` (nats) of two whitened sides, the rows of the second shuffled; one value a shuffle."""
    n = len(white_x)
    cross = torch.einsum("nx,sny->sxy", white_x, white_y[shuffles]) / (n - 1)
    return cross_mi(cross, n, rank(white_x), rank(white_y))


def largest_fall(change: Sequence[float], control_changes: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The layer of the largest standardised fall, and the p-value of a fall that large in any layer.

    Max-statistic: every layer's changes are standardised over the edit and its controls together, each takes its
    lowest, and the edit's is ranked among the controls'. Changes are in nats, one a layer.
    """
    everyone = np.array([change, *control_changes])
    spread = everyone.std(axis=0, ddof=1)
    # a layer that nothing can move (none lies upstream) differs by rounding alone: it takes no part
    standard = (everyone - everyone.mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)
    lowest = standard.min(axis=1)
    return int(standard[0].argmin()), rank_p_value(-lowest[0], (-lowest[1:]).tolist())
