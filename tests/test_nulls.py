"""Shuffled pairings, halves of the examples, and ranks among controls: what each says when there is nothing to find."""

import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import independent, is_uniform, noise
from scipy import stats

from dean_interp import InputError
from dean_interp.information import cka, copula_mi, gaussian_mi, ksg_mi, nhsic, shuffle_test
from dean_interp.information.nulls import (
    fewest_in_half,
    frozen_core,
    half_samples,
    largest_fall,
    within_group_permutations,
)
from dean_interp.statistics import rank_p_value

pytestmark = pytest.mark.usefixtures("one_thread")
seeded = settings(max_examples=20)
seeds = st.integers(0, 2**32)
PUBLIC = {
    "gaussian_mi": gaussian_mi,
    "copula_mi": copula_mi,
    "ksg_mi": partial(ksg_mi, k=5, scaling="ranks"),
    "cka": cka,
    "rbf_cka": partial(cka, kernel="rbf"),
    "nhsic": nhsic,
}
every_estimator = pytest.mark.parametrize("estimator", list(PUBLIC))
GROUPS = ("fairness",) * 3 + ("alone",) + ("privacy", "fairness") * 2 + ("privacy",) * 5


def dependent(n, dim_x=1, dim_y=1, seed=0):
    x, y = independent(n, dim_x, dim_y, seed)
    return x, 0.5 * y + x[:, :1]


