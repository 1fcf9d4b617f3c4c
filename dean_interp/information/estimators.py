"""Estimators: pure functions of two matrices, in float64, in nats."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gaussian_mi(
    x: Float[Tensor, "*batch example dim_x"], y: Float[Tensor, "*batch example dim_y"]
) -> Float[Tensor, "*batch"]:
    """Mutual information (nats) of jointly Gaussian `x` and `y`, with the digamma correction for finite samples.

    `0.5 * (log|S_x| + log|S_y| - log|S_xy|)` of the sample covariances, minus its expected bias under a Wishart
    distribution (Misra, Singh and Demchuk 2005), so that it is unbiased for Gaussian data and may be negative. Blind
    to dependence without correlation; a lower bound in no strict sense for other data. A constant side has no
    information: 0.

    Needs `n_examples > dim_x + dim_y + 1` (raises `ValueError`); trust it from 8 times that.
    """
    n, dim_x, dim_y = x.shape[-2], x.shape[-1], y.shape[-1]
    if n <= dim_x + dim_y + 1:
        raise ValueError(f"{dim_x} + {dim_y} dimensions need more than {dim_x + dim_y + 1} examples, got {n}")
    white_x, white_y = whitened(x), whitened(y)
    return cross_mi(white_x.transpose(-1, -2) @ white_y / (n - 1), n, rank(white_x), rank(white_y))


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
    bias = _log_det_bias(dim_x + dim_y, n_examples).to(cross.device)
    return -0.5 * (torch.linalg.slogdet(rest).logabsdet + bias[rank_x] + bias[rank_y] - bias[rank_x + rank_y])


def whitened(x: Float[Tensor, "*batch example dim"]) -> Float[Tensor, "*batch example dim"]:
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


def principal_components(x: Float[Tensor, "example dim"], k: int) -> tuple[Float[Tensor, "dim k"], float]:
    """The first `k` principal directions of `x`, and the share of its variance that they keep."""
    x = x.double()
    _, size, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    power = size.square()
    total = float(power.sum())
    return directions[:k].T, float(power[:k].sum()) / total if total else 0.0


def _log_det_bias(dim: int, n_examples: int) -> Float[Tensor, " dims"]:
    """`E log|S| - log|Sigma|` of a covariance with `n_examples - 1` degrees of freedom, for 0 to `dim` dimensions."""
    degrees = torch.tensor(float(n_examples - 1), dtype=torch.float64)
    steps = torch.arange(dim, dtype=torch.float64)
    terms = torch.digamma((degrees - steps) / 2) + torch.log(2 / degrees)
    return torch.cat([torch.zeros(1, dtype=torch.float64), terms.cumsum(0)])
