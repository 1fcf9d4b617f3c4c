"""Mutual information of Gaussians, and of a Gaussian copula, corrected for finite samples.

Every estimator has a core that takes many pairings at once: an observed estimate is the core at the pairing of row `i`
with row `i`, a null is the core at shuffles.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.estimate import CONSTANT, Estimate, Side, as_matrices, doubts, few, in_nats

_BATCH_NUMBERS = 2**24
"""Numbers that a batch of re-paired sides may hold."""


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
    return _gaussian(*reduced(x, y, k), doubts(x, y))


def copula_mi(x: Side, y: Side, *, k: int | None = None) -> Estimate:
    """Mutual information (nats) of a Gaussian copula: `gaussian_mi` of the normal scores of every column.

    Exact whatever the margins where a monotone map of each column makes the pair Gaussian; unchanged by every such
    map (Ince et al. 2017). Blind to dependence that is not monotone. Arguments and errors as for `gaussian_mi`; with
    `k` the scores are those of the principal components.
    """
    x, y = as_matrices(x, y)
    first, second = reduced(x, y, k)
    return _gaussian(normal_scores(first), normal_scores(second), doubts(x, y))


def _gaussian(x: Tensor, y: Tensor, flags: list[str]) -> Estimate:
    """The estimate on sides that are reduced already."""
    n, dims = len(x), x.shape[1] + y.shape[1]
    if n <= dims + 1:
        raise InputError(
            f"{x.shape[1]} + {y.shape[1]} dimensions need more than {dims + 1} examples, got {n}; "
            "k= takes principal components"
        )
    if CONSTANT in flags:
        return Estimate(0.0, "nats", tuple(flags))
    return in_nats(float(gaussian_of_pairings(x, y, torch.arange(n)[None])), n, [*flags, *few(n, dims)])


def gaussian_of_pairings(
    x: Float[Tensor, "example dim_x"], y: Float[Tensor, "example dim_y"], pairings: Int[Tensor, "pairing example"]
) -> Float[Tensor, " pairing"]:
    """`gaussian_mi` (nats) of row `i` of `x` with row `pairing[i]` of `y`, one value a pairing."""
    white_x, white_y = whitened(x), whitened(y)
    n, rank_x, rank_y = len(x), rank(white_x), rank(white_y)
    # whitening does not depend on the pairing: only the cross-covariance does
    values = []
    for batch in pairings.to(x.device).split(max(1, _BATCH_NUMBERS // y.numel())):
        cross = torch.einsum("nx,sny->sxy", white_x, white_y[batch]) / (n - 1)
        values.append(cross_mi(cross, n, rank_x, rank_y))
    return torch.cat(values)


def gaussian_of_samples(
    x: Float[Tensor, "sample example dim_x"], y: Float[Tensor, "sample example dim_y"]
) -> Float[Tensor, " sample"]:
    """`gaussian_mi` (nats) of many samples at once; every column must vary."""
    n, dim_x, dim_y = x.shape[1], x.shape[2], y.shape[2]
    both = torch.cat([x, y], 2).double()
    both = both - both.mean(1, keepdim=True)
    covariance = both.transpose(1, 2) @ both / (n - 1)
    first = torch.linalg.slogdet(covariance[:, :dim_x, :dim_x]).logabsdet
    second = torch.linalg.slogdet(covariance[:, dim_x:, dim_x:]).logabsdet
    joint = torch.linalg.slogdet(covariance).logabsdet
    bias = _log_det_bias(dim_x + dim_y, n).to(x.device)
    return 0.5 * (first + second - joint - bias[dim_x] - bias[dim_y] + bias[dim_x + dim_y])


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
    rank_x = torch.tensor(dim_x) if rank_x is None else rank_x
    rank_y = torch.tensor(dim_y) if rank_y is None else rank_y
    rest = torch.eye(dim_x, dtype=cross.dtype, device=cross.device) - cross @ cross.transpose(-1, -2)
    # equal sides have many nats, not infinitely many
    left = torch.linalg.slogdet(rest).logabsdet.clamp(min=-37.0 * dim_x)
    bias = _log_det_bias(dim_x + dim_y, n_examples).to(cross.device)
    return -0.5 * (left + bias[rank_x] + bias[rank_y] - bias[rank_x + rank_y])


def whitened(x: Float[Tensor, "*batch example dim"]) -> Float[Tensor, "*batch example _"]:
    """Centred, with identity sample covariance; a direction without variance (beyond rounding) is zero."""
    x = x.double()
    centred = x - x.mean(-2, keepdim=True)
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    rounding = 1e-12 * torch.linalg.matrix_norm(x)[..., None]
    kept = (size > rounding) & (size > 1e-10 * size.amax(-1, keepdim=True))
    return left * kept[..., None, :] * (x.shape[-2] - 1) ** 0.5


def rank(white: Float[Tensor, "*batch example dim"]) -> Int[Tensor, "*batch"]:
    """How many directions of a whitened side vary."""
    return (white.square().sum(-2) > 0.5).sum(-1)


def normal_scores(x: Float[Tensor, "example dim"]) -> Float[Tensor, "example dim"]:
    """Each column by its ranks, as quantiles of the normal distribution; ties share their mean rank.

    A column that does not vary gives zeros.
    """
    ranks = []
    for column in x.double().T:
        _, place, counts = torch.unique(column, return_inverse=True, return_counts=True)
        # the mean rank of each distinct value, from 1
        mean_rank = counts.cumsum(0) - (counts - 1) / 2
        ranks.append(mean_rank[place])
    return torch.special.ndtri((torch.stack(ranks, 1) - 0.5).double() / len(x))


def principal_components(x: Float[Tensor, "example dim"], k: int) -> tuple[Float[Tensor, "dim k"], float]:
    """The first `k` principal directions of `x`, and the share of its variance that they keep."""
    x = x.double()
    centred = x - x.mean(0)
    if x.shape[1] <= len(x):
        power, directions = torch.linalg.eigh(centred.T @ centred)
        power, directions = power.flip(0), directions.flip(1)[:, :k]
    else:
        # fewer examples than columns: the Gram matrix is the smaller one
        power, left = torch.linalg.eigh(centred @ centred.T)
        power, left = power.flip(0), left.flip(1)[:, :k]
        directions = torch.linalg.qr(centred.T @ left).Q
    total = float(power.sum())
    return directions, float(power[:k].sum()) / total if total > 0 else 0.0


def reduced(
    x: Float[Tensor, "example dim_x"], y: Float[Tensor, "example dim_y"], k: int | None
) -> tuple[Float[Tensor, "example k_x"], Float[Tensor, "example k_y"]]:
    """Both sides on their first `k` principal components; as they are where `k` is None."""
    if k is None:
        return x, y
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    return x @ principal_components(x, k)[0], y @ principal_components(y, k)[0]


def _log_det_bias(dim: int, n_examples: int) -> Float[Tensor, " dims"]:
    """`E log|S| - log|Sigma|` of a covariance with `n_examples - 1` degrees of freedom, for 0 to `dim` dimensions."""
    degrees = torch.tensor(float(n_examples - 1), dtype=torch.float64)
    steps = torch.arange(dim, dtype=torch.float64)
    terms = torch.digamma((degrees - steps) / 2) + torch.log(2 / degrees)
    return torch.cat([torch.zeros(1, dtype=torch.float64), terms.cumsum(0)])
