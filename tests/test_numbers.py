"""Numbers on pages: one minus, no sign at 0, one format a column, and no range of a single value."""

import pytest

from dean_interp.report.page import (
    decimals,
    interval,
    mean_and_range,
    minus,
    number,
    p_value,
    percent_in_two_digits,
    power,
    shared_digits,
    signed,
)
from dean_interp.statistics import Interval

SMALL, LARGE = Interval(-0.00234, -0.00627, 0.00158, 9), Interval(0.0071, -0.0012, 0.0144, 9)


def test_numbers_below_0_have_a_minus_and_no_hyphen():
    assert interval(SMALL) == "−0.00234 [−0.00627, +0.00158]"
    assert (number(-0.388), power(-0.0216, signed=True), p_value(0.0002)) == ("−0.388", "−2.16e−02", "2e−04")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("by -0.003 [-0.014, +0.009]", "by −0.003 [−0.014, +0.009]"),
        ("(p = 2e-04; -.5)", "(p = 2e−04; −.5)"),
        ("smollm2-135m and claude-3-5, tokens 1-12, L2.-x, --n-test 4", None),
    ],
)
def test_a_sentence_gets_its_minus_where_a_number_begins_and_nowhere_else(text, written):
    assert minus(text) == (written or text)


def test_zero_has_no_sign():
    assert [signed(value) for value in (-0.0001, 0.0, 0.0004, 0.0006)] == ["0.000", "0.000", "0.000", "+0.001"]


def test_a_column_has_as_many_decimals_as_its_largest_number_needs():
    values = (0.0001, 1e-05, 9.5e-06, None)
    digits = decimals(values)
    assert [number(value, digits) for value in values if value] == ["0.00010", "0.00001", "0.00001"]
    assert decimals([0.3, 0.0001]) == 3 == decimals([]) and decimals([0.0012, 0.00075]) == 4


def test_small_and_large_intervals_of_a_column_have_the_same_decimals():
    digits = shared_digits([SMALL, LARGE])
    assert [interval(each, digits) for each in (LARGE, SMALL)] == [
        "+0.0071 [−0.0012, +0.0144]",
        "−0.0023 [−0.0063, +0.0016]",
    ]
    assert (shared_digits([SMALL]), shared_digits([LARGE])) == (5, 3)


def test_large_and_tiny_shares_are_told_apart_from_nothing():
    assert [percent_in_two_digits(share) for share in (0.35, 0.0012, 0.00075)] == ["35 %", "0.12 %", "0.075 %"]


def test_one_value_has_no_range():
    assert interval(mean_and_range([-0.038])) == "−0.038"
    assert interval(mean_and_range([-0.04, 0.02])) == "−0.010 [−0.040, +0.020]"
