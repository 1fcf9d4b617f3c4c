"""Estimators against closed forms, identities, and what chance alone would give. All in nats and float64."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dean_interp.information.estimators import cross_mi, gaussian_mi, principal_components, whitened
from dean_interp.information.nulls import largest_fall, shuffled_gaussian_mi, within_group_permutations

seeded = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)
ENDLESS = 10**9
"""So many examples that no bias is left to correct."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small only wait for a second thread, and long where the machine is busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(dim):
    """Covariance of `dim + dim` standard normals, every two of them correlated by 0.5."""
    return 0.5 * torch.ones(2 * dim, 2 * dim, dtype=torch.float64) + 0.5 * torch.eye(2 * dim, dtype=torch.float64)


def closed_form(covariance, dim_x):
    parts = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    x, y, both = (float(torch.linalg.slogdet(part).logabsdet) for part in parts)
    return 0.5 * (x + y - both)


def normal(covariance, dim_x, n, *batch, seed=0):
    """Draws of a multinormal, split into its two sides."""
    draws = noise(*batch, n, len(covariance), seed=seed) @ torch.linalg.cholesky(covariance).T
    return draws[..., :dim_x], draws[..., dim_x:]


def pair(rho):
    return torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)


# Known answers


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_of_a_bivariate_normal_matches_the_closed_form(seed):
    assert closed_form(pair(0.75), 1) == pytest.approx(0.41334, abs=1e-5)
    assert float(gaussian_mi(*normal(pair(0.75), 1, 1000, seed=seed))) == pytest.approx(0.41334, abs=0.10)


@pytest.mark.parametrize(
    ("dim", "n", "true", "tolerance"), [(2, 1000, 0.29389, 0.1), (5, 1000, 0.59281, 0.12), (25, 2000, 1.29218, 0.2)]
)
def test_the_estimate_of_dense_multinormals_matches_the_closed_form(dim, n, true, tolerance):
    assert closed_form(dense(dim), dim) == pytest.approx(true, abs=1e-5)
    for seed in range(3):
        assert float(gaussian_mi(*normal(dense(dim), dim, n, seed=seed))) == pytest.approx(true, abs=tolerance)


@pytest.mark.parametrize(("dim", "tolerance"), [(3, 0.12), (5, 0.12), (25, 0.2)])
def test_the_estimate_of_sparse_multinormals_matches_the_closed_form(dim, tolerance):
    """Two pairs of coordinates correlated by 0.8, all others independent."""
    covariance = torch.eye(2 * dim, dtype=torch.float64)
    for i in (0, 1):
        covariance[i, dim + i] = covariance[dim + i, i] = 0.8
    assert closed_form(covariance, dim) == pytest.approx(1.02165, abs=1e-5)
    assert float(gaussian_mi(*normal(covariance, dim, 2000))) == pytest.approx(1.02165, abs=tolerance)


@pytest.mark.parametrize(("dim_x", "dim_y", "n"), [(1, 1, 12), (3, 3, 30), (5, 5, 80), (2, 7, 40), (8, 8, 60)])
def test_independent_sides_of_few_examples_give_zero_on_average_where_the_plug_in_does_not(dim_x, dim_y, n):
    x, y = noise(200, n, dim_x, seed=1), noise(200, n, dim_y, seed=2)
    assert float(gaussian_mi(x, y).mean()) == pytest.approx(0, abs=0.03)
    corrected_by = float(cross_mi(torch.full((dim_x, dim_y), 1e-12, dtype=torch.float64), n))
    assert -corrected_by > 0.03, "the plug-in's bias is what must be removed"


@pytest.mark.parametrize(("dim", "n"), [(1, 4), (2, 6), (3, 8)])
def test_the_correction_is_exact_down_to_the_fewest_examples_allowed(dim, n):
    estimates = gaussian_mi(noise(4000, n, dim, seed=1), noise(4000, n, dim, seed=2))
    assert float(estimates.mean()) == pytest.approx(0, abs=3 * float(estimates.std()) / 4000**0.5)


