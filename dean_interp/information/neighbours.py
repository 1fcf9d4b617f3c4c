"""Mutual information from nearest neighbours (Kraskov, Stögbauer and Grassberger 2004, their first estimator)."""

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import KDTree
from scipy.special import digamma
from torch import Tensor

from dean_interp.errors import InputError, refuse_below_one
from dean_interp.information.estimate import (
    CONSTANT,
    Estimate,
    Matrix,
    Pairings,
    Side,
    as_matrices,
    doubts,
    few,
    in_nats,
)
from dean_interp.information.gaussian import normal_scores, whitened
from dean_interp.information.kernels import spread

Scaling = Literal["standard", "ranks", "whitened"]
MOST_DIMENSIONS = 3
_INSIDE = 1 - 1e-10
"""Shrinks the radius: a neighbour at exactly that distance is not inside it, and rounding must not make it so."""


def ksg_mi(x: Side, y: Side, *, k: int = 3, scaling: Scaling = "standard") -> Estimate:
    """Mutual information (nats) from the distance to the `k`-th nearest neighbour, in the maximum norm.

    `psi(k) + psi(n) - <psi(n_x + 1) + psi(n_y + 1)>`. Sees dependence of every shape, in few dimensions: from
    `dim_x + dim_y > 3` on it falls short and is flagged. Falls short too where the true value nears `ln n`, and on
    heavy tails unless `scaling="ranks"`. It takes continuous data: repeated rows are flagged.

    Args:
        x: `(n, dim)`; a vector is one column.
        y: the other side, row by row.
        k: neighbours; 3 to 5 are usual. More lowers the variance and raises the bias.
        scaling: before distances are taken. `standard`: every column to variance 1. `ranks`: every column to its normal
            scores (plain ranks lie on a lattice, and their many equal distances bias the estimate upwards: by 0.06 nats
            on a bivariate normal of 1,000 examples). `whitened`: each side to identity covariance.

    Raises:
        InputError: NaN or infinity, sides of different length, or not more than `k + 1` examples.
    """
    if scaling not in get_args(Scaling):
        raise InputError(f"scaling must be one of {get_args(Scaling)}, got {scaling!r}")
    refuse_below_one(k=k)
    x, y = as_matrices(x, y, least=k + 2)
    n_dims = x.shape[1] + y.shape[1]
    flags = doubts(x, y) + few(len(x), n_dims)
    if CONSTANT in flags:
        return Estimate(0.0, "nats", tuple(flags))
    first = scaled(x, scaling)
    second = scaled(y, scaling)
    if n_dims > MOST_DIMENSIONS:
        flags.append(f"{n_dims} dimensions; neighbours serve up to {MOST_DIMENSIONS}")
    distances = _distances(first.cpu().numpy(), second.cpu().numpy(), k)
    if float(np.median(distances)) == 0:
        flags.append(f"the median distance to neighbour {k} is zero")
    as_it_is = torch.arange(len(x))[None]
    values = ksg_of_pairings(first, second, as_it_is, k=k)
    return in_nats(float(values), len(x), flags)


def scaled(x: Float[Tensor, "example dim"], scaling: Scaling) -> Float[Tensor, "example dim"]:
    """One side, scaled for the distances."""
    if scaling == "ranks":
        return normal_scores(x)
    if scaling == "whitened":
        return whitened(x)
    return (x - x.mean(0)) / spread(x)


def ksg_of_pairings(
    x: Matrix,
    y: Matrix,
    pairings: Pairings,
    *,
    k: int = 3,
) -> Float[Tensor, " pairing"]:
    """`ksg_mi` (nats) of row `i` of `x` with row `pairing[i]` of `y`, one value a pairing; sides are scaled already."""
    first = x.double().cpu().numpy()
    second = y.double().cpu().numpy()
    near_first = _Near(first)
    near_second = _Near(second)
    constant = digamma(k) + digamma(len(first))
    values = []
    for order in pairings.cpu().numpy():
        # each example's distance to its k-th neighbour, in the order of the first side and of the second
        radius = _INSIDE * _distances(first, second[order], k)
        radius_second = np.empty_like(radius)
        radius_second[order] = radius
        # how many others are as near on one side alone
        n_first = near_first.counts(radius)
        n_second = near_second.counts(radius_second)
        first_term = digamma(n_first + 1).mean()
        second_term = digamma(n_second + 1).mean()
        values.append(constant - first_term - second_term)
    return torch.tensor(np.array(values), device=x.device)


def _distances(
    x: Float[np.ndarray, "example dim_x"],
    y: Float[np.ndarray, "example dim_y"],
    k: int,
) -> Float[np.ndarray, " example"]:
    """The distance of each example to its `k`-th neighbour in the joint space."""
    both = np.concatenate([x, y], axis=1)
    # every example is its own nearest neighbour
    distances, _ = KDTree(both).query(both, k=k + 1, p=np.inf)
    return distances[:, -1]


class _Near:
    """Counts the neighbours of every row of one side within that row's radius, without the row itself."""

    def __init__(self, side: Float[np.ndarray, "example dim"]) -> None:
        self.side = side
        self.ordered = np.sort(side[:, 0])
        self.tree = None
        if side.shape[1] > 1:
            self.tree = KDTree(side)

    def counts(self, radius: Float[np.ndarray, " example"]) -> Int[np.ndarray, " example"]:
        if self.tree is not None:
            n_near = self.tree.query_ball_point(self.side, radius, p=np.inf, return_length=True)
            return np.asarray(n_near) - 1
        # on one column: by its order
        middle = self.side[:, 0]
        n_up_to = np.searchsorted(self.ordered, middle + radius, side="right")
        n_below = np.searchsorted(self.ordered, middle - radius, side="left")
        return n_up_to - n_below - 1
