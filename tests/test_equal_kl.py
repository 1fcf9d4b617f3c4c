"""The search for a control's size, on models whose KL at every size is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dean_interp import Selection, Site, random_like
from dean_interp.selection.size_at_kl import size_at_kl
from dean_interp.selection.strata import deciles

seeded = settings(max_examples=80)
SITE = Site(0, "neurons")
TARGET = 0.02


class Ablated:
    """A model whose KL is a given function of the growth; it writes down what was tried."""

    def __init__(self, kl):
        self.kl, self.tried = kl, {}

    def measured(self, growth):
        assert growth > 0, "a control of no units cannot be drawn"
        self.tried[growth] = self.kl(growth)
        return self.tried[growth]

    def search(self, target=TARGET, smallest=0.01, largest=100.0, **options):
        growth, inside = size_at_kl(self.measured, target, bounds=(smallest, largest), **options)
        assert growth in self.tried, "only a size that was measured is returned"
        return growth, inside


def power_law(exponent, needed):
    """KL reaches the target at the growth `needed`."""
    return lambda growth: TARGET * (growth / needed) ** exponent


def units_one_by_one(rng, exponent, n_units=6000, heavy=False):
    """Each unit adds its own random damage: monotone, but no smooth curve. 100 units are a growth of 1."""
    each = rng.lognormal(0, 1.5, n_units) if heavy else rng.exponential(size=n_units)
    total = (np.cumsum(each) / 100) ** exponent
    return lambda growth: float(total[max(round(growth * 100), 1) - 1])


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("needed", [0.1, 0.7, 1.0, 1.04, 3.0, 20.0, 80.0])
def test_the_size_is_found_for_power_laws(exponent, needed):
    model = Ablated(power_law(exponent, needed))
    growth, inside = model.search()
    assert inside and TARGET <= model.kl(growth) <= 1.1 * TARGET
    assert len(model.tried) <= 8


@seeded
@given(exponent=st.floats(0.25, 6), needed=st.floats(0.1, 90), target=st.floats(1e-6, 5))
def test_the_size_is_found_for_any_power_law_within_eight_tries(exponent, needed, target):
    model = Ablated(lambda growth: target * (growth / needed) ** exponent)
    growth, inside = model.search(target)
    assert inside and target <= model.tried[growth] <= 1.1 * target
    assert len(model.tried) <= 8


def test_damage_in_proportion_to_size_takes_two_tries_and_a_lucky_first_size_one():
    model = Ablated(power_law(1.0, 7.0))
    assert model.search()[1] and len(model.tried) == 2
    model = Ablated(power_law(1.0, 1.0))
    assert model.search() == (1.0, True) and len(model.tried) == 1


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("heavy", [False, True], ids=["exponential", "heavy-tailed"])
def test_the_size_is_found_where_units_differ_in_what_they_do(exponent, heavy):
    n_found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        model = Ablated(units_one_by_one(rng, exponent, heavy=heavy))
        needed = float(np.exp(rng.uniform(np.log(0.5), np.log(30))))
        growth, inside = model.search(model.kl(needed), largest=60.0)
        n_found += inside
        assert model.tried[growth] >= model.kl(needed), "there is a size that reaches it, and never a gentler one is it"
        assert len(model.tried) <= 8
    assert n_found >= 36, "a single unit may do more than 10 % of the damage"


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_it_is_found_among_few_units_whenever_some_number_of_units_is_right(exponent):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        total = (np.cumsum(rng.exponential(size=1200)) / 20) ** exponent
        model = Ablated(lambda growth, total=total: float(total[max(round(growth * 20), 1) - 1]))
        target = float(np.exp(rng.uniform(np.log(0.3), np.log(10)))) ** exponent
        exists = bool(((total >= target) & (total <= 1.1 * target)).any())
        assert model.search(target, largest=60.0)[1] == exists


@seeded
@given(data=st.data(), needed=st.floats(0.2, 40), largest=st.floats(0.3, 50))
def test_whatever_the_measurements_a_gentler_control_is_never_preferred_to_one_that_reaches_the_target(
    data, needed, largest
):
    """KL jumps up and down by any factor up to 10, so no assumption of the search holds."""
    noise = {}

    def kl(growth):
        if growth not in noise:
            noise[growth] = data.draw(st.floats(0.1, 10))
        return TARGET * growth / needed * noise[growth]

    model = Ablated(kl)
    growth, inside = model.search(largest=largest)
    assert max(model.tried) <= largest and len(model.tried) <= 8
    assert inside == (TARGET <= model.tried[growth] <= 1.1 * TARGET)
    if not inside:
        reaching = [size for size, damage in model.tried.items() if damage >= TARGET]
        assert growth == (min(reaching) if reaching else max(model.tried))


@pytest.mark.parametrize(
    "kl",
    [power_law(1.0, 51.0), power_law(0.5, 1e4), lambda growth: 0.0],
    ids=["just out of reach", "far out of reach", "no damage at all"],
)
def test_a_target_out_of_reach_is_said_to_be_with_the_largest_size(kl):
    model = Ablated(kl)
    assert model.search(largest=50.0) == (50.0, False)
    assert max(model.tried) == 50.0


def test_a_kl_that_does_not_grow_is_said_to_be_out_of_reach_with_the_largest_size_tried():
    model = Ablated(lambda growth: 0.9 * TARGET)
    assert model.search() == (max(model.tried), False) and max(model.tried) > 5


def test_a_target_that_only_the_largest_size_reaches_is_found_there():
    assert Ablated(power_law(1.0, 49.0)).search(largest=50.0)[1]
    model = Ablated(lambda growth: 1.01 * TARGET if growth >= 50 else 0.0)
    assert model.search(largest=50.0) == (50.0, True)


@seeded
@given(
    exponent=st.floats(0.25, 6),
    needed=st.floats(0.1, 200),
    smallest=st.floats(0.02, 3),
    span=st.floats(1, 50),
)
def test_no_size_outside_the_bounds_is_ever_tried(exponent, needed, smallest, span):
    largest = smallest * span
    model = Ablated(power_law(exponent, needed))
    growth, inside = model.search(smallest=smallest, largest=largest)
    assert smallest <= min(model.tried) and max(model.tried) <= largest
    assert inside == (TARGET <= model.kl(growth) <= 1.1 * TARGET)
    if needed > 1.01 * largest:
        assert (growth, inside) == (largest, False)
    elif model.kl(smallest) > 1.1 * TARGET:
        assert (growth, inside) == (smallest, False)
    else:
        assert inside or needed > 0.99 * largest


def test_where_even_the_smallest_control_does_too_much_it_is_given_and_said_to():
    model = Ablated(power_law(2.0, 0.1))
    assert model.search(smallest=0.5) == (0.5, False)


def test_a_jump_over_the_target_gives_the_size_just_above_it_and_says_false():
    model = Ablated(lambda growth: 0.5 * TARGET if growth < 3 else 2 * TARGET)
    growth, inside = model.search()
    assert not inside and model.kl(growth) == 2 * TARGET and 3 <= growth < 3.5


def test_the_number_of_tries_and_the_tolerance_are_the_callers():
    model = Ablated(power_law(3.0, 20.0))
    model.search(max_tries=2)
    assert len(model.tried) == 2
    model = Ablated(power_law(2.0, 20.0))
    growth, inside = model.search(tolerance=0.01)
    assert inside and TARGET <= model.kl(growth) <= 1.01 * TARGET


def test_a_target_in_reach_of_a_nearly_flat_kl_is_found_too():
    model = Ablated(lambda growth: growth**0.1)
    assert model.search(1.2, largest=1e4)[1], (
        f"1.2 is reached at {1.2**10:.2f}, the last try was {max(model.tried):.2f}"
    )


@pytest.mark.parametrize("kl", [0.3, 1e-9])
def test_an_edit_without_any_effect_gets_the_smallest_control_and_is_no_crash(kl):
    assert Ablated(lambda growth: kl * growth).search(0.0) == (0.01, False)


# With the controls that a study draws

SITES = [Site(layer, "neurons") for layer in range(30)]
STRATA = {site: deciles(torch.arange(1.0, 101)) for site in SITES}


def edit(*units):
    """The same units in each of thirty layers."""
    return Selection({site: torch.tensor(units) for site in SITES}, {site: (100,) for site in SITES})


def grown_to(selection, needed, seed=0):
    """The search over `random_like`, each unit doing equal damage: `needed` units reach the target."""
    return size_at_kl(
        lambda growth: TARGET * len(random_like(selection, STRATA, seed=seed, growth=growth)) / needed,
        TARGET,
        bounds=(1 / max(selection.counts().values()), 9.0),
    )


@pytest.mark.parametrize("times", [0.8, 1.0, 1.5, 4.0])
def test_real_controls_of_ten_units_a_site_are_grown_to_the_target(times):
    selection = edit(*range(0, 100, 10))
    growth, inside = grown_to(selection, times * len(selection))
    control = random_like(selection, STRATA, seed=0, growth=growth)
    assert inside and times * 300 <= len(control) <= 1.1 * times * 300


@pytest.mark.parametrize("times", [1.4, 1.7, 2.4])
def test_real_controls_of_one_unit_a_site_are_grown_to_the_target(times):
    assert grown_to(edit(5), times * 30)[1]


@pytest.mark.parametrize("n", [1, 2, 3, 49, 50])
def test_at_the_smallest_growth_a_control_still_has_a_unit_at_every_site(n):
    assert len(random_like(edit(*range(n)), STRATA, seed=0, growth=1 / n)) == len(SITES)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_larger_does_no_less_damage_because_it_only_adds_units(seed):
    selection = edit(*range(0, 100, 10))
    drawn = [random_like(selection, STRATA, seed=seed, growth=growth) for growth in (1.0, 2.0, 4.0, 8.0)]
    for smaller, larger in itertools.pairwise(drawn):
        assert len(smaller - larger) == 0 and math.isclose(len(larger), 2 * len(smaller))