def test_500_independent_pairs_in_two_dimensions_give_zero():
    assert float(gaussian_mi(noise(50, 500, 2, seed=1), noise(50, 500, 2, seed=2)).mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_dependent_sides_of_few_examples_are_unbiased_too(dim):
    covariance = pair(0.75) if dim == 1 else dense(dim)
    estimates = gaussian_mi(*normal(covariance, dim, 8 * 2 * dim, 400))
    error = float(estimates.std()) / 400**0.5
    assert float(estimates.mean()) == pytest.approx(closed_form(covariance, dim), abs=3 * error)


def test_estimates_are_not_clipped_at_zero():
    assert (gaussian_mi(noise(50, 60, 2, seed=1), noise(50, 60, 2, seed=2)) < 0).sum() > 10


def test_dependence_without_correlation_is_not_seen_as_documented():
    x = noise(5000, 1)
    assert float(gaussian_mi(x, x.square() - 1)) < 0.1


# Identities


@seeded
@given(seed=seeds)
def test_it_is_invariant_to_rotation_scale_and_shift_of_either_side(seed):
    x, y = normal(dense(4), 4, 60)
    turn = torch.linalg.qr(noise(4, 4, seed=seed)).Q
    scales = 10 ** (2 * noise(4, seed=seed + 1).clamp(-1, 1))
    expected = float(gaussian_mi(x, y))
    assert float(gaussian_mi(x @ turn, y)) == pytest.approx(expected, abs=1e-9)
    assert float(gaussian_mi(x * scales @ turn + 7, y @ turn * scales - 3)) == pytest.approx(expected, abs=1e-9)


@seeded
@given(seed=seeds, dim_x=st.integers(1, 5), dim_y=st.integers(1, 5))
def test_it_is_symmetric_and_blind_to_the_order_of_examples(seed, dim_x, dim_y):
    x, y = noise(40, dim_x, seed=seed), noise(40, dim_y, seed=seed + 1)
    x = x + y[:, :1]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert float(gaussian_mi(y, x)) == pytest.approx(float(gaussian_mi(x, y)), abs=1e-9)
    assert float(gaussian_mi(x[order], y[order])) == pytest.approx(float(gaussian_mi(x, y)), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.5, -1024.0])
def test_a_constant_side_informs_of_nothing(value):
    constant = torch.full((100, 3), value, dtype=torch.float64)
    assert float(gaussian_mi(constant, noise(100, 2))) == 0 == float(gaussian_mi(noise(100, 2), constant))


@pytest.mark.parametrize("value", [1 / 3, 1000 / 7])
def test_a_constant_side_informs_of_nothing_whatever_its_value(value):
    constant = torch.full((97, 3), value, dtype=torch.float64)
    assert float(gaussian_mi(constant, noise(97, 2))) == 0


@pytest.mark.parametrize("kind", ["constant", "repeated"])
def test_a_direction_without_variance_adds_no_bias(kind):
    x, y = noise(200, 60, 3, seed=1), noise(200, 60, 3, seed=2)
    more = torch.cat([x, torch.zeros_like(x) if kind == "constant" else x], -1)
    assert float((gaussian_mi(more, y) - gaussian_mi(x, y)).mean()) == pytest.approx(0, abs=0.01)


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


def test_independent_blocks_of_data_add():
    (x, y), (more_x, more_y) = normal(pair(0.75), 1, 4000, seed=1), normal(dense(3), 3, 4000, seed=2)
    together = float(gaussian_mi(torch.cat([x, more_x], 1), torch.cat([y, more_y], 1)))
    assert together == pytest.approx(closed_form(pair(0.75), 1) + closed_form(dense(3), 3), abs=0.06)


def test_many_strongly_dependent_blocks_add():
    cross = 0.95 * torch.eye(25, dtype=torch.float64)
    assert float(cross_mi(cross, ENDLESS)) == pytest.approx(-12.5 * math.log(1 - 0.95**2), abs=1e-4)


