"""Estimators: pure functions of two matrices, in float64, in nats."""

import torch
from jaxtyping import Float
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
    return cross_mi(white_x.transpose(-1, -2) @ white_y / (n - 1), n)


def cross_mi(cross: Float[Tensor, "*batch dim_x dim_y"], n_examples: int) -> Float[Tensor, "*batch"]:
    """`gaussian_mi` from the cross-covariance of two whitened sides: `-0.5 * log det(I - C C') - bias`."""
    dim_x, dim_y = cross.shape[-2:]
    rest = torch.eye(dim_x, dtype=cross.dtype, device=cross.device) - cross @ cross.transpose(-1, -2)
    plugin = -0.5 * torch.linalg.det(rest).clamp(min=1e-24).log()
    bias = 0.5 * (
        _log_det_bias(dim_x, n_examples) + _log_det_bias(dim_y, n_examples) - _log_det_bias(dim_x + dim_y, n_examples)
    )
    constant = (cross == 0).all(-1).all(-1)
    return torch.where(constant, torch.zeros_like(plugin), plugin - bias)


def whitened(x: Float[Tensor, "*batch example dim"]) -> Float[Tensor, "*batch example dim"]:
    """Centred, with identity sample covariance; a constant direction stays zero."""
    x = x.double()
    centred = x - x.mean(-2, keepdim=True)
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = size > size.amax(-1, keepdim=True).clamp(min=1e-300) * 1e-10
    return left * kept[..., None, :] * (x.shape[-2] - 1) ** 0.5


def principal_components(x: Float[Tensor, "example dim"], k: int) -> tuple[Float[Tensor, "dim k"], float]:
    """The first `k` principal directions of `x`, and the share of its variance that they keep."""
    x = x.double()
    _, size, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    power = size.square()
    total = float(power.sum())
    return directions[:k].T, float(power[:k].sum()) / total if total else 0.0


def _log_det_bias(dim: int, n_examples: int) -> float:
    """`E log|S| - log|Sigma|` of a sample covariance with `n_examples - 1` degrees of freedom."""
    degrees = torch.tensor(float(n_examples - 1), dtype=torch.float64)
    steps = torch.arange(dim, dtype=torch.float64)
    return float((torch.digamma((degrees - steps) / 2) + torch.log(2 / degrees)).sum())
