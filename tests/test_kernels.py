"""Kernel indices against their definitions, dcor, all n! shuffles, and what chance alone would give."""

import itertools
from functools import partial

import dcor
import numpy as np
import pytest
import torch
from known_answers import independent, noise, normal, pair

from dean_interp import InputError
from dean_interp.information import cka, hsic, nhsic
from dean_interp.information.kernels import gram, median_distance, shuffle_moments, smoother, trace_of_pairings

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = {
    f"{index.__name__}, {kernel}, {'debiased' if debiased else 'biased'}": partial(
        index, kernel=kernel, debiased=debiased
    )
    for index in (hsic, cka)
    for kernel in ("linear", "rbf")
    for debiased in (True, False)
}
every_form = pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in FORMS.items()])
and_nhsic = pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in FORMS.items()] + [nhsic])
both_kernels = pytest.mark.parametrize("kernel", ["linear", "rbf"])


def dependent(n, dim_x, dim_y, seed=0):
    x, y = independent(n, dim_x, dim_y, seed)
    return x, y + x[:, :1]


def slow_gram(x, kernel):
    """Entry by entry; the bandwidth is the median distance between two different examples."""
    rows = x.numpy()
    if kernel == "linear":
        return np.array([[one @ other for other in rows] for one in rows])
    distances = np.array([[np.linalg.norm(one - other) for other in rows] for one in rows])
    width = np.median(distances[np.triu_indices(len(rows), 1)])
    return np.exp(-(distances**2) / (2 * width**2))


def one_sided_nhsic(x, y, sigma=50.0, eps=1e-5):
    """`hsic_normalized_cca` of TracingLLM, after the HSIC bottleneck (Ma et al. 2020): centred on one side alone."""

    def smoothed(side):
        n, dim = side.shape
        side = (side - side.mean(0)) / side.std(0, ddof=1)
        squares = (side**2).sum(1)
        distances = np.abs(squares[:, None] - 2 * side @ side.T + squares)
        one_sided = np.exp(-distances / (2 * sigma**2 * dim)) @ (np.eye(n) - np.ones((n, n)) / n)
        return one_sided @ np.linalg.inv(one_sided + eps * n * np.eye(n))

    return float((smoothed(x.numpy()) * smoothed(y.numpy()).T).sum())


# Definitions


@pytest.mark.parametrize(("dim_x", "dim_y"), [(1, 1), (3, 2), (40, 33)])
@both_kernels
def test_hsic_is_its_definition_entry_by_entry(kernel, dim_x, dim_y):
    n = 12
    x, y = dependent(n, dim_x, dim_y)
    first, second = (gram(side, kernel).numpy() for side in (x, y))
    centring = np.eye(n) - np.ones((n, n)) / n
    biased = np.trace(first @ centring @ second @ centring) / (n - 1) ** 2
    assert hsic(x, y, kernel=kernel, debiased=False).value == pytest.approx(biased, rel=1e-9)
    assert hsic(x, y, kernel=kernel).value == pytest.approx(song(first, second), rel=1e-8, abs=1e-9)


def song(first, second):
    """Equation 5 of Song et al. 2012, on kernels without their diagonals."""
    first, second = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    n, ones = len(first), np.ones(len(first))
    middle = (ones @ first @ ones) * (ones @ second @ ones) / ((n - 1) * (n - 2))
    rest = 2 / (n - 2) * (ones @ first @ second @ ones)
    return (np.trace(first @ second) + middle - rest) / (n * (n - 3))


@both_kernels
def test_the_debiased_form_is_the_mean_over_all_quadruples_of_examples(kernel):
    x, y = dependent(6, 2, 3)
    k, m = (gram(side, kernel).numpy() for side in (x, y))
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert hsic(x, y, kernel=kernel).value == pytest.approx(np.mean(terms), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 3, 40])
@both_kernels
def test_a_gram_matrix_is_its_kernel_for_every_two_examples(kernel, dim):
    x = noise(11, dim)  # 55 pairs: the median is one of their distances
    expected = slow_gram(x - x.mean(0), kernel)
    assert gram(x, kernel).numpy() == pytest.approx(expected, abs=1e-12)
    assert gram(x + 5, kernel).numpy() == pytest.approx(expected, abs=1e-10)


@both_kernels
@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_hsic_over_the_root_of_both_sides_hsic_with_themselves(kernel, debiased):
    x, y = dependent(30, 3, 2)
    form = partial(hsic, kernel=kernel, debiased=debiased)
    expected = form(x, y).value / (form(x, x).value * form(y, y).value) ** 0.5
    assert cka(x, y, kernel=kernel, debiased=debiased).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "dim_x", "dim_y"), [(30, 1, 1), (60, 4, 7), (50, 120, 80)])