def test_a_side_against_itself_is_large_and_finite():
    x = noise(100, 3)
    assert 10 < float(gaussian_mi(x, x)) < math.inf


@pytest.mark.parametrize(("dim_x", "dim_y", "n"), [(1, 1, 3), (5, 5, 11), (3, 8, 4)])
def test_too_few_examples_are_refused_with_how_many_are_needed(dim_x, dim_y, n):
    needed = dim_x + dim_y + 1
    message = f"{dim_x} + {dim_y} dimensions need more than {needed} examples, got {n}"
    with pytest.raises(ValueError, match=re.escape(message)):
        gaussian_mi(noise(n, dim_x), noise(n, dim_y))
    assert math.isfinite(gaussian_mi(noise(needed + 1, dim_x), noise(needed + 1, dim_y, seed=1)))


def test_a_batch_is_its_members_one_by_one():
    x, y = normal(dense(3), 3, 40, 2, 5)
    batch = gaussian_mi(x, y)
    assert batch.shape == (2, 5)
    for i in range(2):
        for j in range(5):
            assert float(batch[i, j]) == pytest.approx(float(gaussian_mi(x[i, j], y[i, j])), abs=1e-12)


def test_a_batch_may_hold_a_constant_member():
    x, y = noise(2, 40, 3, seed=1), noise(2, 40, 3, seed=2)
    x[0] = 1
    batch = gaussian_mi(x, y)
    assert float(batch[0]) == 0 and float(batch[1]) == pytest.approx(float(gaussian_mi(x[1], y[1])), abs=1e-12)


def test_single_precision_activations_are_estimated_in_double():
    x, y = normal(dense(3), 3, 60)
    estimate = gaussian_mi(x.float(), y.float())
    assert estimate.dtype == torch.float64 and float(estimate) == pytest.approx(float(gaussian_mi(x, y)), abs=1e-5)


# Whitening and principal components


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


def test_principal_components_are_the_leading_eigenvectors_and_their_share_of_the_variance():
    x = noise(80, 5) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)) + 9
    size, directions = np.linalg.eigh(np.cov(x.numpy().T))
    for k in (1, 2, 5):
        ours, kept = principal_components(x, k)
        assert kept == pytest.approx(size[::-1][:k].sum() / size.sum(), abs=1e-12)
        overlap = np.abs(ours.numpy().T @ directions[:, ::-1][:, :k])
        assert overlap == pytest.approx(np.eye(k), abs=1e-9)


def test_principal_components_of_a_plane_keep_everything_with_two_and_nothing_of_a_constant():
    plane = noise(60, 2) @ noise(2, 7, seed=1)
    directions, kept = principal_components(plane, 2)
    centred = plane - plane.mean(0)
    assert kept == pytest.approx(1, abs=1e-12)
    assert torch.allclose(centred @ directions @ directions.T, centred, atol=1e-10)
    assert principal_components(torch.ones(60, 7, dtype=torch.float64), 2)[1] == 0


# Nulls

GROUPS = ("fairness",) * 3 + ("alone",) + ("privacy", "fairness") * 2 + ("privacy",) * 5


def test_shuffled_estimates_are_those_of_rows_permuted_by_hand():
    x, y = normal(dense(3), 3, len(GROUPS))
    shuffles = within_group_permutations(GROUPS, 20, seed=0)
    by_hand = [float(gaussian_mi(x, y[shuffle])) for shuffle in shuffles]
    assert shuffled_gaussian_mi(whitened(x), whitened(y), shuffles).tolist() == pytest.approx(by_hand, abs=1e-10)


def test_a_shuffle_that_moves_nothing_is_the_estimate_itself():
    x, y = normal(dense(2), 2, 30)
    (unmoved,) = shuffled_gaussian_mi(whitened(x), whitened(y), torch.arange(30)[None])
    assert float(unmoved) == pytest.approx(float(gaussian_mi(x, y)), abs=1e-12)


