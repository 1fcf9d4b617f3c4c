"""Gaussian and copula estimates against closed forms, identities, and what chance alone would give. All in nats."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import (
    NORMAL,
    closed_form,
    dense,
    half_cube,
    independent,
    noise,
    normal,
    normal_cdf,
    pair,
    sparse,
    student,
    swiss_roll,
)
from scipy import stats

from dean_interp import InputError
from dean_interp.information import copula_mi, gaussian_mi
from dean_interp.information.gaussian import (
    cross_mi,
    gaussian_of_pairings,
    normal_scores,
    principal_components,
    rank,
    whitened,
)

pytestmark = pytest.mark.usefixtures("one_thread")
seeded = settings(max_examples=20)
seeds = st.integers(0, 2**32)
both = pytest.mark.parametrize("estimator", [gaussian_mi, copula_mi])
ENDLESS = 10**9
"""So many examples that no bias is left to correct."""


def estimates(x, y):
    """`gaussian_mi` of every sample of a batch: what hundreds of draws at once need."""
    white_x, white_y = whitened(x), whitened(y)
    cross = white_x.transpose(-1, -2) @ white_y / (x.shape[-2] - 1)
    return cross_mi(cross, x.shape[-2], rank(white_x), rank(white_y))


def plug_in(x, y):
    """From sample covariances, without correction."""
    return closed_form(torch.from_numpy(np.cov(torch.cat([x, y], 1).T.numpy())), x.shape[1])


# Known answers


@both
@pytest.mark.parametrize("map_x", [lambda x: x, normal_cdf, half_cube])
@pytest.mark.parametrize("map_y", [lambda x: x, normal_cdf, half_cube])
def test_the_estimate_of_a_bivariate_normal_matches_the_closed_form_also_through_maps(estimator, map_x, map_y):
    assert closed_form(pair(0.75), 1) == pytest.approx(NORMAL, abs=1e-5)
    for seed in range(5):
        x, y = normal(pair(0.75), 1, 1000, seed=seed)
        assert estimator(map_x(x), map_y(y)).value == pytest.approx(NORMAL, abs=0.10)


@both
@pytest.mark.parametrize(
    ("dim", "n", "true", "tolerance"), [(2, 1000, 0.29389, 0.1), (5, 1000, 0.59281, 0.12), (25, 2000, 1.29218, 0.2)]
)
def test_the_estimate_of_dense_multinormals_matches_the_closed_form(estimator, dim, n, true, tolerance):
    assert closed_form(dense(dim), dim) == pytest.approx(true, abs=1e-5)
    for seed in range(3):
        estimate = estimator(*normal(dense(dim), dim, n, seed=seed))
        assert estimate.value == pytest.approx(true, abs=tolerance) and not estimate.flags


@both
@pytest.mark.parametrize(("dim", "tolerance"), [(3, 0.12), (5, 0.12), (25, 0.2)])
def test_the_estimate_of_sparse_multinormals_matches_the_closed_form(estimator, dim, tolerance):
    assert closed_form(sparse(dim), dim) == pytest.approx(1.02165, abs=1e-5)
    for seed in range(3):
        assert estimator(*normal(sparse(dim), dim, 2000, seed=seed)).value == pytest.approx(1.02165, abs=tolerance)


@pytest.mark.parametrize(("dim_x", "dim_y", "n"), [(1, 1, 12), (3, 3, 30), (5, 5, 80), (2, 7, 40), (8, 8, 60)])
def test_independent_sides_of_few_examples_give_zero_on_average_where_the_plug_in_does_not(dim_x, dim_y, n):
    x, y = noise(200, n, dim_x, seed=1), noise(200, n, dim_y, seed=2)
    assert float(estimates(x, y).mean()) == pytest.approx(0, abs=0.03)
    assert np.mean([plug_in(x[i], y[i]) for i in range(50)]) > 0.03


@pytest.mark.parametrize(("dim", "n"), [(1, 4), (2, 6), (3, 8)])
def test_the_correction_is_exact_down_to_the_fewest_examples_allowed(dim, n):
    drawn = estimates(noise(4000, n, dim, seed=1), noise(4000, n, dim, seed=2))
    assert float(drawn.mean()) == pytest.approx(0, abs=3 * float(drawn.std()) / 4000**0.5)


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_dependent_sides_of_few_examples_are_unbiased_too(dim):
    covariance = pair(0.75) if dim == 1 else dense(dim)
    drawn = estimates(*normal(covariance, dim, 8 * 2 * dim, 400))
    assert float(drawn.mean()) == pytest.approx(closed_form(covariance, dim), abs=3 * float(drawn.std()) / 400**0.5)


@both
@pytest.mark.parametrize(("n", "dim", "k"), [(500, 2, None), (200, 500, 5), (40, 2, None)])
def test_independent_sides_give_zero_on_average(estimator, n, dim, k):
    drawn = [estimator(*independent(n, dim, seed=seed), k=k).value for seed in range(50)]
    assert np.mean(drawn) == pytest.approx(0, abs=0.03)
    assert sum(value < 0 for value in drawn) > 10, "estimates are not clipped at zero"


def test_the_gaussian_does_not_see_a_roll_nor_dependence_without_correlation():
    for seed in range(3):
        assert gaussian_mi(*swiss_roll(1000, seed)).value < NORMAL - 0.1
    x = noise(5000, 1)
    assert gaussian_mi(x, x.square() - 1).value < 0.1


def test_heavy_tails_mislead_the_gaussian_and_leave_the_copula_blind():
    draws = [student(1000, seed) for seed in range(20)]
    assert sum(abs(gaussian_mi(*draw).value - 0.22417) > 0.12 for draw in draws) > 10
    assert all(abs(copula_mi(*draw).value) < 0.05 for draw in draws)


# Identities


@seeded
@given(seed=seeds)
def test_the_gaussian_is_invariant_to_rotation_scale_and_shift_of_either_side(seed):
    x, y = normal(dense(4), 4, 60)
    turn = torch.linalg.qr(noise(4, 4, seed=seed)).Q
    scales = 10 ** (2 * noise(4, seed=seed + 1).clamp(-1, 1))
    expected = gaussian_mi(x, y).value
    assert gaussian_mi(x @ turn, y).value == pytest.approx(expected, abs=1e-9)
    assert gaussian_mi(x * scales @ turn + 7, y @ turn * scales - 3).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("change", [normal_cdf, half_cube, torch.exp, torch.arctan, lambda x: -(x**3)])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_copula_is_the_same_through_every_monotone_map_of_a_column(change, dim):
    x, y = normal(dense(dim), dim, 300)
    mapped = torch.cat([change(x[:, :1]), x[:, 1:]], 1)
    assert copula_mi(mapped, change(y)).value == pytest.approx(copula_mi(x, y).value, abs=1e-9)
    assert gaussian_mi(mapped, change(y)).value != pytest.approx(gaussian_mi(x, y).value, abs=1e-3)


@both
@seeded
@given(seed=seeds, dim_x=st.integers(1, 5), dim_y=st.integers(1, 5))
def test_it_is_symmetric_and_blind_to_the_order_of_examples(estimator, seed, dim_x, dim_y):
    x, y = noise(40, dim_x, seed=seed), noise(40, dim_y, seed=seed + 1)
    x = x + y[:, :1]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    expected = pytest.approx(estimator(x, y).value, abs=1e-9)
    assert estimator(y, x).value == expected
    assert estimator(x[order], y[order]).value == expected


@pytest.mark.parametrize("kind", ["constant", "repeated"])
def test_a_direction_without_variance_adds_no_bias(kind):
    x, y = noise(200, 60, 3, seed=1), noise(200, 60, 3, seed=2)
    more = torch.cat([x, torch.zeros_like(x) if kind == "constant" else x], -1)
    assert float((estimates(more, y) - estimates(x, y)).mean()) == pytest.approx(0, abs=0.01)
    assert gaussian_mi(more[0], y[0]).value == pytest.approx(gaussian_mi(x[0], y[0]).value, abs=1e-9)
    assert copula_mi(more[0], y[0]).value == pytest.approx(copula_mi(x[0], y[0]).value, abs=1e-9)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9, 0.999])
def test_a_cross_covariance_of_one_number_is_minus_half_the_log_of_one_minus_its_square(rho):
    cross = torch.tensor([[rho]], dtype=torch.float64)
    assert float(cross_mi(cross, ENDLESS)) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-7)


@seeded
@given(seed=seeds)
def test_independent_blocks_add(seed):
    one, other = 0.3 * noise(2, 3, seed=seed).clamp(-1, 1), 0.2 * noise(4, 2, seed=seed + 1).clamp(-1, 1)
    together = float(cross_mi(torch.block_diag(one, other), ENDLESS))
    assert together == pytest.approx(float(cross_mi(one, ENDLESS) + cross_mi(other, ENDLESS)), abs=1e-6)


@both
def test_independent_blocks_of_data_add(estimator):
    for seed in range(3):
        (x, y), (more_x, more_y) = normal(pair(0.75), 1, 4000, seed=seed), normal(dense(3), 3, 4000, seed=seed + 50)
        together = estimator(torch.cat([x, more_x], 1), torch.cat([y, more_y], 1)).value
        assert together == pytest.approx(estimator(x, y).value + estimator(more_x, more_y).value, abs=0.02)
        assert together == pytest.approx(closed_form(pair(0.75), 1) + closed_form(dense(3), 3), abs=0.08)


def test_many_strongly_dependent_blocks_add():
    cross = 0.95 * torch.eye(25, dtype=torch.float64)
    assert float(cross_mi(cross, ENDLESS)) == pytest.approx(-12.5 * math.log(1 - 0.95**2), abs=1e-4)


@both
def test_a_side_against_itself_is_large_and_flagged_above_ln_n(estimator):
    x = noise(100, 3)
    estimate = estimator(x, x)
    assert 10 < estimate.value < math.inf
    assert estimate.flags == ("above ln n = 4.61 nats, more than 100 examples can show",)


@both
@pytest.mark.parametrize(("dim_x", "dim_y", "n"), [(1, 1, 3), (5, 5, 11), (3, 8, 4)])
def test_too_few_examples_are_refused_with_how_many_are_needed(estimator, dim_x, dim_y, n):
    needed = dim_x + dim_y + 1
    message = f"{dim_x} + {dim_y} dimensions need more than {needed} examples, got {n}"
    with pytest.raises(InputError, match="at least 4 examples, got 3" if n < 4 else re.escape(message)):
        estimator(noise(n, dim_x), noise(n, dim_y))
    estimate = estimator(noise(needed + 1, dim_x), noise(needed + 1, dim_y, seed=1))
    assert math.isfinite(estimate.value)
    assert f"few examples: {needed + 1} for {dim_x + dim_y} dimensions, {8 * (dim_x + dim_y)} are wanted" in (
        estimate.flags
    )


def test_a_batch_is_its_members_one_by_one():
    x, y = normal(dense(3), 3, 40, 2, 5)
    x[0, 2] = 1  # a constant member beside others
    batch = estimates(x, y)
    assert batch.shape == (2, 5) and float(batch[0, 2]) == 0
    for i in range(2):
        for j in range(5):
            assert float(batch[i, j]) == pytest.approx(gaussian_mi(x[i, j], y[i, j]).value, abs=1e-12)


def test_every_pairing_is_the_estimate_of_rows_paired_by_hand():
    x, y = normal(dense(3), 3, 20)
    pairings = torch.stack(
        [torch.arange(20), *(torch.tensor(np.random.default_rng(i).permutation(20)) for i in (1, 2))]
    )
    by_hand = [gaussian_mi(x, y[pairing]).value for pairing in pairings]
    assert gaussian_of_pairings(x, y, pairings).tolist() == pytest.approx(by_hand, abs=1e-10)


# Whitening, scores and principal components


@seeded
@given(seed=seeds, n=st.integers(8, 30), dim=st.integers(1, 6))
def test_whitened_data_have_mean_zero_identity_covariance_and_the_same_span(seed, n, dim):
    x = noise(n, dim, seed=seed) @ noise(dim, dim, seed=seed + 1) + 5
    white = whitened(x)
    assert torch.allclose(white.mean(0), torch.zeros(dim, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(white.T @ white / (n - 1), torch.eye(dim, dtype=torch.float64), atol=1e-10)
    centred = x - x.mean(0)
    assert torch.allclose(white @ (white.T @ centred) / (n - 1), centred, atol=1e-8)


def test_a_direction_without_variance_stays_zero():
    x = noise(50, 2)
    white = whitened(torch.cat([x, x.sum(1, keepdim=True), torch.ones(50, 1, dtype=torch.float64)], 1))
    covariance = white.T @ white / 49
    assert torch.linalg.eigvalsh(covariance).tolist() == pytest.approx([0, 0, 1, 1], abs=1e-10)
    assert torch.equal(whitened(torch.ones(50, 2, dtype=torch.float64)), torch.zeros(50, 2, dtype=torch.float64))


def test_normal_scores_are_the_quantiles_of_ranks_and_ties_share_theirs():
    x = torch.cat([noise(40, 2), noise(40, 1).round(), torch.ones(40, 1, dtype=torch.float64)], 1)
    by_scipy = stats.norm.ppf((stats.rankdata(x.numpy(), axis=0) - 0.5) / 40)
    assert normal_scores(x).numpy() == pytest.approx(by_scipy, abs=1e-12)
    assert normal_scores(x)[:, 3].tolist() == [0.0] * 40


@pytest.mark.parametrize("dim", [5, 120])
def test_principal_components_are_the_leading_eigenvectors_and_their_share_of_the_variance(dim):
    x = noise(80, dim) @ torch.diag(torch.linspace(5, 0.5, dim, dtype=torch.float64) ** 2) + 9
    size, directions = np.linalg.eigh(np.cov(x.numpy().T))
    for k in (1, 2, 5):
        ours, kept = principal_components(x, k)
        assert kept == pytest.approx(size[::-1][:k].sum() / size.sum(), abs=1e-12)
        overlap = np.abs(ours.numpy().T @ directions[:, ::-1][:, :k])
        assert overlap == pytest.approx(np.eye(k), abs=1e-8)


def test_principal_components_of_a_plane_keep_everything_with_two_and_nothing_of_a_constant():
    plane = noise(60, 2) @ noise(2, 7, seed=1)
    directions, kept = principal_components(plane, 2)
    centred = plane - plane.mean(0)
    assert kept == pytest.approx(1, abs=1e-12)
    assert torch.allclose(centred @ directions @ directions.T, centred, atol=1e-10)
    assert principal_components(torch.ones(60, 7, dtype=torch.float64), 2)[1] == 0


@both
def test_k_estimates_on_the_first_principal_components_of_each_side(estimator):
    x, y = normal(dense(4), 4, 200)
    scale = torch.diag(torch.tensor([9.0, 6.0, 3.0, 1.0], dtype=torch.float64))
    x, y = x @ scale + 3, y @ scale.flip(0)

    def leading(side):
        return side @ torch.linalg.svd(side - side.mean(0), full_matrices=False).Vh[:2].T

    assert estimator(x, y, k=2).value == pytest.approx(estimator(leading(x), leading(y)).value, abs=1e-9)
    assert gaussian_mi(x, y, k=9).value == pytest.approx(gaussian_mi(x, y).value, abs=1e-9)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        estimator(x, y, k=0)
