"""Nearest-neighbour estimates and V-information against known answers, a slow readable twin and ennemi. In nats."""

import re

import ennemi
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import (
    NORMAL,
    STUDENT,
    additive,
    closed_form,
    dense,
    half_cube,
    independent,
    information_of_two_means,
    noise,
    normal,
    normal_cdf,
    pair,
    student,
    swiss_roll,
    two_means,
)
from scipy.special import digamma

from dean_interp import InputError
from dean_interp.information import gaussian_mi, ksg_mi, v_information
from dean_interp.information.neighbours import ksg_of_pairings
from dean_interp.information.probes import folds_of, probe_direction

pytestmark = pytest.mark.usefixtures("one_thread")
seeded = settings(max_examples=10)
every_scaling = pytest.mark.parametrize("scaling", ["standard", "ranks", "whitened"])


def slow_ksg(x, y, k):
    """Equation 8 of Kraskov et al. 2004 as it stands, over all pairs of examples."""
    x, y = ((side - side.mean(0)) / side.std(0) for side in (x, y))
    in_x, in_y = ((side[:, None] - side).abs().amax(-1) for side in (x, y))
    joint = torch.maximum(in_x, in_y)
    terms = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        radius = joint[i, others].sort().values[k - 1]
        n_x, n_y = (int((distance[i, others] < radius).sum()) for distance in (in_x, in_y))
        terms.append(digamma(n_x + 1) + digamma(n_y + 1))
    return digamma(k) + digamma(len(x)) - np.mean(terms)


# Known answers


@every_scaling
@pytest.mark.parametrize("map_x", [lambda x: x, normal_cdf, half_cube])
@pytest.mark.parametrize("map_y", [lambda x: x, normal_cdf, half_cube])
def test_the_estimate_of_a_bivariate_normal_matches_the_closed_form_also_through_maps(scaling, map_x, map_y):
    for seed in range(5):
        x, y = normal(pair(0.75), 1, 1000, seed=seed)
        estimate = ksg_mi(map_x(x), map_y(y), scaling=scaling)
        assert estimate.value == pytest.approx(NORMAL, abs=0.10) and not estimate.flags


@pytest.mark.parametrize(("width", "true", "tolerance"), [(0.75, 0.33333, 0.10), (0.1, 1.70944, 0.2)])
def test_uniform_noise_that_is_added_takes_away_what_the_closed_form_says(width, true, tolerance):
    draws = [additive(width, 1000, seed) for seed in range(10)]
    assert [exact for _, _, exact in draws] == pytest.approx([true] * 10, abs=1e-5)
    values = {scaling: [ksg_mi(x, y, scaling=scaling).value for x, y, _ in draws] for scaling in ("standard", "ranks")}
    assert values["standard"] == pytest.approx([true] * 10, abs=tolerance)
    assert np.mean(values["standard"]) == pytest.approx(true, abs=tolerance / 2)
    assert np.mean(values["ranks"]) == pytest.approx(true, abs=tolerance / 2)


def test_on_ranks_it_sees_dependence_in_heavy_tails_and_without_them_falls_short():
    assert pytest.approx(0.22417, abs=1e-5) == STUDENT
    on_ranks = [ksg_mi(*student(1000, seed), scaling="ranks").value for seed in range(5)]
    assert on_ranks == pytest.approx([0.22417] * 5, abs=0.12)
    as_it_is = [ksg_mi(*student(1000, seed)).value for seed in range(5)]
    assert np.mean(as_it_is) < 0.17 < np.mean(on_ranks)


@every_scaling
def test_a_swiss_roll_holds_what_the_sheet_held(scaling):
    for seed in range(5):
        assert ksg_mi(*swiss_roll(1000, seed), scaling=scaling).value == pytest.approx(NORMAL, abs=0.1)


