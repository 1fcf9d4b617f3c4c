"""Indices of dependence from kernels: HSIC, CKA, nHSIC. They are no information in nats.

All are `tr(A P B P')` of two matrices whose rows sum to zero, with `P` the pairing, so the mean and the variance over
all `n!` shuffles are known in closed form (Kazi-Aoual et al. 1995); every estimate carries them.
"""

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.estimate import CONSTANT, Estimate, Side, doubts, most_coincide, sides

Kernel = Literal["linear", "rbf"]
PAPER_SIGMA, PAPER_EPS = 50.0, 1e-5


def hsic(x: Side, y: Side, *, kernel: Kernel = "linear", debiased: bool = True) -> Estimate:
    """The Hilbert-Schmidt independence criterion, an index in the units of both kernels.

    Biased: `tr(K H L H) / (n - 1)^2` (Gretton et al. 2005), never negative and above zero for independent sides.
    Debiased: the U-statistic of Song et al. 2012, whose mean for independent sides is zero. A linear kernel sees
    correlation alone, however many dimensions; `rbf` sees dependence of every shape, in few.

    Args:
        x: `(n, dim)`; a vector is one column. Not scaled: with a linear kernel the largest columns decide.
        y: the other side, row by row.
        kernel: `linear`, or `rbf`: `exp(-d^2 / 2 s^2)` with `s` the median distance between examples of that side.
        debiased: see above.

    Raises:
        InputError: NaN or infinity, sides of different length, fewer than 4 examples.
    """
    x, y, flags = _checked(x, y, kernel)
    if CONSTANT in flags:
        return Estimate(0.0, "index", tuple(flags), 0.0, 0.0)
    n = len(x)
    first, second = (centred(gram(side, kernel), debiased=debiased) for side in (x, y))
    return _estimate(first, second, float(n * (n - 3) if debiased else (n - 1) ** 2), flags)


def cka(x: Side, y: Side, *, kernel: Kernel = "linear", debiased: bool = True) -> Estimate:
    """Centred kernel alignment: HSIC over the root of both sides' HSIC with themselves, an index; 1 for equal sides.

    Unchanged by rotation, scale and shift of a side (Kornblith et al. 2019). The biased form nears 1 for independent
    sides where there are more dimensions than examples: report the debiased one, which may be negative (Murphy et al.
    2024). Arguments and errors as for `hsic`.
    """
    x, y, flags = _checked(x, y, kernel)
    if CONSTANT in flags:
        return Estimate(0.0, "index", tuple(flags), 0.0, 0.0)
    first, second, norm = aligned(x, y, kernel, debiased=debiased)
    if not norm:
        return Estimate(0.0, "index", (*flags, "a side has no dependence on itself to be normalised by"), 0.0, 0.0)
    return _estimate(first, second, norm, flags)


def aligned(
    x: Float[Tensor, "example dim_x"],
    y: Float[Tensor, "example dim_y"],
    kernel: Kernel,
    *,
    debiased: bool = True,
    widths: tuple[float | None, float | None] = (None, None),
) -> tuple[Float[Tensor, "example example"], Float[Tensor, "example example"], float]:
    """Both centred kernel matrices, and what CKA divides by; 0 where a side's own dependence is only rounding.

    Rows at equal distances from each other (as those of an identity matrix are) have none once it is debiased.
    """
    found, norm = [], 1.0
    for side, width in zip((x, y), widths, strict=True):
        values = gram(side, kernel, bandwidth=width)
        found.append(centred(values, debiased=debiased))
        own = float(found[-1].norm())
        norm *= own if own > 1e-12 * float(values.norm()) else 0.0
    return found[0], found[1], norm


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
        return Estimate(0.0, "index", tuple(flags), 0.0, 0.0)
    return _estimate(smoother(x, sigma=sigma, eps=eps), smoother(y, sigma=sigma, eps=eps), 1.0, flags)


def shuffle_moments(
    first: Float[Tensor, "example example"], second: Float[Tensor, "example example"]
) -> tuple[float, float]:
    """Mean and standard deviation of `tr(A P B P')` over all permutations; rows of both symmetric matrices sum to 0.

    Kazi-Aoual, Hitier, Sabatier and Lebreton 1995, as Josse, Pagès and Husson 2008 write it. Needs `n >= 4`.
    """
    n = len(first)
    (t, t2, s2), (u, u2, v2) = (
        (float(m.trace()), float(m.square().sum()), float(m.diagonal().square().sum())) for m in (first, second)
    )
    variance = 2 * ((n - 1) * t2 - t**2) * ((n - 1) * u2 - u**2) / ((n - 1) ** 2 * (n + 1) * (n - 2))
    rest = [n * (n + 1) * s - (n - 1) * (a**2 + 2 * b) for a, b, s in ((t, t2, s2), (u, u2, v2))]
    variance += rest[0] * rest[1] / ((n + 1) * n * (n - 1) * (n - 2) * (n - 3))
    return t * u / (n - 1), max(variance, 0.0) ** 0.5