def test_both_forms_of_nhsic_are_equal(n, dim_x, dim_y):
    for seed in range(3):
        x, y = dependent(n, dim_x, dim_y, seed)
        assert nhsic(x * 7 + 3, y).value == pytest.approx(one_sided_nhsic(x * 7 + 3, y), abs=1e-8)
        assert nhsic(x, y, sigma=2.0, eps=1e-3).value == pytest.approx(one_sided_nhsic(x, y, 2.0, 1e-3), abs=1e-8)


def test_the_smoother_of_nhsic_counts_directions_that_outweigh_eps():
    plane = noise(100, 2) @ noise(2, 9, seed=1)
    sizes = torch.linalg.eigvalsh(smoother(plane, eps=1e-7))
    assert sizes[-2:].min() > 0.95 and sizes[:-2].max() < 0.5 and sizes.min() > -1e-9


# Other people's code


@pytest.mark.filterwarnings("ignore:Distance covariance is not guaranteed to characterize independence:UserWarning")
@pytest.mark.parametrize(("n", "dim_x", "dim_y"), [(20, 1, 1), (30, 3, 2), (25, 60, 40)])
def test_linear_forms_agree_with_dcor(n, dim_x, dim_y):
    """Distance covariance with squared distances is HSIC with linear kernels (Sejdinovic et al. 2013), times 4."""
    for seed in range(3):
        x, y = dependent(n, dim_x, dim_y, seed)
        both = x.numpy(), y.numpy()
        covariance = dcor.u_distance_covariance_sqr(*both, exponent=2) / 4
        assert hsic(x, y).value == pytest.approx(covariance, rel=1e-9, abs=1e-9)
        covariance = dcor.distance_covariance_sqr(*both, exponent=2) / 4 * n**2 / (n - 1) ** 2
        assert hsic(x, y, debiased=False).value == pytest.approx(covariance, rel=1e-9, abs=1e-9)
        correlation = dcor.u_distance_correlation_sqr(*both, exponent=2)
        assert cka(x, y).value == pytest.approx(correlation, abs=1e-9)
        correlation = dcor.distance_correlation_sqr(*both, exponent=2)
        assert cka(x, y, debiased=False).value == pytest.approx(correlation, abs=1e-9)


# Shuffles


@and_nhsic
@pytest.mark.parametrize("n", [4, 6])
def test_mean_and_spread_of_the_null_are_those_of_all_shuffles(form, n):
    x, y = dependent(n, 2, 3)
    values = [form(x, y[list(order)]).value for order in itertools.permutations(range(n))]
    estimate = form(x, y)
    assert estimate.null_mean == pytest.approx(np.mean(values), abs=1e-12 + 1e-9 * np.abs(values).max())
    assert estimate.null_sd == pytest.approx(np.std(values), rel=1e-7)
    assert estimate.z == pytest.approx((estimate.value - np.mean(values)) / np.std(values), abs=1e-6)


@pytest.mark.parametrize("n", [3, 130, 300])
def test_a_trace_of_pairings_is_that_of_the_permuted_matrix(n):
    first, second = (side @ side.T for side in independent(n, 3))
    pairings = torch.stack([torch.tensor(np.random.default_rng(i).permutation(n)) for i in range(3)])
    by_hand = [float(torch.trace(first @ second[order][:, order])) for order in pairings]
    assert trace_of_pairings(first, second, pairings).tolist() == pytest.approx(by_hand, rel=1e-10)


def test_moments_of_shuffles_are_never_negative_nor_nan():
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    assert shuffle_moments(nothing, nothing) == (0, 0)


@and_nhsic
@pytest.mark.parametrize(("n", "dim"), [(500, 2), (200, 500)])
def test_independent_sides_stand_at_the_mean_of_their_null(form, n, dim):
    estimates = [form(*independent(n, dim, seed=seed)) for seed in range(50)]
    z = np.array([estimate.z for estimate in estimates])
    assert abs(z.mean()) < 3 / 50**0.5 and 0.6 < z.std() < 1.5


