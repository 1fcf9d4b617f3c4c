"""Draws whose mutual information is known (nats), after the bmi benchmark (Czyz et al. 2023); what tests of estimators
share. Everything is float64."""

import math

import numpy as np
import torch
from scipy import integrate, stats

NORMAL = 0.41334
"""Of a bivariate normal with correlation 0.75, and of every map of one of its sides that can be undone."""
STUDENT = math.log(8 * math.pi) - 3
"""Of the two coordinates of a bivariate Cauchy distribution that is round: no correlation, yet dependent."""


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def independent(n, dim_x, dim_y=None, seed=0):
    return noise(n, dim_x, seed=2 * seed + 1), noise(n, dim_y or dim_x, seed=2 * seed + 2)


def pair(rho):
    return torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)


def dense(dim):
    """Covariance of `dim + dim` standard normals, every two of them correlated by 0.5."""
    return 0.5 * torch.ones(2 * dim, 2 * dim, dtype=torch.float64) + 0.5 * torch.eye(2 * dim, dtype=torch.float64)


def sparse(dim):
    """Two pairs of coordinates correlated by 0.8, all others independent."""
    covariance = torch.eye(2 * dim, dtype=torch.float64)
    for i in (0, 1):
        covariance[i, dim + i] = covariance[dim + i, i] = 0.8
    return covariance


def closed_form(covariance, dim_x):
    parts = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    x, y, both = (float(torch.linalg.slogdet(part).logabsdet) for part in parts)
    return 0.5 * (x + y - both)


def normal(covariance, dim_x, n, *batch, seed=0):
    """Draws of a multinormal, split into its two sides."""
    draws = noise(*batch, n, len(covariance), seed=seed) @ torch.linalg.cholesky(covariance).T
    return draws[..., :dim_x], draws[..., dim_x:]


def normal_cdf(x):
    return torch.special.ndtr(x)


def half_cube(x):
    return x.sign() * x.abs() ** 1.5


def additive(width, n, seed=0):
    """A uniform `x`, and `x` with uniform noise of `+-width`; returned with the truth."""
    x = uniform(n, 1, seed=2 * seed)
    y = x + width * (2 * uniform(n, 1, seed=2 * seed + 1) - 1)
    return x, y, width - math.log(2 * width) if width <= 0.5 else 1 / (4 * width)


def student(n, seed=0):
    """Both coordinates of a round bivariate Cauchy distribution (Student, 1 degree of freedom)."""
    both = noise(n, 2, seed=2 * seed) / noise(n, 1, seed=2 * seed + 1).abs()
    return both[:, :1], both[:, 1:]


def swiss_roll(n, seed=0):
    """A bivariate normal whose first side is rolled up in a plane."""
    x, y = normal(pair(0.75), 1, n, seed=seed)
    turn = 1.5 * math.pi * (1 + 2 * normal_cdf(x))
    return torch.cat([turn * turn.cos(), turn * turn.sin()], 1) / 21, y


def two_means(mu, n, seed=0):
    """A fair label, and `N(+mu, 1)` or `N(-mu, 1)` by it."""
    label = (uniform(n, seed=2 * seed) < 0.5).long()
    return noise(n, 1, seed=2 * seed + 1) + mu * (2.0 * label[:, None] - 1), label


def information_of_two_means(mu):
    """By quadrature: the entropy of the mixture less that of its halves."""

    def density(x):
        return 0.5 * (stats.norm.pdf(x, mu) + stats.norm.pdf(x, -mu))

    entropy, _ = integrate.quad(lambda x: -density(x) * np.log(density(x)), -mu - 12, mu + 12)
    return entropy - 0.5 * math.log(2 * math.pi * math.e)


def is_uniform(p, n_shuffles, bins=5):
    """Whether p-values of `n_shuffles` shuffles fall into `bins` equal bins as chance has it (1 in 500 does not)."""
    ranks = np.rint(np.array(p) * (n_shuffles + 1)).astype(int) - 1
    assert (n_shuffles + 1) % bins == 0 and ((ranks >= 0) & (ranks <= n_shuffles)).all()
    counts = np.bincount(ranks * bins // (n_shuffles + 1), minlength=bins)
    return 0.001 < stats.chisquare(counts).pvalue < 0.9999