def trace_of_pairings(
    first: Float[Tensor, "example example"],
    second: Float[Tensor, "example example"],
    pairings: Int[Tensor, "pairing example"],
) -> Float[Tensor, " pairing"]:
    """`tr(A P B P')` for each pairing of row `i` with row `pairing[i]`."""
    if first.device.type != "cpu":
        return torch.stack([(first * second[order][:, order]).sum() for order in pairings.to(first.device)])
    one, two = first.numpy(), second.numpy()  # torch's threads cost more here than they do
    values = [np.vdot(one, two.take(order, 0).take(order, 1)) for order in pairings.numpy()]
    return torch.tensor(np.array(values), dtype=first.dtype)


def gram(
    x: Float[Tensor, "example dim"], kernel: Kernel, *, bandwidth: float | None = None
) -> Float[Tensor, "example example"]:
    """The kernel's value for every two examples; the RBF's `bandwidth` is the median distance where none is given."""
    x = x.double() - x.double().mean(0)
    if kernel == "linear":
        return x @ x.T
    squared = squared_distances(x)
    width = bandwidth if bandwidth is not None else median_distance(x)
    return torch.exp(-squared / (2 * width**2))


def squared_distances(x: Float[Tensor, "example dim"]) -> Float[Tensor, "example example"]:
    """Squared Euclidean distances between examples."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist" if x.shape[1] < 32 else
                       "use_mm_for_euclid_dist").square().fill_diagonal_(0)  # fmt: skip


def median_distance(x: Float[Tensor, "example dim"]) -> float:
    """Between two different examples; the mean where more than half of them coincide."""
    x = x.double()
    distances = squared_distances(x - x.mean(0)).sqrt()
    above = distances[torch.triu(torch.ones_like(distances), 1) > 0]
    return float(above.median()) or float(above.mean()) or 1.0


def centred(kernel: Float[Tensor, "example example"], *, debiased: bool = False) -> Float[Tensor, "example example"]:
    """`H K H`, or the U-centred matrix whose diagonal is 0 (Székely and Rizzo 2014); rows sum to 0 in both."""
    if not debiased:
        return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
    n = len(kernel)
    kernel = kernel - torch.diag(kernel.diagonal())
    rows = kernel.sum(0) / (n - 2)
    return (kernel - rows - rows[:, None] + kernel.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def smoother(
    x: Float[Tensor, "example dim"], *, sigma: float = PAPER_SIGMA, eps: float = PAPER_EPS, scale: Tensor | None = None
) -> Float[Tensor, "example example"]:
    """`Kc (Kc + eps n I)^-1` of one side, whose columns are divided by `scale` (None: by their own spread)."""
    x = x.double()
    x = (x - x.mean(0)) / (spread(x) if scale is None else scale)
    kernel = centred(torch.exp(-squared_distances(x) / (2 * sigma**2 * x.shape[1])))
    ridge = eps * len(x) * torch.eye(len(x), dtype=x.dtype, device=x.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + ridge))
    return torch.eye(len(x), dtype=x.dtype, device=x.device) - eps * len(x) * inverse


def spread(x: Float[Tensor, "example dim"]) -> Float[Tensor, " dim"]:
    """Standard deviation of every column; 1 for a column that does not vary."""
    sd = x.double().std(0)
    return torch.where(sd > 0, sd, torch.ones_like(sd))


def _checked(x: Side, y: Side, kernel: Kernel) -> tuple[Tensor, Tensor, list[str]]:
    if kernel not in get_args(Kernel):
        raise InputError(f"kernel must be one of {get_args(Kernel)}, got {kernel!r}")
    x, y = sides(x, y)
    flags = doubts(x, y)
    is_zero = kernel == "rbf" and CONSTANT not in flags and any(most_coincide(side) for side in (x, y))
    return x, y, [*flags, *["the median distance of a side is zero"] * is_zero]


def _estimate(first: Tensor, second: Tensor, norm: float, flags: list[str]) -> Estimate:
    mean, sd = shuffle_moments(first, second)
    return Estimate(float((first * second).sum()) / norm, "index", tuple(flags), mean / norm, sd / norm)