@every_scaling
def test_sides_of_more_than_one_column_match_the_closed_form_and_are_flagged_beyond_three(scaling):
    covariance = dense(2)[:3, :3]
    for seed in range(3):
        x, y = normal(covariance, 2, 1000, seed=seed)
        estimate = ksg_mi(x, y, scaling=scaling)
        assert estimate.value == pytest.approx(closed_form(covariance, 2), abs=0.1) and not estimate.flags
        x, y = normal(dense(2), 2, 1000, seed=seed)
        estimate = ksg_mi(x, y, scaling=scaling)
        assert estimate.value == pytest.approx(closed_form(dense(2), 2), abs=0.1)
        assert estimate.flags == ("4 dimensions; neighbours serve up to 3",)


@every_scaling
@pytest.mark.parametrize(("n", "dim"), [(500, 2), (60, 1)])
def test_independent_sides_give_zero_on_average_and_are_not_clipped(scaling, n, dim):
    values = [ksg_mi(*independent(n, dim, seed=seed), scaling=scaling).value for seed in range(50)]
    assert np.mean(values) == pytest.approx(0, abs=0.03)
    assert sum(value < 0 for value in values) > 10


def test_it_sees_dependence_that_has_no_correlation():
    x = noise(1000, 1)
    y = x.square() + 0.3 * noise(1000, 1, seed=1)
    assert gaussian_mi(x, y).value < 0.1 and ksg_mi(x, y).value > 0.7


# The slow twin, ennemi, and identities