def test_shuffled_pairings_carry_no_information_on_average():
    x, y = normal(pair(0.9), 1, 100)
    shuffles = within_group_permutations(["one"] * 100, 500, seed=0)
    assert float(shuffled_gaussian_mi(whitened(x), whitened(y), shuffles).mean()) == pytest.approx(0, abs=0.005)


@seeded
@given(groups=st.lists(st.sampled_from(["fairness", "privacy", "general"]), min_size=1, max_size=20), seed=seeds)
def test_a_shuffle_moves_every_example_once_and_never_out_of_its_group(groups, seed):
    shuffles = within_group_permutations(groups, 10, seed=seed)
    assert shuffles.shape == (10, len(groups))
    for shuffle in shuffles.tolist():
        assert sorted(shuffle) == list(range(len(groups)))
        assert [groups[i] for i in shuffle] == groups


def test_shuffles_are_the_seeds():
    one, same, other = (within_group_permutations(GROUPS, 30, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_all_joint_orders_of_two_groups_are_equally_likely():
    shuffles = within_group_permutations(["a", "b", "a", "b", "a", "b"], 7200, seed=0)
    _, counts = torch.unique(shuffles, dim=0, return_counts=True)
    assert len(counts) == 36
    assert 0.001 < stats.chisquare(counts.numpy()).pvalue < 0.999


# The largest fall over layers


def changes(n_states, n_layers=6, seed=0):
    """Correlated over layers, and of another size in each."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(n_states, 1)) + generator.normal(size=(n_states, n_layers))
    return (values * 10.0 ** np.arange(n_layers) - 3).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_each_of_twenty_exchangeable_states_gets_each_p_exactly_once(seed):
    states = changes(20, seed=seed)
    p = [largest_fall(states[i], states[:i] + states[i + 1 :])[1] for i in range(20)]
    assert sorted(p) == pytest.approx([(i + 1) / 20 for i in range(20)])


def test_p_is_uniform_under_exchangeable_changes():
    p = [largest_fall(states[0], states[1:])[1] for states in (changes(20, seed=seed) for seed in range(1000))]
    counts = np.bincount(np.rint(np.array(p) * 20).astype(int), minlength=21)[1:]
    assert 0.001 < stats.chisquare(counts).pvalue < 0.999


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_planted_fall_is_found_in_its_layer_with_the_smallest_p_there_is(layer):
    states = np.array(changes(100))
    states[0, layer] = states[1:, layer].min() - 8 * states[1:, layer].std()
    assert largest_fall(states[0].tolist(), states[1:].tolist()) == (layer, 0.01)


def test_a_rise_is_no_fall():
    states = np.array(changes(100))
    states[0] = states[1:].max(axis=0) + 1
    assert largest_fall(states[0].tolist(), states[1:].tolist())[1] == 1


def test_neither_the_units_nor_the_level_of_a_layer_matter():
    states = np.array(changes(30))
    moved = states * np.array([1, 1e-3, 5, 1e4, 2, 0.1]) + np.arange(6)
    assert largest_fall(states[0].tolist(), states[1:].tolist()) == largest_fall(moved[0].tolist(), moved[1:].tolist())


def beside_a_still_layer(values):
    """The layer and p with and without one more layer, the first, whose changes are `values`."""
    states = np.array(changes(30))
    still = np.insert(states, 0, values, axis=1)
    layer, p = largest_fall(still[0].tolist(), still[1:].tolist())
    return (layer - 1, p), largest_fall(states[0].tolist(), states[1:].tolist())


def test_a_layer_that_nothing_changes_neither_wins_nor_warns():
    with_it, without_it = beside_a_still_layer(0.0)
    assert with_it == without_it


@pytest.mark.parametrize("values", [0.1, [-1e-17] + [0.0] * 29], ids=["equal", "rounding"])
def test_a_layer_that_differs_by_rounding_alone_does_not_win(values):
    with_it, without_it = beside_a_still_layer(values)
    assert with_it == without_it


def test_where_nothing_changes_at_all_p_is_one():
    assert largest_fall([0.0, 0.0], [[0.0, 0.0]] * 9)[1] == 1
