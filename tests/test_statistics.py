from contextlib import suppress

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from dean_interp import InputError
from dean_interp.statistics import (
    clustered_interval,
    detectable_difference,
    holm,
    proportion,
    rank_p_value,
    share_interval,
    sign_flip_p_value,
)

seeded = settings(max_examples=50)
values_of_some_length = st.lists(st.floats(-100, 100), min_size=2, max_size=30).map(np.array)


@seeded
@given(values=values_of_some_length, confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_with_one_row_a_cluster_it_is_the_one_sample_t_interval(values, confidence):
    assume(np.ptp(values) > 1e-3)  # scipy gives NaN for constant values
    ours = clustered_interval(values, range(len(values)), confidence=confidence)
    theirs = stats.t.interval(confidence, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12) and ours.n_clusters == len(values)


def test_constant_values_have_an_interval_of_no_width():
    interval = clustered_interval(np.full(6, 0.25), "aabbcc")
    assert (interval.mean, interval.low, interval.high, interval.n_clusters) == (0.25, 0.25, 0.25, 3)


def test_two_clusters_by_hand():
    """Deviations sum to -3 and +3 over four rows: the error is sqrt(2 * 18) / 4, times t of one degree."""
    interval = clustered_interval(np.array([1.0, 2.0, 4.0, 5.0]), ["a", "a", "b", "b"])
    half = 12.706204736432095 * 36**0.5 / 4
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half))


@seeded
@given(values=values_of_some_length, data=st.data())
def test_neither_the_order_of_rows_nor_the_names_of_clusters_matter(values, data):
    clusters = data.draw(st.lists(st.integers(0, 4), min_size=len(values), max_size=len(values)))
    clusters[:2] = [0, 1]
    order = data.draw(st.permutations(range(len(values))))
    one = clustered_interval(values, clusters)
    other = clustered_interval(values[list(order)], [f"cluster {clusters[i]}" for i in order])
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high), rel=1e-9, abs=1e-9)


@seeded
@given(values=values_of_some_length)
def test_asking_every_prompt_twice_teaches_nothing(values):
    once = clustered_interval(values, range(len(values)))
    twice = clustered_interval(np.tile(values, 2), [*range(len(values))] * 2)
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rows", [np.full(30, 4), np.arange(30) % 5 + 2], ids=["equal clusters", "unequal clusters"])
def test_it_covers_the_truth_where_rows_of_a_cluster_agree_and_the_naive_interval_does_not(rows):
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(len(rows)), rows).tolist()
    covered, naive = [], []
    for _ in range(1000):
        values = 3 + generator.normal(size=len(rows))[clusters] + generator.normal(size=len(clusters))
        clustered, by_row = clustered_interval(values, clusters), clustered_interval(values, range(len(values)))
        covered.append(clustered.low <= 3 <= clustered.high)
        naive.append(by_row.low <= 3 <= by_row.high)
    assert 0.925 < np.mean(covered) < 0.975
    assert np.mean(naive) < 0.85


def test_one_cluster_has_no_interval():
    with pytest.raises(InputError, match="an interval needs at least 2 clusters, got 1"):
        clustered_interval(np.array([1.0, 2.0]), ["a", "a"])
    with pytest.raises(InputError, match="an interval needs at least 2 clusters, got 0"):
        clustered_interval(np.array([]), [])


def test_values_and_clusters_of_different_lengths_are_refused():
    with pytest.raises(InputError, match="one entry an example, got 3 and 2"):
        clustered_interval(np.zeros(3), ["a", "b"])


@pytest.mark.parametrize(
    ("observed", "p"), [(9.0, 1 / 5), (3.5, 2 / 5), (3.0, 3 / 5), (0.0, 5 / 5)],
    ids=["above all", "above three", "a tie counts against it", "below all"],
)  # fmt: skip
def test_the_rank_among_four_controls_is_the_p_value(observed, p):
    assert rank_p_value(observed, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(p)


def test_without_controls_nothing_can_be_significant():
    assert rank_p_value(5.0, []) == 1


@seeded
@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=20, unique=True))
def test_each_of_several_exchangeable_values_gets_each_p_exactly_once(values):
    p = [rank_p_value(value, values[:i] + values[i + 1 :]) for i, value in enumerate(values)]
    assert sorted(p) == pytest.approx([(i + 1) / len(values) for i in range(len(values))])


@seeded
@given(values=st.lists(st.integers(0, 3).map(float), min_size=2, max_size=20))
def test_ties_never_make_a_p_value_too_small(values):
    p = np.array([rank_p_value(value, values[:i] + values[i + 1 :]) for i, value in enumerate(values)])
    assert all((p <= level).mean() <= level + 1e-12 for level in p)


def test_rank_p_values_are_uniform_under_the_null():
    generator = np.random.default_rng(0)
    p = [rank_p_value(draw[0], draw[1:].tolist()) for draw in generator.normal(size=(2000, 20))]
    assert stats.chisquare(np.bincount(np.rint(np.array(p) * 20).astype(int), minlength=21)[1:]).pvalue > 0.001


def test_an_observation_that_is_not_a_number_is_never_significant():
    with suppress(InputError):  # an error will do as well
        assert not rank_p_value(float("nan"), [0.1] * 99) <= 0.05