@pytest.mark.parametrize(("dim_x", "dim_y"), [(1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_it_is_the_slow_readable_twin(dim_x, dim_y, k):
    x, y = independent(60, dim_x, dim_y)
    y = y + x[:, :1]
    assert ksg_mi(x, y, k=k).value == pytest.approx(slow_ksg(x, y, k), abs=1e-10)


@pytest.mark.parametrize("rho", [0.0, 0.75, 0.95])
@pytest.mark.parametrize("k", [3, 5])
def test_it_agrees_with_ennemi(rho, k):
    for seed in range(3):
        x, y = normal(pair(rho), 1, 500, seed=seed)
        theirs = ennemi.estimate_mi(y[:, 0].numpy(), x[:, 0].numpy(), k=k)[0, 0]
        assert ksg_mi(x, y, k=k).value == pytest.approx(theirs, abs=1e-2)


@seeded
@given(seed=st.integers(0, 2**32))
def test_each_scaling_takes_away_what_it_says(seed):
    x, y = normal(dense(2), 2, 80, seed=1)
    turn, scale = noise(2, 2, seed=seed), 10 ** noise(2, seed=seed + 1)
    expected = {scaling: ksg_mi(x, y, scaling=scaling).value for scaling in ("standard", "ranks", "whitened")}
    assert ksg_mi(x * scale + 7, y - 3).value == pytest.approx(expected["standard"], abs=1e-9)
    assert ksg_mi(x * scale, y.exp(), scaling="ranks").value == pytest.approx(expected["ranks"], abs=1e-9)
    rotated = x @ torch.linalg.qr(turn).Q * 5 + 7
    assert ksg_mi(rotated, y, scaling="whitened").value == pytest.approx(expected["whitened"], abs=1e-9)


@every_scaling
def test_it_is_symmetric_and_blind_to_the_order_of_examples(scaling):
    x, y = normal(dense(2), 2, 80)
    expected = pytest.approx(ksg_mi(x, y, scaling=scaling).value, abs=1e-12)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert ksg_mi(y, x, scaling=scaling).value == expected
    assert ksg_mi(x[order], y[order], scaling=scaling).value == expected


@pytest.mark.parametrize(("dim_x", "dim_y"), [(1, 1), (1, 2), (3, 1)])
def test_every_pairing_is_the_estimate_of_rows_paired_by_hand(dim_x, dim_y):
    x, y = independent(40, dim_x, dim_y)
    pairings = torch.stack(
        [torch.arange(40), *(torch.tensor(np.random.default_rng(i).permutation(40)) for i in (1, 2))]
    )
    by_hand = [slow_ksg(x, y[pairing], 3) for pairing in pairings]
    x, y = ((side - side.mean(0)) / side.std(0) for side in (x, y))
    assert ksg_of_pairings(x, y, pairings).tolist() == pytest.approx(by_hand, abs=1e-10)


def test_a_column_that_does_not_vary_changes_nothing():
    x, y = normal(pair(0.75), 1, 100)
    for scaling in ("standard", "ranks", "whitened"):
        more = torch.cat([x, torch.full_like(x, 1 / 3)], 1)
        expected = ksg_mi(x, y, scaling=scaling).value
        assert ksg_mi(more, y, scaling=scaling).value == pytest.approx(expected, abs=1e-12)


def test_what_it_cannot_rely_on_is_flagged():
    x, y = normal(pair(0.75), 1, 100)
    coarse = (x > 0).double()
    assert any("median distance to neighbour 3 is zero" in flag for flag in ksg_mi(coarse, (y > 0).double()).flags)
    assert ksg_mi(x[:15], y[:15]).flags == ("few examples: 15 for 2 dimensions, 16 are wanted",)
    assert any(flag.startswith("duplicates: 100 of 200") for flag in ksg_mi(x.repeat(2, 1), y.repeat(2, 1)).flags)


def test_its_options_are_refused_with_what_is_allowed():
    x, y = independent(10, 1)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        ksg_mi(x, y, k=0)
    with pytest.raises(InputError, match="needs at least 11 examples, got 10"):
        ksg_mi(x, y, k=9)
    assert np.isfinite(ksg_mi(x, y, k=8).value)


def test_an_unknown_scaling_is_refused_with_those_there_are(untyped):
    with pytest.raises(
        InputError, match=re.escape("scaling must be one of ('standard', 'ranks', 'whitened'), got 'x'")
    ):
        ksg_mi(*independent(10, 1), scaling="x")


# V-information


@pytest.mark.parametrize("mu", [0.25, 0.5, 1.5])
def test_v_information_of_two_normals_is_their_mutual_information(mu):
    """`N(+-mu, 1)`: 0.25 is half the distance delta = 0.5; there a logistic probe is the right model."""
    true = information_of_two_means(mu)
    values = [v_information(*two_means(mu, 1000, seed)).value for seed in range(5)]
    assert values == pytest.approx([true] * 5, abs=0.06)
    assert np.mean(values) == pytest.approx(true, abs=0.02)


def test_v_information_of_a_label_that_stands_in_the_matrix_nears_its_entropy():
    label = torch.arange(300) % 3
    columns = torch.nn.functional.one_hot(label).double() * 9
    assert v_information(columns, label).value == pytest.approx(np.log(3), abs=0.05)
    assert v_information(columns, ["abc"[i] for i in label.tolist()]).value == v_information(columns, label).value


def test_v_information_is_negative_where_the_probe_learns_noise():
    values = [v_information(noise(60, 30, seed=seed), torch.arange(60) % 2).value for seed in range(10)]
    assert max(values) < -0.1


def test_v_information_falls_short_where_the_label_is_not_linear():
    x = noise(1000, 2)
    assert v_information(x, (x[:, 0] * x[:, 1] > 0).long()).value < 0.02


def test_v_information_does_not_depend_on_scale_and_shift_of_a_column():
    x, label = noise(100, 3), torch.arange(100) % 2
    x[:, 0] += label
    scale = torch.tensor([1e-3, 1.0, 1e5], dtype=torch.float64)
    assert v_information(x * scale + 7, label).value == pytest.approx(v_information(x, label).value, abs=1e-3)


def repeated_within_groups(seed):
    """40 prompts with 4 equal rows each, and a label a prompt that has nothing to do with them."""
    groups = [prompt for prompt in range(40) for _ in range(4)]
    label = torch.tensor(np.random.default_rng(seed).permutation(40) % 2)
    return noise(40, 60, seed=seed)[groups], label[groups], groups


def test_what_one_answer_tells_of_another_to_the_same_prompt_is_not_information():
    for seed in range(3):
        x, label, groups = repeated_within_groups(seed)
        assert v_information(x, label).value > 0.3, "without groups the probe has seen the answer"
        assert v_information(x, label, groups=groups).value < 0


def test_groups_are_never_on_both_sides_of_a_fold_and_every_example_is_asked_about_once():
    groups = [f"prompt {i}" for i in np.random.default_rng(0).integers(0, 30, 200)]
    label = np.arange(200) % 2
    asked = []
    for train, test in folds_of(label, groups, n_folds=5, seed=0):
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert sorted([*train, *test]) == list(range(200))
        asked += test.tolist()
    assert sorted(asked) == list(range(200))


def test_a_label_may_be_anything_that_can_be_told_apart():
    x, label = noise(60, 2), torch.arange(60) % 2
    names = [(("unsafe", 0), ("safe", 1))[i] for i in label.tolist()]
    assert v_information(x, names).value == v_information(x, label).value


def test_a_probe_is_never_asked_about_a_label_that_it_was_not_fitted_on():
    """Folds of whole groups may put all examples of a label into one."""
    groups = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3]
    label = np.array([0, 0, 1, 0, 1, 0, 2, 1, 1, 1, 1, 2, 1])
    n_looked_at = 0
    for seed in range(20):
        try:
            folds = folds_of(label, groups, n_folds=2, seed=seed)
        except InputError:
            continue
        n_looked_at += 1
        assert len(folds) == 2 and all(set(label[train]) == {0, 1, 2} for train, _ in folds)
    assert 0 < n_looked_at < 20, "some draws put a label into one fold, others do not"


def test_folds_are_the_seeds():
    x, label = noise(100, 3), torch.arange(100) % 2
    one, same, other = (v_information(x, label, seed=seed).value for seed in (0, 0, 1))
    assert one == same != other


def test_a_single_label_has_nothing_to_tell_and_is_flagged():
    estimate = v_information(noise(40, 2), ["safe"] * 40)
    assert estimate.value == 0 and estimate.flags == ("constant side",)


def test_folds_and_groups_are_refused_with_what_was_given(untyped):
    x, label = noise(40, 2), [0] * 37 + [1] * 3
    message = "the rarest label has {} examples or groups: n_folds must be from 2 to that, got {}"
    with pytest.raises(InputError, match=message.format(3, 5)):
        v_information(x, label)
    with pytest.raises(InputError, match=message.format(2, 3)):
        v_information(x, label, groups=[*range(37), 37, 38, 38], n_folds=3)
    with pytest.raises(InputError, match=message.format(3, 1)):
        v_information(x, label, n_folds=1)
    with pytest.raises(InputError, match="every label needs at least 2 examples or groups, and the rarest has 1"):
        v_information(x, [0] * 39 + [1])
    with pytest.raises(InputError, match="groups must have one entry an example, got 39 for 40"):
        v_information(x, label, groups=list(range(39)), n_folds=3)
    with pytest.raises(InputError, match="must hold the same examples, got 40 and 39 rows"):
        v_information(x, label[1:])
    assert np.isfinite(v_information(x, label, n_folds=3).value)


def test_the_direction_of_a_probe_points_to_label_1_in_the_units_of_the_data():
    label = np.arange(2000) % 2
    x = noise(2000, 3).numpy() * [1.0, 1.0, 100.0]
    x[:, 0] += 2.0 * label
    direction = probe_direction(x, label)
    assert direction == pytest.approx([2, 0, 0], abs=0.3) and abs(direction[2]) < 0.01


def test_the_lattice_of_plain_ranks_biases_upwards_where_normal_scores_do_not():
    bias = {"plain": [], "normal": []}
    for seed in range(10):
        x, y = normal(pair(0.75), 1, 1000, seed=seed)
        plain = [side.argsort(0).argsort(0).double() for side in (x, y)]
        bias["plain"].append(float(ksg_of_pairings(*plain, torch.arange(1000)[None])) - 0.41334)
        bias["normal"].append(ksg_mi(x, y, scaling="ranks").value - 0.41334)
    assert 0.04 < np.mean(bias["plain"]) < 0.09 and np.mean(bias["normal"]) < 0.035
