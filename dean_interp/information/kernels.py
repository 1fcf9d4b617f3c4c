"""Indices of dependence from kernels: HSIC, CKA, nHSIC. They are no information in nats.

All are `tr(A P B P')` of two matrices whose rows sum to zero, with `P` the pairing, so the mean and the variance over
all `n!` shuffles are known in closed form (Kazi-Aoual et al. 1995); every estimate carries them.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.estimate import (
    CONSTANT,
    Estimate,
    Matrix,
    Pairings,
    Side,
    as_matrices,
    doubts,
    most_coincide,
)

Kernel = Literal["linear", "rbf"]
PAPER_SIGMA, PAPER_EPS = 50.0, 1e-5
_ROUNDING = 1e-12
_FEW_COLUMNS = 32
"""Below so many columns distances are summed one by one, which is exact and as fast."""
_KernelMatrix = Float[Tensor, "example example"]


def hsic(x: Side, y: Side, *, kernel: Kernel = "linear", debiased: bool = True) -> Estimate:
    """The Hilbert-Schmidt independence criterion, an index in the units of both kernels.

    Biased: `tr(K H L H) / (n - 1)^2` (Gretton et al. 2005), never negative and above zero for independent sides.
    Debiased: the U-statistic of Song et al. 2012, whose mean for independent sides is zero. A linear kernel sees
    correlation alone, however many dimensions; `rbf` sees dependence of every shape, in few.

    Args:
        x: `(n, dim)`; a vector is one column. Not scaled: with a linear kernel the largest columns decide.
        y: the other side, row by row.
        kernel: `linear`, or `rbf`: `exp(-d^2 / 2 s^2)` with `s` the median distance between examples of that side.
        debiased: take the second form.

    Raises:
        InputError: NaN or infinity, sides of different length, fewer than 4 examples.
    """
    x, y, flags = _checked(x, y, kernel)
    if CONSTANT in flags:
        return _nothing(flags)
    first = centred(gram(x, kernel), debiased=debiased)
    second = centred(gram(y, kernel), debiased=debiased)
    n = len(x)
    norm = (n - 1) ** 2
    if debiased:
        norm = n * (n - 3)
    return _estimate(first, second, float(norm), flags)


def cka(x: Side, y: Side, *, kernel: Kernel = "linear", debiased: bool = True) -> Estimate:
    """Centred kernel alignment: HSIC over the root of both sides' HSIC with themselves, an index; 1 for equal sides.

    Unchanged by rotation, scale and shift of a side (Kornblith et al. 2019). The biased form nears 1 for independent
    sides where there are more dimensions than examples: report the debiased one, which may be negative (Murphy et al.
    2024). Arguments and errors as for `hsic`.
    """
    x, y, flags = _checked(x, y, kernel)
    if CONSTANT in flags:
        return _nothing(flags)
    first, second, norm = aligned(x, y, kernel, debiased=debiased)
    if not norm:
        return _nothing([*flags, "a side has no dependence on itself to be normalised by"])
    return _estimate(first, second, norm, flags)


def aligned(
    x: Matrix,
    y: Matrix,
    kernel: Kernel,
    *,
    debiased: bool = True,
    widths: tuple[float | None, float | None] = (None, None),
) -> tuple[_KernelMatrix, _KernelMatrix, float]:
    """Both centred kernel matrices, and what CKA divides by; 0 where a side's own dependence is only rounding.

    Rows at equal distances from each other (as those of an identity matrix are) have none once it is debiased.
    """
    width_x, width_y = widths
    first, first_norm = _centred_with_norm(x, kernel, width_x, debiased=debiased)
    second, second_norm = _centred_with_norm(y, kernel, width_y, debiased=debiased)
    return first, second, first_norm * second_norm


def _centred_with_norm(
    x: Matrix, kernel: Kernel, width: float | None, *, debiased: bool
) -> tuple[_KernelMatrix, float]:
    values = gram(x, kernel, bandwidth=width)
    matrix = centred(values, debiased=debiased)
    norm = float(matrix.norm())
    is_more_than_rounding = norm > _ROUNDING * float(values.norm())
    if not is_more_than_rounding:
        norm = 0.0
    return matrix, norm


def nhsic(x: Side, y: Side, *, sigma: float = PAPER_SIGMA, eps: float = PAPER_EPS) -> Estimate:
    """The normalised HSIC of the code that the paper's group published for another work (`TracingLLM`), an index.

    `tr(S_x S_y)`, `S = Kc (Kc + eps n I)^-1`, `Kc = H K H`, `K = exp(-d^2 / (2 sigma^2 dim))` on columns centred and
    divided by their standard deviation (after Ma et al. 2020, the HSIC bottleneck; equal to their one-sided form).
    It counts the shared directions whose share of the variance is not negligible beside `eps`, so it grows with the
    dimensions of both sides, dependent or not: never read it without `null_mean` and `null_sd`.

    Raises:
        InputError: as `hsic`; `sigma` or `eps` not positive.
    """
    if not (sigma > 0 and eps > 0):
        raise InputError(f"sigma and eps must be positive, got {sigma} and {eps}")
    x, y, flags = _checked(x, y, "rbf")
    if CONSTANT in flags:
        return _nothing(flags)
    first = smoother(x, sigma=sigma, eps=eps)
    second = smoother(y, sigma=sigma, eps=eps)
    return _estimate(first, second, 1.0, flags)


def shuffle_moments(first: _KernelMatrix, second: _KernelMatrix) -> tuple[float, float]:
    """Mean and standard deviation of `tr(A P B P')` over all permutations; rows of both symmetric matrices sum to 0.

    Kazi-Aoual, Hitier, Sabatier and Lebreton 1995, as Josse, Pagès and Husson 2008 write it. Needs `n >= 4`.
    """
    n = len(first)
    # t, t2 and s2 of the first matrix, u, u2 and v2 of the second, as the paper calls them
    t, t2, s2 = _traces(first)
    u, u2, v2 = _traces(second)
    mean = t * u / (n - 1)
    # the first term: of the eigenvalues alone
    first_spread = (n - 1) * t2 - t**2
    second_spread = (n - 1) * u2 - u**2
    divisor = (n - 1) ** 2 * (n + 1) * (n - 2)
    variance = 2 * first_spread * second_spread / divisor
    # the second term: of the diagonals too
    first_rest = n * (n + 1) * s2 - (n - 1) * (t**2 + 2 * t2)
    second_rest = n * (n + 1) * v2 - (n - 1) * (u**2 + 2 * u2)
    divisor = (n + 1) * n * (n - 1) * (n - 2) * (n - 3)
    variance += first_rest * second_rest / divisor
    # rounding may leave a variance of 0 below it
    variance = max(variance, 0.0)
    return mean, variance**0.5


def _traces(matrix: _KernelMatrix) -> tuple[float, float, float]:
    """`tr(A)`, `tr(A A)` and the sum of the squared diagonal of a symmetric matrix `A`."""
    trace = float(matrix.trace())
    trace_of_square = float(matrix.square().sum())
    diagonal_squares = float(matrix.diagonal().square().sum())
    return trace, trace_of_square, diagonal_squares


def trace_of_pairings(
    first: _KernelMatrix,
    second: _KernelMatrix,
    pairings: Pairings,
) -> Float[Tensor, " pairing"]:
    """`tr(A P B P')` for each pairing of row `i` with row `pairing[i]`."""
    traces = []
    if first.device.type != "cpu":
        for order in pairings.to(first.device):
            paired = second[order][:, order]
            traces.append((first * paired).sum())
        return torch.stack(traces)
    # in numpy: torch's threads cost more here than they do
    first_values, second_values = first.numpy(), second.numpy()
    for order in pairings.numpy():
        paired = second_values.take(order, 0).take(order, 1)
        traces.append(np.vdot(first_values, paired))
    return torch.tensor(np.array(traces), dtype=first.dtype)


def gram(x: Matrix, kernel: Kernel, *, bandwidth: float | None = None) -> _KernelMatrix:
    """The kernel's value for every two examples; the RBF's `bandwidth` is the median distance where none is given."""
    x = x.double()
    x = x - x.mean(0)
    if kernel == "linear":
        return x @ x.T
    if bandwidth is None:
        bandwidth = median_distance(x)
    squared = squared_distances(x)
    width = 2 * bandwidth**2
    return torch.exp(-squared / width)


def squared_distances(x: Matrix) -> _KernelMatrix:
    """Squared Euclidean distances between examples."""
    mode = "donot_use_mm_for_euclid_dist"
    # by products of matrices where there are many columns: faster, and exact enough there
    if x.shape[1] >= _FEW_COLUMNS:
        mode = "use_mm_for_euclid_dist"
    distances = torch.cdist(x, x, compute_mode=mode)
    return distances.square().fill_diagonal_(0)


def median_distance(x: Matrix) -> float:
    """Median distance between two different examples; the mean where more than half of the distances are 0."""
    x = x.double()
    x = x - x.mean(0)
    distances = squared_distances(x).sqrt()
    # each pair of examples once
    is_above_diagonal = torch.triu(torch.ones_like(distances), 1) > 0
    distances = distances[is_above_diagonal]
    median = float(distances.median())
    mean = float(distances.mean())
    return median or mean or 1.0


def centred(kernel: _KernelMatrix, *, debiased: bool = False) -> _KernelMatrix:
    """`H K H`, or the U-centred matrix whose diagonal is 0 (Székely and Rizzo 2014); rows sum to 0 in both."""
    if not debiased:
        columns = kernel.mean(0)
        rows = kernel.mean(1)[:, None]
        return kernel - columns - rows + kernel.mean()
    n = len(kernel)
    kernel = kernel - torch.diag(kernel.diagonal())
    columns = kernel.sum(0) / (n - 2)
    rows = columns[:, None]
    total = kernel.sum() / ((n - 1) * (n - 2))
    centred_kernel = kernel - columns - rows + total
    return centred_kernel.fill_diagonal_(0)


def smoother(
    x: Float[Tensor, "example dim"],
    *,
    sigma: float = PAPER_SIGMA,
    eps: float = PAPER_EPS,
    scale: Float[Tensor, " dim"] | None = None,
) -> _KernelMatrix:
    """`Kc (Kc + eps n I)^-1` of one side, whose columns are divided by `scale` (None: by their own spread)."""
    x = x.double()
    n_examples, dim = x.shape
    if scale is None:
        scale = spread(x)
    x = (x - x.mean(0)) / scale
    squared = squared_distances(x)
    width = 2 * sigma**2 * dim
    kernel = torch.exp(-squared / width)
    identity = torch.eye(n_examples, dtype=x.dtype, device=x.device)
    ridge = eps * n_examples
    root = torch.linalg.cholesky(centred(kernel) + ridge * identity)
    inverse = torch.cholesky_inverse(root)
    # K (K + r I)^-1 = I - r (K + r I)^-1: one inverse, and no product
    return identity - ridge * inverse


def spread(x: Float[Tensor, "example dim"]) -> Float[Tensor, " dim"]:
    """Standard deviation of every column; 1 for a column that does not vary."""
    sd = x.double().std(0)
    return torch.where(sd > 0, sd, torch.ones_like(sd))


def _checked(x: Side, y: Side, kernel: Kernel) -> tuple[Matrix, Matrix, list[str]]:
    if kernel not in get_args(Kernel):
        raise InputError(f"kernel must be one of {get_args(Kernel)}, got {kernel!r}")
    x, y = as_matrices(x, y)
    flags = doubts(x, y)
    if kernel == "rbf" and CONSTANT not in flags:
        if most_coincide(x) or most_coincide(y):
            flags.append("the median distance of a side is zero")
    return x, y, flags


def _estimate(first: _KernelMatrix, second: _KernelMatrix, norm: float, flags: Sequence[str]) -> Estimate:
    mean, sd = shuffle_moments(first, second)
    trace = float((first * second).sum())
    return Estimate(
        value=trace / norm,
        units="index",
        flags=tuple(flags),
        null_mean=mean / norm,
        null_sd=sd / norm,
    )


def _nothing(flags: Sequence[str]) -> Estimate:
    """The index of a side that cannot depend on anything."""
    return Estimate(
        value=0.0,
        units="index",
        flags=tuple(flags),
        null_mean=0.0,
        null_sd=0.0,
    )