def by_topic(n, seed=0):
    """Two sides that depend on each other through their topic alone, of which they show the sign."""
    groups = ["fairness"] * (n // 2) + ["privacy"] * (n - n // 2)
    topic = torch.tensor([1.0 if name == "fairness" else -1.0 for name in groups], dtype=torch.float64)[:, None]
    x, y = independent(n, 2, seed=seed)
    return 2 * topic + x, 2 * topic + y, groups


# The shuffle test


@every_estimator
def test_it_is_the_estimator_beside_the_estimator_on_rows_shuffled_by_hand(estimator):
    x, y = dependent(40, 2, 2)
    groups = ["a", "b"] * 20
    test = shuffle_test(x, y, estimator=estimator, groups=groups, n_shuffles=20, seed=3)
    public = PUBLIC[estimator]
    by_hand = [public(x, y[order]).value for order in within_group_permutations(groups, 20, seed=3)]
    assert test.value == pytest.approx(public(x, y).value, rel=1e-9)
    assert test.null_mean == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert test.null_sd == pytest.approx(np.std(by_hand), abs=1e-9)
    assert test.p == rank_p_value(test.value, by_hand) and test.n_shuffles == 20
    assert test.excess == test.value - test.null_mean


@every_estimator
def test_a_planted_dependence_has_the_smallest_p_there_is(estimator):
    for seed in range(3):
        test = shuffle_test(*dependent(80, 2, 2, seed), estimator=estimator, n_shuffles=199, seed=seed)
        assert test.p == 1 / 200 and test.excess > 5 * test.null_sd


@every_estimator
def test_independent_sides_give_a_uniform_p_whose_value_stands_at_the_mean_of_its_null(estimator):
    tests = [shuffle_test(*independent(40, 1, 2, i), estimator=estimator, n_shuffles=19, seed=i) for i in range(60)]
    assert is_uniform([test.p for test in tests], 19)
    z = [test.excess / test.null_sd for test in tests]
    assert abs(np.mean(z)) < 4 * np.std(z) / 60**0.5 < 1


@pytest.mark.parametrize(("estimator", "k"), [("gaussian_mi", 5), ("cka", None), ("rbf_cka", None), ("nhsic", None)])
def test_p_is_uniform_also_where_there_are_more_dimensions_than_examples(estimator, k):
    draws = (independent(200, 500, seed=seed) for seed in range(60))
    p = [shuffle_test(*draw, estimator=estimator, k=k, n_shuffles=19, seed=i).p for i, draw in enumerate(draws)]
    assert is_uniform(p, 19)


@every_estimator
def test_what_the_topic_alone_explains_stays_in_the_null_of_shuffles_within_topics(estimator):
    tests = []
    for seed in range(40):
        x, y, groups = by_topic(60, seed)
        assert seed > 2 or shuffle_test(x, y, estimator=estimator, n_shuffles=99).p == 0.01
        tests.append(shuffle_test(x, y, estimator=estimator, groups=groups, n_shuffles=19, seed=seed))
    assert is_uniform([test.p for test in tests], 19, bins=4)
    assert abs(np.mean([test.excess / test.null_sd for test in tests])) < 0.6


def test_a_dependence_within_topics_is_found_by_shuffles_within_topics():
    x, y, groups = by_topic(100)
    y = y + x[:, :1]
    assert shuffle_test(x, y, groups=groups, n_shuffles=99).p == 0.01


def test_correlation_is_seen_by_all_a_square_by_neighbours_and_rbf():
    x = noise(200, 1)
    y = x.square() + 0.3 * noise(200, 1, seed=1)
    p = {name: shuffle_test(x, y, estimator=name, n_shuffles=199).p for name in ("ksg_mi", "rbf_cka", "copula_mi")}
    assert p["ksg_mi"] == p["rbf_cka"] == 1 / 200 < 0.05 < p["copula_mi"]


@pytest.mark.parametrize("estimator", ["cka", "rbf_cka", "nhsic"])
def test_many_shuffles_have_the_moments_that_the_closed_form_gives(estimator):
    x, y = dependent(50, 2, 3)
    test, estimate = shuffle_test(x, y, estimator=estimator, n_shuffles=4000), PUBLIC[estimator](x, y)
    assert test.null_mean == pytest.approx(estimate.null_mean, abs=4 * estimate.null_sd / 4000**0.5)
    assert test.null_sd == pytest.approx(estimate.null_sd, rel=0.1)


def test_k_tests_the_first_principal_components():
    x, y = dependent(50, 30, 40)
    test = shuffle_test(x, y, k=3, n_shuffles=9)
    assert test.value == pytest.approx(gaussian_mi(x, y, k=3).value, abs=1e-9)


def test_the_shuffles_are_the_seeds():
    x, y = independent(40, 2)
    one, same, other = (shuffle_test(x, y, n_shuffles=49, seed=seed) for seed in (0, 0, 1))
    assert one == same != other and one.value == other.value


def test_a_constant_side_has_p_one_and_is_flagged():
    test = shuffle_test(torch.ones(40, 2), noise(40, 2), n_shuffles=99)
    assert (test.value, test.null_mean, test.null_sd, test.p, test.flags) == (0, 0, 0, 1, ("constant side",))


def test_groups_and_estimators_that_are_not_there_are_refused(untyped):
    x, y = independent(40, 2)
    with pytest.raises(InputError, match="groups must have one entry an example, got 39 for 40"):
        shuffle_test(x, y, groups=["a"] * 39)
    with pytest.raises(InputError, match=r"estimator must be one of \('gaussian_mi', .*\), got 'pearson'"):
        shuffle_test(x, y, estimator="pearson")


@every_estimator
def test_a_core_takes_pairings_as_rows_paired_by_hand(estimator):
    x, y = dependent(30, 2, 2)
    core, unmoved = frozen_core(estimator, x, y), torch.arange(30)[None]
    pairings = within_group_permutations(["one"] * 30, 5, seed=0)
    by_hand = [float(core(x, y[order], unmoved)) for order in pairings]
    assert core(x, y, pairings).tolist() == pytest.approx(by_hand, rel=1e-9)
    assert float(core(x, y, unmoved)) == pytest.approx(PUBLIC[estimator](x, y).value, rel=1e-9)


@pytest.mark.parametrize("estimator", ["rbf_cka", "nhsic"])
def test_scales_and_bandwidths_stay_those_of_the_sides_that_froze_them(estimator):
    x, y = dependent(30, 2, 2)
    core, unmoved = frozen_core(estimator, x, y), torch.arange(30)[None]
    assert float(core(x / 9, y, unmoved)) != pytest.approx(float(core(x, y, unmoved)), rel=0.01)
    assert float(frozen_core(estimator, x / 9, y)(x / 9, y, unmoved)) == pytest.approx(
        float(core(x, y, unmoved)), rel=1e-6
    )


# How often it errs, and how long it takes


@pytest.mark.long
@pytest.mark.parametrize("grouped", [False, True])
@every_estimator
def test_in_500_null_draws_p_is_uniform_and_errs_as_often_as_it_says(estimator, grouped):
    p = []
    for seed in range(500):
        x, y, groups = by_topic(64, seed) if grouped else (*independent(64, 2, seed=seed), None)
        p.append(shuffle_test(x, y, estimator=estimator, groups=groups, n_shuffles=99, seed=seed).p)
    assert is_uniform(p, 99, bins=20)
    assert stats.kstest(np.array(p) - 0.005, "uniform").pvalue > 0.001
    for level in (0.01, 0.05, 0.1):
        assert stats.binomtest(sum(value <= level + 1e-9 for value in p), 500, level).pvalue > 0.001


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize(("estimator", "k"), [("nhsic", None), ("cka", None), ("gaussian_mi", 10)])
def test_999_shuffles_of_2000_examples_in_2000_dimensions_take_less_than_three_minutes(estimator, k):
    x, y = independent(2000, 2000)
    torch.set_num_threads(2)
    begun = np.array([time.perf_counter(), time.process_time()])
    test = shuffle_test(x, y + 0.3 * x, estimator=estimator, k=k)
    taken = np.array([time.perf_counter(), time.process_time()]) - begun
    torch.set_num_threads(1)
    assert taken.min() < 180, "by the clock or, where others use the machine too, by the processor's time"
    assert test.n_shuffles == 999 and (k or test.p == 0.001)


# Shuffles within groups


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


def test_a_block_moves_as_one_and_in_every_order_of_its_own():
    groups = [name for name in ("a", "b", "a", "b") for _ in range(2)]
    shuffles = within_group_permutations(groups, 6400, seed=0, block=2)
    prompts = shuffles.reshape(-1, 4, 2) // 2
    assert torch.equal(prompts[..., 0], prompts[..., 1]), "answers of one prompt stay together"
    assert all([groups[i] for i in shuffle] == groups for shuffle in shuffles[:50].tolist())
    _, counts = torch.unique(shuffles, dim=0, return_counts=True)
    assert len(counts) == 2 * 2 * 2**4
    assert 0.001 < stats.chisquare(counts.numpy()).pvalue < 0.999


# Halves of the examples


def test_a_half_holds_half_of_every_group_in_whole_clusters_without_repeats():
    clusters = [f"prompt {i // 3}" for i in range(90)]
    groups = ["fairness"] * 60 + ["privacy"] * 30
    halves = list(half_samples(clusters, groups, 20, seed=0))
    assert len(halves) == 20
    for rows, factor in halves:
        taken = rows.tolist()
        assert taken == sorted(set(taken)) and factor == pytest.approx(1)
        assert sum(row < 60 for row in taken) == 30 and len(taken) == 45
        assert {clusters[row] for row in taken}.isdisjoint(clusters[row] for row in set(range(90)) - set(taken))


def test_every_row_is_in_half_of_the_halves_and_they_are_the_seeds():
    halves, same, other = (half_samples(range(20), ["one"] * 20, 2000, seed=seed) for seed in (0, 0, 1))
    counts = torch.bincount(torch.cat([rows for rows, _ in halves]), minlength=20)
    assert counts.tolist() == pytest.approx([1000] * 20, abs=100)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(halves, same, strict=True))
    assert not all(torch.equal(one[0], two[0]) for one, two in zip(halves, other, strict=True))


