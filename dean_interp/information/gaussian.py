"""Mutual information of Gaussians, and of a Gaussian copula, corrected for finite samples.

Every estimator has a core that takes many pairings at once: an observed estimate is the core at the pairing of row `i`
with row `i`, a null is the core at shuffles.
"""

import torch
from jaxtyping import Float, Int
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

_BATCH_NUMBERS = 2**24
"""Numbers that a batch of re-paired sides may hold."""
_LEAST_LOG = -37.0
"""Log of the share of variance that rounding leaves of a direction that both sides hold."""


def gaussian_mi(x: Side, y: Side, *, k: int | None = None) -> Estimate:
    """Mutual information (nats) of jointly Gaussian `x` and `y`, corrected for finite samples.

    `0.5 * (log|S_x| + log|S_y| - log|S_xy|)` of the sample covariances, minus its expected bias under a Wishart
    distribution (Misra, Singh and Demchuk 2005), so that it is unbiased for Gaussian data and may be negative. Blind
    to dependence without correlation; for other data neither an upper nor a lower bound.

    Args:
        x: `(n, dim)`; a vector is one column.
        y: the other side, row by row.
        k: estimate on the first `k` principal components of each side.

    Raises:
        InputError: NaN or infinity, sides of different length, or `n <= dim_x + dim_y + 1`. Below
            `8 * (dim_x + dim_y)` examples the estimate is flagged.
    """
    x, y = as_matrices(x, y)
    flags = doubts(x, y)
    first, second = reduced(x, y, k)
    return _gaussian(first, second, flags)


def copula_mi(x: Side, y: Side, *, k: int | None = None) -> Estimate:
    """Mutual information (nats) of a Gaussian copula: `gaussian_mi` of the normal scores of every column.

    Exact whatever the margins where a monotone map of each column makes the pair Gaussian; unchanged by every such
    map (Ince et al. 2017). Blind to dependence that is not monotone. Arguments and errors as for `gaussian_mi`; with
    `k` the scores are those of the principal components.
    """
    x, y = as_matrices(x, y)
    flags = doubts(x, y)
    first, second = reduced(x, y, k)
    first, second = normal_scores(first), normal_scores(second)
    return _gaussian(first, second, flags)


def _gaussian(x: Matrix, y: Matrix, flags: list[str]) -> Estimate:
    """The estimate on sides that are reduced already."""
    n_examples, dim_x = x.shape
    dim_y = y.shape[1]
    n_dims = dim_x + dim_y
    if n_examples <= n_dims + 1:
        raise InputError(
            f"{dim_x} + {dim_y} dimensions need more than {n_dims + 1} examples, got {n_examples}; "
            "k= takes principal components"
        )
    if CONSTANT in flags:
        return Estimate(0.0, "nats", tuple(flags))
    as_it_is = torch.arange(n_examples)[None]
    value = float(gaussian_of_pairings(x, y, as_it_is))
    flags = flags + few(n_examples, n_dims)
    return in_nats(value, n_examples, flags)