@pytest.mark.parametrize(("n", "power"), [(8, 0.8), (20, 0.8), (60, 0.8), (20, 0.9), (20, 0.5)])
def test_a_difference_that_large_is_found_with_the_power_promised(n, power):
    generator = np.random.default_rng(0)
    difference = detectable_difference(2.0 / n**0.5, n, power=power)
    draws = difference + 2.0 * generator.normal(size=(4000, n))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(power, abs=0.03)


def test_it_agrees_with_the_noncentral_t_and_scales_with_the_spread():
    n, difference = 40, detectable_difference(40**-0.5, 40)
    critical = stats.t.ppf(0.975, n - 1)
    assert stats.nct.sf(critical, n - 1, difference * n**0.5) == pytest.approx(0.8, abs=0.01)
    assert detectable_difference(3.0 * n**-0.5, n) == pytest.approx(3 * difference)


def test_more_prompts_or_less_power_or_less_confidence_detect_less():
    base = detectable_difference(1.0, 20)
    assert detectable_difference(1.0, 21) < base and detectable_difference(0.9, 20) < base
    assert detectable_difference(1.0, 20, power=0.7) < base
    assert detectable_difference(1.0, 20, confidence=0.9) < base


def test_one_cluster_can_detect_nothing():
    with pytest.raises(InputError, match="at least 2 clusters"):
        detectable_difference(1.0, 1)


def test_sign_flips_of_single_outcomes_are_mcnemars_test():
    before = np.array([True] * 3 + [False] * 11 + [True] * 20)
    after = np.array([False] * 3 + [True] * 11 + [True] * 20)
    exact = stats.binomtest(11, 14).pvalue  # McNemar's: 14 changed, and 11 of them from no to yes
    flips = sign_flip_p_value(after.astype(float) - before, list(range(34)), n_resamples=50_000)
    assert flips == pytest.approx(exact, abs=0.01)


def test_sign_flips_are_exact_where_all_patterns_can_be_tried():
    assert sign_flip_p_value(np.array([1.0, 2.0, 3.0]), [0, 1, 2]) == 2 / 8
    assert sign_flip_p_value(np.zeros(5), list(range(5))) == 1.0


def test_sign_flips_turn_a_whole_cluster_at_once():
    differences = np.ones(12)
    assert sign_flip_p_value(differences, list(range(12))) < 0.001
    assert sign_flip_p_value(differences, [0, 1, 2, 3] * 3) == 2 / 16


def test_p_values_of_sign_flips_are_uniform_under_the_null():
    rng = np.random.default_rng(0)
    clusters = [i // 2 for i in range(24)]
    p = [
        sign_flip_p_value(rng.standard_normal(12).repeat(2) + rng.standard_normal(24), clusters, n_resamples=499)
        for _ in range(300)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_difference_that_is_not_finite_is_never_significant(bad):
    """A NaN once gave p = 0."""
    with pytest.raises(InputError, match="finite differences alone, got NaN or infinity"):
        sign_flip_p_value(np.array([1.0, bad, 2.0]), [1, 2, 3])


def test_holm_is_the_step_down_of_bonferroni():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.5, np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_holm_refuses_what_is_no_p_value_wherever_it_stands(bad, place):
    """A NaN once made every p behind it 1, by its place in the family."""
    p_values = [0.01, 0.04]
    p_values.insert(place, bad)
    with pytest.raises(InputError, match=f"a p-value must be from 0 to 1, got {bad} for '{'abc'[place]}'"):
        holm(dict(zip("abc", p_values, strict=True)))


@seeded
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_lowers_a_p(p_values):
    adjusted = holm(p_values)
    assert all(p <= adjusted[name] <= 1 for name, p in p_values.items())
    ordered = sorted(p_values, key=p_values.__getitem__)
    assert [adjusted[name] for name in ordered] == sorted(adjusted.values())


def test_a_share_has_wilsons_interval():
    share = proportion(1, 10)
    assert (share.mean, share.low, share.high) == pytest.approx((0.1, 0.0179, 0.4042), abs=1e-4)
    with pytest.raises(InputError, match="got 11 of 10"):
        proportion(11, 10)


@pytest.mark.parametrize(("n_yes", "n"), [(0, 30), (1, 30), (15, 30), (30, 30), (100, 657)])
def test_a_share_of_independent_trials_has_scipys_wilson_interval(n_yes, n):
    wilson = stats.binomtest(n_yes, n).proportion_ci(method="wilson")
    assert (proportion(n_yes, n).low, proportion(n_yes, n).high) == pytest.approx((wilson.low, wilson.high))
    values = np.array([1.0] * n_yes + [0.0] * (n - n_yes))
    clustered = share_interval(values, range(n))
    assert (clustered.low, clustered.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)


def test_a_share_knows_that_answers_of_a_cluster_agree():
    values = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    alone = share_interval(values, range(10))
    tenfold = share_interval(np.repeat(values, 10), np.repeat(range(10), 10).tolist())
    assert (alone.low, alone.high) == pytest.approx((tenfold.low, tenfold.high), abs=0.02)


@pytest.mark.parametrize("n_alike", [2, 3, 7, 49])
def test_clusters_of_one_share_have_the_interval_of_all_their_answers(n_alike):
    """No cluster differs from another: of a third or a 49th the error is rounding, of a half it is 0."""
    values = np.array(([1.0] + [0.0] * (n_alike - 1)) * 10)
    share, every = share_interval(values, [i // n_alike for i in range(len(values))]), proportion(10, 10 * n_alike)
    assert (share.mean, share.low, share.high) == pytest.approx((every.mean, every.low, every.high))
