"""What an estimate says of itself: its limits, its doubts, and the sides that it takes (more in `test_degenerate`)."""

import math

import pytest
import torch
from known_answers import independent, noise

from dean_interp import InputError
from dean_interp.information import Estimate, cka, gaussian_mi, hsic, nhsic, shuffle_test, v_information
from dean_interp.information.estimate import in_nats, is_constant

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("gaussian_mi", "copula_mi", "ksg_mi", "cka", "rbf_cka", "nhsic")


def test_z_is_in_standard_deviations_of_the_null_and_none_where_there_is_none():
    assert Estimate(3.0, "index", (), 1.0, 0.5).z == 4
    assert Estimate(3.0, "nats").z is None and Estimate(0.0, "index", (), 0.0, 0.0).z is None


def test_more_information_than_the_sample_can_show_is_flagged_and_left_as_it_is():
    over = in_nats(4.7, 100, [])
    assert over.value == 4.7 and over.flags == ("above ln n = 4.61 nats, more than 100 examples can show",)
    assert in_nats(4.6, 100, ["seen"]).flags == ("seen",)
    assert in_nats(-0.2, 100, []) == Estimate(-0.2, "nats")


def test_a_side_is_constant_where_every_column_is_up_to_rounding():
    x = noise(50, 2)
    assert not is_constant(x) and is_constant(x * 0 + 1 / 3) and is_constant(1e6 + 1e-9 * x)
    assert not is_constant(torch.cat([x, x * 0], 1)) and not is_constant(1e6 + 1e-3 * x) and not is_constant(1e-30 * x)


@pytest.mark.parametrize("name", NAMES)
def test_sides_may_have_different_numbers_of_columns(name):
    """Also for the types that are checked at test time: they once asked both sides for as many."""
    assert math.isfinite(shuffle_test(noise(60), noise(60, 2, seed=1), estimator=name, n_shuffles=5).value)
    for estimator in (gaussian_mi, hsic, nhsic):
        assert math.isfinite(estimator(*independent(60, 1, 3)).value)


def test_an_array_that_may_not_be_written_to_is_taken():
    x, y = independent(60, 2)
    locked = x.numpy().copy()
    locked.flags.writeable = False
    assert gaussian_mi(locked, y) == gaussian_mi(x, y)


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_shuffle_test_in_nats_is_flagged_where_its_estimate_is(name):
    few, enough = (shuffle_test(*independent(n, 1), estimator=name, n_shuffles=5).flags for n in (15, 16))
    assert few == ("few examples: 15 for 2 dimensions, 16 are wanted",) and enough == ()


def test_a_probe_on_few_examples_is_flagged():
    few, enough = (v_information(noise(n, 2), torch.arange(n) % 2).flags for n in (15, 16))
    assert any(flag.startswith("few examples: 15 for 2 dimensions") for flag in few) and enough == ()


def test_a_shuffle_test_by_neighbours_refuses_fewer_examples_than_neighbours():
    for n in (5, 6):
        with pytest.raises(InputError, match=f"needs at least 7 examples, got {n}"):
            shuffle_test(*independent(n, 1), estimator="ksg_mi", n_shuffles=5)


def test_a_test_without_shuffles_is_refused():
    with pytest.raises(InputError, match="n_shuffles must be at least 1, got 0"):
        shuffle_test(*independent(40, 1), n_shuffles=0)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_where_one_example_alone_differs_the_debiased_alignment_is_zero_and_flagged(kernel):
    """Its debiased kernel is zero: zero over zero, of which rounding once made -0.98."""
    x = torch.zeros(60, 1, dtype=torch.float64)
    x[7] = 0.37
    for estimate in (cka(x + 0.1, noise(60, 2), kernel=kernel), cka(x + 0.1, 0.3 * x, kernel=kernel)):
        assert estimate.value == 0 and estimate.flags
    test = shuffle_test(x + 0.1, noise(60, 2), estimator="cka" if kernel == "linear" else "rbf_cka", n_shuffles=9)
    assert (test.value, test.null_sd, test.p) == (0, 0, 1) and test.flags


@pytest.mark.parametrize("seed", range(30))
def test_equal_sides_are_many_nats_and_never_infinitely_many(seed):
    x = noise(50, seed=seed)
    estimate = gaussian_mi(x, x)
    assert 10 < estimate.value < 20 and "above ln n" in estimate.flags[0]


def test_values_whose_squares_overflow_are_refused():
    x, y = independent(60, 1)
    with pytest.raises(InputError, match=r"the first side holds values up to \de\+20\d, whose squares overflow"):
        gaussian_mi(1e200 * x, y)
