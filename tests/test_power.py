"""The power of a study before it is run: false alarms at the level, more prompts find more, and errors."""

import pytest
import torch

from dean_interp import InputError
from dean_interp.information.gaussian import gaussian_of_samples
from dean_interp.information.power import PowerDesign, _sides, detection_rate, power_curve, prompts_needed

SMALL = PowerDesign(k=3, n_controls=19)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("information", [0.2, 1.0, 3.0])
def test_the_simulated_sides_hold_the_information_that_was_asked_for(information):
    drawn = torch.Generator().manual_seed(0)
    cause, own_x, own_y = (torch.randn(20, 2000, 4, generator=drawn, dtype=torch.float64) for _ in range(3))
    estimates = gaussian_of_samples(*_sides(cause, own_x, own_y, information))
    assert float(estimates.mean()) == pytest.approx(information, abs=0.03)


def test_without_a_fall_alarms_are_as_rare_as_the_level():
    rate = detection_rate(60, before=1.0, after=1.0, design=SMALL, n_trials=400)
    assert rate == pytest.approx(0.05, abs=0.03)


def test_more_prompts_and_larger_falls_are_found_more_often():
    few, some, many = power_curve([16, 48, 144], before=1.0, after=0.8, design=SMALL, n_trials=100)
    assert few < some < many and many > 0.9
    assert detection_rate(16, before=1.0, after=0.3, design=SMALL, n_trials=100) > few + 0.3


def test_noisier_controls_hide_a_fall():
    calm, rough = (
        detection_rate(64, before=1.0, after=0.8, design=PowerDesign(3, 19, disturbed), n_trials=100)
        for disturbed in (0.02, 0.6)
    )
    assert calm > rough + 0.2


def test_the_prompts_needed_are_the_fewest_that_reach_the_power():
    options = {"before": 1.0, "after": 0.75, "design": SMALL, "n_trials": 100}
    needed = prompts_needed(**options)
    assert needed is not None and 8 < needed < 200
    assert detection_rate(needed, **options) >= 0.8
    assert detection_rate(int(needed / 1.11), **options) < 0.8
    assert prompts_needed(before=1.0, after=0.999, design=SMALL, n_trials=20, at_most=40) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"before": 0.5, "after": 0.7}, "between 0 and it, got 0.5 and 0.7"),
        ({"before": 0.5, "after": 0.2, "n_prompts": 7}, "k=3 a side needs at least 8 prompts, got 7"),
        ({"before": 0.5, "after": 0.2, "design": PowerDesign(3, 9)}, "9 controls can never give p <= 0.05"),
        (
            {"before": 0.5, "after": 0.2, "design": PowerDesign(3, 19, 1.5)},
            "disturbed and level must be between 0 and 1",
        ),
        ({"before": 0.5, "after": 0.2, "design": PowerDesign(3, -1)}, "n_controls must be at least 1, got -1"),
        ({"before": 0.5, "after": 0.2, "design": PowerDesign(0)}, "k must be at least 1, got 0"),
        ({"before": 0.5, "after": 0.2, "n_trials": 0}, "n_trials must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        detection_rate(**{"n_prompts": 40, "design": SMALL, **given})


def test_a_power_outside_its_range_is_refused():
    with pytest.raises(InputError, match="power must be between 0 and 1, got 1"):
        prompts_needed(before=1.0, after=0.5, power=1.0)
    with pytest.raises(InputError, match="k must be at least 1, got -3"):
        prompts_needed(before=1.0, after=0.5, design=PowerDesign(-3))
