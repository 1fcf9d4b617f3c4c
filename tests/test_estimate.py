"""What every public estimator does with sides it cannot use, should doubt, or is handed in another form."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from known_answers import independent, noise, normal, pair

from dean_interp import InputError
from dean_interp.information import (
    Estimate,
    cka,
    copula_mi,
    gaussian_mi,
    hsic,
    ksg_mi,
    nhsic,
    shuffle_test,
    v_information,
)
from dean_interp.information.estimate import in_nats, is_constant

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("gaussian_mi", "copula_mi", "ksg_mi", "cka", "rbf_cka", "nhsic")


def of_labels(x, y):
    """V-information of labels that alternate; of the second side it takes the length alone."""
    return v_information(x, np.arange(len(y)) % 2, n_folds=2)


PAIRS = {
    "gaussian_mi": gaussian_mi,
    "gaussian_mi, k=1": partial(gaussian_mi, k=1),
    "copula_mi": copula_mi,
    "ksg_mi": ksg_mi,
    "ksg_mi, ranks": partial(ksg_mi, scaling="ranks"),
    "ksg_mi, whitened": partial(ksg_mi, scaling="whitened"),
    "hsic": hsic,
    "hsic, rbf, biased": partial(hsic, kernel="rbf", debiased=False),
    "cka": cka,
    "cka, rbf": partial(cka, kernel="rbf"),
    "cka, biased": partial(cka, debiased=False),
    "nhsic": nhsic,
} | {f"shuffle_test, {name}": partial(shuffle_test, estimator=name, n_shuffles=9) for name in NAMES}
EVERY = {**PAIRS, "v_information": of_labels}
IN_NATS = ["gaussian_mi", "copula_mi", "ksg_mi", "ksg_mi, ranks", "ksg_mi, whitened"]
IN_NATS += [f"shuffle_test, {name}" for name in ("gaussian_mi", "copula_mi", "ksg_mi")] + ["v_information"]


def over(names):
    return pytest.mark.parametrize("estimator", [pytest.param(EVERY[name], id=name) for name in names])


# What is refused, with what was given


@over(EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_how_many_rows_hold_them(estimator, bad):
    x, y = independent(40, 2)
    x[3, 0] = x[7, 0] = x[7, 1] = bad
    with pytest.raises(InputError, match="the first side holds NaN or infinity in 2 of 40 rows"):
        estimator(x, y)
    if estimator is not of_labels:
        with pytest.raises(InputError, match="the second side holds NaN or infinity in 2 of 40 rows"):
            estimator(y, x.numpy())


@over(EVERY)
def test_sides_of_different_length_are_refused_with_both_lengths(estimator, untyped):
    with pytest.raises(InputError, match="both sides must hold the same examples, got 40 and 39 rows"):
        estimator(noise(40, 2), noise(39, 2))


@over(EVERY)
@pytest.mark.parametrize("shape", [(4, 5, 6), (40, 0), ()])
def test_what_is_no_matrix_is_refused_with_its_shape(estimator, shape, untyped):
    message = rf"a side is a matrix \(example, dim\) with at least one column, got shape \({', '.join(map(str, shape))}"
    with pytest.raises(InputError, match=message):
        estimator(torch.zeros(shape), noise(40, 1))
    if estimator is not of_labels:
        with pytest.raises(InputError, match=message):
            estimator(noise(40, 1), torch.zeros(shape))


@over(EVERY)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_examples_are_refused_with_how_many_there_are(estimator, n):
    with pytest.raises(InputError, match=rf"(needs at least|need more than) \d+ examples, got {n}"):
        estimator(noise(n, 1), noise(n, 1, seed=1))


@over([name for name in EVERY if "gaussian" in name or "copula" in name])
def test_more_dimensions_than_examples_are_refused_by_what_inverts_a_covariance(estimator):
    if getattr(estimator, "keywords", {}).get("k"):
        assert math.isfinite(estimator(*independent(6, 4)).value)
        return
    with pytest.raises(InputError, match=r"4 \+ 4 dimensions need more than 9 examples, got 6; k= takes principal"):
        estimator(*independent(6, 4))


def test_neighbours_that_are_not_there_are_refused():
    for n in (5, 6):
        with pytest.raises(InputError, match=f"needs at least 7 examples, got {n}"):
            shuffle_test(*independent(n, 1), estimator="ksg_mi", n_shuffles=9)


# What is doubtful, and said to be


@over(EVERY)
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1024.0, 1000 / 7])
def test_a_constant_side_informs_of_nothing_and_is_flagged(estimator, value):
    constant, other = torch.full((97, 3), value, dtype=torch.float64), noise(97, 3)
    estimate = estimator(constant, other)
    assert estimate.value == 0 and "constant side" in estimate.flags
    if estimator is not of_labels:
        estimate = estimator(other, constant)
        assert estimate.value == 0 and "constant side" in estimate.flags
        assert estimator(constant, constant).value == 0


@over(EVERY)
def test_repeated_examples_are_flagged_with_how_many_there_are(estimator):
    x, y = independent(50, 1)
    clean = estimator(x, y)
    assert not clean.flags and math.isfinite(clean.value)
    x[40:], y[40:] = x[:10], y[:10]
    assert any(flag.startswith("duplicates: 10 of 50 examples") for flag in estimator(x, y).flags)


def test_the_same_row_on_one_side_alone_is_no_duplicate():
    x, y = independent(50, 2)
    x[40:] = x[:10]
    assert gaussian_mi(x, y).flags == () and cka(x, y).flags == ()


@over(IN_NATS)
def test_few_examples_for_the_dimensions_are_flagged_where_the_estimate_is_in_nats(estimator):
    few, enough = estimator(*independent(15, 1 if estimator is not of_labels else 2)), estimator(*independent(16, 1))
    assert any(flag.startswith("few examples: 15 for 2 dimensions") for flag in few.flags)
    assert not any(flag.startswith("few examples") for flag in enough.flags)


def test_more_information_than_the_sample_can_show_is_flagged():
    assert in_nats(4.7, 100, []).flags == ("above ln n = 4.61 nats, more than 100 examples can show",)
    assert in_nats(4.6, 100, ["seen"]).flags == ("seen",)
    assert any(flag.startswith("above ln n = 5.30 nats") for flag in gaussian_mi(noise(200, 4), noise(200, 4)).flags)


def test_a_column_is_constant_up_to_rounding_and_a_side_where_all_are():
    x = noise(50, 2)
    assert not is_constant(x) and is_constant(x * 0 + 1 / 3) and is_constant(1e6 + 1e-9 * x)
    assert not is_constant(torch.cat([x, x * 0], 1)) and not is_constant(1e6 + 1e-3 * x) and not is_constant(1e-30 * x)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_where_one_example_alone_differs_the_debiased_alignment_is_flagged_and_no_rounding(kernel):
    """Its debiased kernel is zero: zero over zero, of which rounding once made -0.98."""
    x = torch.zeros(60, 1, dtype=torch.float64)
    x[7] = 0.37
    for estimate in (cka(x + 0.1, noise(60, 2), kernel=kernel), cka(x + 0.1, 0.3 * x, kernel=kernel)):
        assert estimate.value == 0 and estimate.flags


def test_z_is_in_standard_deviations_of_the_null_and_none_where_there_is_none():
    assert Estimate(3.0, "index", (), 1.0, 0.5).z == 4
    assert Estimate(3.0, "nats").z is None and Estimate(0.0, "index", (), 0.0, 0.0).z is None


@over(PAIRS)
def test_units_are_nats_or_an_index_and_only_an_index_has_moments_of_shuffles(estimator):
    estimate = estimator(*independent(40, 1))
    if isinstance(estimate, Estimate):
        name = getattr(estimator, "func", estimator).__name__
        assert estimate.units == ("nats" if name.endswith("_mi") else "index")
        assert (estimate.null_mean is None) == (estimate.units == "nats")


# In another form


@over(EVERY)
def test_arrays_integers_and_vectors_are_the_matrix_that_they_stand_for(estimator):
    x, y = ((9 * side).round() for side in normal(pair(0.75), 1, 90))
    expected = estimator(x, y)
    assert math.isfinite(expected.value) and expected.value != 0
    for form in (
        lambda side: side.numpy(),
        lambda side: side.float(),
        lambda side: side.long(),
        lambda side: side.numpy().astype(np.int32),
        lambda side: side.numpy().astype(np.float32),
        lambda side: side[:, 0],
        lambda side: side[:, 0].numpy(),
        lambda side: side.half(),
    ):
        assert estimator(form(x), form(y)) == expected
        assert estimator(form(x), y) == expected


@over(EVERY)
def test_sides_may_have_different_numbers_of_columns(estimator):
    assert math.isfinite(estimator(*independent(60, 1, 2)).value)
    assert math.isfinite(estimator(noise(60), noise(60, 2, seed=1)).value)


@over(EVERY)
def test_arrays_that_are_views_or_read_only_and_tensors_with_gradients_are_accepted(estimator):
    x, y = independent(60, 1)
    expected = estimator(x, y).value
    locked = x.numpy().copy()
    locked.flags.writeable = False
    assert estimator(locked, y).value == expected
    assert estimator(x.numpy()[::-1][::-1], y).value == expected
    assert estimator(x.flip(0).numpy()[::-1], y).value == expected
    assert estimator(x.clone().requires_grad_(), y).value == expected


@over(EVERY)
def test_single_precision_is_estimated_in_double(estimator):
    x, y = normal(pair(0.75), 1, 80)
    expected = estimator(x.float().double(), y.float().double())
    assert estimator(x.float(), y.float()) == expected


@over(EVERY)
def test_the_sides_are_left_as_they_were(estimator):
    x, y = independent(60, 2)
    first, second = x.clone(), y.clone()
    estimator(x, y)
    assert torch.equal(x, first) and torch.equal(y, second)