@pytest.mark.parametrize(("n", "per_cluster"), [(200, 1), (201, 1), (240, 4), (7, 1)])
def test_the_spread_over_halves_is_the_standard_error_of_a_mean(n, per_cluster):
    clusters = np.arange(n) // per_cluster
    values = np.random.default_rng(0).normal(size=n)[clusters] if per_cluster > 1 else noise(n).numpy()
    halves = half_samples(clusters.tolist(), ["one"] * n, 2000, seed=0)
    deviations = np.array([factor * (values[rows.numpy()].mean() - values.mean()) for rows, factor in halves])
    exact = values[::per_cluster].std(ddof=1) / (n // per_cluster) ** 0.5
    assert np.sqrt(np.mean(deviations**2)) == pytest.approx(exact, rel=0.08)


def test_rows_of_a_group_that_is_one_cluster_are_drawn_one_by_one():
    halves = half_samples(["only"] * 10, ["one"] * 10, 50, seed=0)
    assert {len(rows) for rows, _ in halves} == {5}
    assert len({tuple(rows.tolist()) for rows, _ in halves}) > 30


@pytest.mark.parametrize("sizes", [(2, 2, 36), (1, 19), (10, *[1] * 10), (12, 6, 6), (5, 5), (7, 2, 2, 2)])
def test_no_half_is_less_than_a_half_or_has_fewer_clusters_than_promised(sizes):
    """One cluster that held most rows left a handful of others as a `half`, of which nothing can be estimated."""
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    is_in_one = 2 * max(sizes) > sum(sizes)
    for rows, _ in half_samples(clusters, ["one"] * len(clusters), 200, seed=0):
        assert sum(sizes) / 2 <= len(rows) < sum(sizes)
        n_clusters = len({clusters[row] for row in rows})
        assert is_in_one or n_clusters >= fewest_in_half(clusters)


def test_where_one_cluster_holds_most_rows_the_answers_to_a_prompt_stay_together():
    clusters = ["large"] * 16 + ["small"] * 4
    for rows, factor in half_samples(clusters, ["one"] * 20, 50, seed=0, block=2):
        taken = set(rows.tolist())
        assert len(taken) == 10 and factor == 1
        assert {row ^ 1 for row in taken} == taken


@pytest.mark.parametrize(("clusters", "fewest"), [("aabbcc", 2), ("aabb", 1), ("aaabc", 1), ("abcde", 3), ("", 0)])
def test_the_fewest_clusters_of_a_half_are_the_largest(clusters, fewest):
    assert fewest_in_half(clusters) == fewest


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