@pytest.mark.parametrize(("n", "dim"), [(500, 2), (200, 500)])
def test_independent_sides_give_zero_on_average_in_the_debiased_forms_and_above_its_null_in_nhsic(n, dim):
    draws = [independent(n, dim, seed=seed) for seed in range(50)]
    for kernel in ("linear", "rbf"):
        assert np.mean([cka(*draw, kernel=kernel).value for draw in draws]) == pytest.approx(0, abs=0.03)
    excess = [estimate.value - estimate.null_mean for estimate in (nhsic(*draw) for draw in draws)]
    assert np.mean(excess) == pytest.approx(0, abs=0.03)


def test_the_biased_form_nears_one_and_nhsic_is_large_where_there_are_more_dimensions_than_examples():
    x, y = independent(60, 2000)
    assert cka(x, y, debiased=False).value > 0.9 and abs(cka(x, y).value) < 0.1
    assert nhsic(x, y).value > 1 and abs(nhsic(x, y).z) < 4


# What they see, and what leaves them as they are


@and_nhsic
def test_a_planted_dependence_stands_far_above_the_null(form):
    assert form(*dependent(200, 1, 2)).z > 8


def test_a_linear_kernel_is_blind_to_dependence_without_correlation_and_rbf_is_not():
    x = noise(300, 1)
    y = x.square()
    assert cka(x, y).value < 0.1 < 0.2 < cka(x, y, kernel="rbf").value


@both_kernels
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dim", [1, 40])
def test_cka_of_a_side_with_itself_is_one(kernel, debiased, dim):
    x = noise(30, dim)
    assert cka(x, x, kernel=kernel, debiased=debiased).value == pytest.approx(1, abs=1e-12)


@every_form
def test_rotation_and_shift_change_nothing(form):
    x, y = dependent(60, 4, 3)
    expected = pytest.approx(form(x, y).value, abs=1e-10)
    turn = torch.linalg.qr(noise(4, 4, seed=9)).Q
    assert form(x @ turn + 7, y - 3).value == expected
    scaled = form(x * 5, y).value
    if form.func is cka or form.keywords["kernel"] == "rbf":
        assert scaled == expected
    else:
        assert scaled == pytest.approx(25 * form(x, y).value, rel=1e-9)


def test_nhsic_does_not_depend_on_scale_shift_or_order_of_columns_but_on_rotation():
    x, y = dependent(60, 4, 3)
    x[:, 1] += 2 * x[:, 0]
    scale = torch.tensor([1e-3, 1.0, -7.0, 1e4], dtype=torch.float64)
    expected = nhsic(x, y).value
    assert nhsic((x * scale + 5)[:, [2, 0, 3, 1]], y).value == pytest.approx(expected, abs=1e-9)
    turn = torch.linalg.qr(noise(4, 4, seed=9)).Q
    assert abs(nhsic(x @ turn, y).value - expected) > 1e-4


@and_nhsic
def test_it_is_symmetric_and_blind_to_the_order_of_examples(form):
    x, y = dependent(60, 4, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    expected = pytest.approx(form(x, y).value, rel=1e-9)
    assert form(y, x).value == expected and form(x[order], y[order]).value == expected


def test_hsic_of_independent_blocks_adds():
    (x, y), (more_x, more_y) = (normal(pair(0.75), 1, 1500, seed=seed) for seed in (1, 2))
    together = hsic(torch.cat([x, more_x], 1), torch.cat([y, more_y], 1)).value
    assert together == pytest.approx(hsic(x, y).value + hsic(more_x, more_y).value, abs=0.05)
    assert together == pytest.approx(2 * 0.75**2, abs=0.15)


# Limits


def test_where_most_examples_of_a_side_coincide_the_bandwidth_is_the_mean_distance_and_flagged():
    x, y = dependent(60, 2, 2)
    x[:50] = x[0]
    distances = torch.cdist(x, x)[torch.triu(torch.ones(60, 60), 1) > 0]
    assert median_distance(x) == pytest.approx(float(distances.mean()), rel=1e-9)
    assert cka(x, y, kernel="rbf").flags == ("the median distance of a side is zero",)
    assert cka(x, y).flags == ()


def test_options_are_refused_with_what_is_allowed(untyped):
    x, y = independent(10, 1)
    with pytest.raises(InputError, match=r"kernel must be one of \('linear', 'rbf'\), got 'cosine'"):
        hsic(x, y, kernel="cosine")
    with pytest.raises(InputError, match=r"sigma and eps must be positive, got 0\.0 and 1e-05"):
        nhsic(x, y, sigma=0.0)
    with pytest.raises(InputError, match=r"sigma and eps must be positive, got 50\.0 and nan"):
        nhsic(x, y, eps=float("nan"))