def gaussian_of_pairings(
    x: Matrix,
    y: Matrix,
    pairings: Pairings,
) -> Float[Tensor, " pairing"]:
    """`gaussian_mi` (nats) of row `i` of `x` with row `pairing[i]` of `y`, one value a pairing."""
    n_examples = len(x)
    # whitening does not depend on the pairing: only the cross-covariance does
    white_x = whitened(x)
    white_y = whitened(y)
    rank_x = rank(white_x)
    rank_y = rank(white_y)
    batch_size = max(1, _BATCH_NUMBERS // y.numel())
    values = []
    for batch in pairings.to(x.device).split(batch_size):
        products = torch.einsum("nx,sny->sxy", white_x, white_y[batch])
        cross = products / (n_examples - 1)
        values.append(cross_mi(cross, n_examples, rank_x, rank_y))
    return torch.cat(values)


def gaussian_of_samples(
    x: Float[Tensor, "sample example dim_x"], y: Float[Tensor, "sample example dim_y"]
) -> Float[Tensor, " sample"]:
    """`gaussian_mi` (nats) of many samples at once; every column must vary."""
    n_examples, dim_x = x.shape[1:]
    dim_y = y.shape[2]
    n_dims = dim_x + dim_y
    both = torch.cat([x, y], 2).double()
    both = both - both.mean(1, keepdim=True)
    products = both.transpose(1, 2) @ both
    covariance = products / (n_examples - 1)
    # log|S_x| + log|S_y| - log|S_xy|, each minus its own bias
    log_det_x = _log_det(covariance[:, :dim_x, :dim_x])
    log_det_y = _log_det(covariance[:, dim_x:, dim_x:])
    log_det_xy = _log_det(covariance)
    bias = _log_det_bias(n_dims, n_examples).to(x.device)
    raw = log_det_x + log_det_y - log_det_xy
    corrected = raw - bias[dim_x] - bias[dim_y] + bias[n_dims]
    return 0.5 * corrected


def cross_mi(
    cross: Float[Tensor, "*batch dim_x dim_y"],
    n_examples: int,
    rank_x: Int[Tensor, "*#batch"] | None = None,
    rank_y: Int[Tensor, "*#batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """`gaussian_mi` from the cross-covariance of two whitened sides: `-0.5 * log det(I - C C') - bias`.

    The ranks are the sides' dimensions that vary; all of them where they are not given.
    """
    dim_x, dim_y = cross.shape[-2:]
    if rank_x is None:
        rank_x = torch.tensor(dim_x)
    if rank_y is None:
        rank_y = torch.tensor(dim_y)
    identity = torch.eye(dim_x, dtype=cross.dtype, device=cross.device)
    shared = cross @ cross.transpose(-1, -2)
    # equal sides have many nats, not infinitely many
    log_det = _log_det(identity - shared).clamp(min=_LEAST_LOG * dim_x)
    bias = _log_det_bias(dim_x + dim_y, n_examples).to(cross.device)
    corrected = log_det + bias[rank_x] + bias[rank_y] - bias[rank_x + rank_y]
    return -0.5 * corrected


def _log_det(matrix: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.slogdet(matrix).logabsdet


def whitened(x: Float[Tensor, "*batch example dim"]) -> Float[Tensor, "*batch example _"]:
    """Centred, with identity sample covariance; a direction without variance (beyond rounding) is zero."""
    x = x.double()
    n_examples = x.shape[-2]
    centred = x - x.mean(-2, keepdim=True)
    # the left singular vectors are the examples in directions of length 1
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    largest = size.amax(-1, keepdim=True)
    # centring large numbers leaves rounding that grows with them
    rounding = 1e-12 * torch.linalg.matrix_norm(x)[..., None]
    varies = (size > rounding) & (size > 1e-10 * largest)
    kept = left * varies[..., None, :]
    return kept * (n_examples - 1) ** 0.5


def rank(white: Float[Tensor, "*batch example dim"]) -> Int[Tensor, "*batch"]:
    """How many directions of a whitened side vary."""
    # the squares of a direction sum to n - 1, or to 0
    power = white.square().sum(-2)
    return (power > 0.5).sum(-1)


def normal_scores(x: Float[Tensor, "example dim"]) -> Float[Tensor, "example dim"]:
    """Each column by its ranks, as quantiles of the normal distribution; ties share their mean rank.

    A column that does not vary gives zeros.
    """
    columns = []
    for column in x.double().T:
        _, value_of, counts = torch.unique(column, return_inverse=True, return_counts=True)
        # the mean rank of each distinct value, from 1
        last_rank = counts.cumsum(0)
        mean_rank = last_rank - (counts - 1) / 2
        columns.append(mean_rank[value_of])
    ranks = torch.stack(columns, 1)
    shares = (ranks - 0.5).double() / len(x)
    return torch.special.ndtri(shares)


def principal_components(
    x: Float[Tensor, "example dim"],
    k: int,
) -> tuple[Float[Tensor, "dim k"], float]:
    """The first `k` principal directions of `x`, and the share of its variance that they keep."""
    x = x.double()
    n_examples, dim = x.shape
    centred = x - x.mean(0)
    if dim <= n_examples:
        power, directions = _by_power(centred.T @ centred)
        directions = directions[:, :k]
    else:
        # fewer examples than columns: the Gram matrix is the smaller one
        power, scores = _by_power(centred @ centred.T)
        # a sum of examples, weighted by their scores, points along a direction
        sums = centred.T @ scores[:, :k]
        directions = torch.linalg.qr(sums).Q
    total = float(power.sum())
    if not total > 0:
        return directions, 0.0
    kept = float(power[:k].sum())
    return directions, kept / total


def _by_power(
    matrix: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """The eigenvalues and the eigenvectors (columns) of a symmetric matrix, the largest first."""
    power, directions = torch.linalg.eigh(matrix)
    return power.flip(0), directions.flip(1)


def reduced(x: Matrix, y: Matrix, k: int | None) -> tuple[Matrix, Matrix]:
    """Both sides on their first `k` principal components; as they are where `k` is None."""
    if k is None:
        return x, y
    refuse_below_one(k=k)
    directions_x, _ = principal_components(x, k)
    directions_y, _ = principal_components(y, k)
    return x @ directions_x, y @ directions_y


def _log_det_bias(dim: int, n_examples: int) -> Float[Tensor, " dims"]:
    """`E log|S| - log|Sigma|` of a covariance with `n_examples - 1` degrees of freedom, for 0 to `dim` dimensions."""
    degrees = torch.tensor(float(n_examples - 1), dtype=torch.float64)
    dimensions = torch.arange(dim, dtype=torch.float64)
    # every dimension adds the mean log of a chi-square with one degree less than the one before
    log_chi_square = torch.digamma((degrees - dimensions) / 2)
    terms = log_chi_square + torch.log(2 / degrees)
    none = torch.zeros(1, dtype=torch.float64)
    return torch.cat([none, terms.cumsum(0)])
