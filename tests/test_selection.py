"""Selections, coupling and controls, on scores made by hand: two or three sites of a few units."""

import json
import re
from contextlib import suppress
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import stats

from dean_interp import InputError, Scores, Selection, Site, couple, load_scores, random_like
from dean_interp.editing.edit import load_edit
from dean_interp.editing.edit_at_dose import load_any_edit
from dean_interp.scoring.top import Top
from dean_interp.selection.coupling import refuse_empty, smallest_coupling_fraction
from dean_interp.selection.gates import load_gates
from dean_interp.selection.selection import load_selection, strongest, top_fraction
from dean_interp.selection.strata import deciles, pooled_norm
from dean_interp.study.controls import named_selections

seeded = settings(max_examples=60)
SITES = (Site(0, "neurons"), Site(2, "neurons"))
SIZES = (5, 7)
FIRST = SITES[0]


def select(*indices, sizes=SIZES, hashes=()):
    """One list of indices a site."""
    sites = [Site(2 * i, "neurons") for i in range(len(sizes))]
    units = {site: torch.tensor(sorted(chosen), dtype=torch.int64) for site, chosen in zip(sites, indices, strict=True)}
    return Selection(units, {site: (n,) for site, n in zip(sites, sizes, strict=True)}, frozenset(hashes))


def score(*values, name="fairness", norm=None):
    """One list of scores a site."""
    values = {Site(2 * i, "neurons"): torch.tensor(one, dtype=torch.float32) for i, one in enumerate(values)}
    norms = norm or {site: torch.arange(1.0, len(value) + 1) for site, value in values.items()}
    return Scores(name, values, {s: -n for s, n in norms.items()}, norms, {}, torch.tensor([1.5, 2.5, 0.5]),
                  frozenset({f"{name} prompt"}), f"{name} fingerprint", {"method": "made up"})  # fmt: skip


def sets(selection):
    return {site: set(units.tolist()) for site, units in selection.units.items()}


def naive_top(values, fraction):
    by_score_then_index = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return set(by_score_then_index[: int(fraction * len(values))])


picks = st.tuples(*(st.sets(st.integers(0, n - 1)) for n in SIZES))  # indices: objects are made in the tests
tied_scores = st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for n in SIZES))
fractions = st.floats(0.2, 1.0)


# Set algebra


@seeded
@given(a=picks, b=picks)
def test_set_algebra_is_that_of_pythons_sets_at_every_site(a, b):
    a, b = select(*a), select(*b)
    for site in SITES:
        assert sets(a & b)[site] == sets(a)[site] & sets(b)[site]
        assert sets(a | b)[site] == sets(a)[site] | sets(b)[site]
        assert sets(a - b)[site] == sets(a)[site] - sets(b)[site]


@seeded
@given(a=picks, b=picks, c=picks)
def test_the_laws_of_sets_hold(a, b, c):
    a, b, c = select(*a), select(*b), select(*c)
    assert sets(a & b) == sets(b & a) and sets(a | b) == sets(b | a)
    assert sets((a & b) & c) == sets(a & (b & c)) and sets((a | b) | c) == sets(a | (b | c))
    assert sets(a & (b | c)) == sets((a & b) | (a & c)) and sets(a | (b & c)) == sets((a | b) & (a | c))
    assert sets(a - (b | c)) == sets((a - b) & (a - c)) and sets(a - (b & c)) == sets((a - b) | (a - c))
    assert sets(a & (a | b)) == sets(a | (a & b)) == sets(a & a) == sets(a | a) == sets(a)
    assert sets((a - b) | (a & b)) == sets(a)
    assert len(a - a) == 0 and len(a | b) == len(a) + len(b) - len(a & b)


@seeded
@given(a=picks, b=picks)
def test_combined_sets_are_ascending_and_remember_the_prompts_of_both(a, b):
    a, b = select(*a, hashes={"a", "both"}), select(*b, hashes={"b", "both"})
    for combined in (a & b, a | b, a - b):
        assert combined.prompt_hashes == {"a", "b", "both"}
        assert combined.shapes == a.shapes
        for units in combined.units.values():
            assert units.tolist() == sorted(set(units.tolist())) and units.dtype == torch.int64


@seeded
@given(a=picks)
def test_masks_counts_and_length_tell_of_the_same_units(a):
    a = select(*a)
    assert {site: set(a.mask(site).nonzero()[:, 0].tolist()) for site in SITES} == sets(a)
    assert all(a.mask(site).shape == a.shapes[site] for site in SITES)
    assert a.counts() == {site: len(chosen) for site, chosen in sets(a).items()}
    assert len(a) == sum(a.counts().values())


def test_a_mask_has_the_sites_own_shape():
    grid = Selection({FIRST: torch.tensor([1, 5])}, {FIRST: (2, 3)})
    assert grid.mask(FIRST).tolist() == [[False, True, False], [False, False, True]]


def test_the_repr_says_how_many_units_of_how_many_at_how_many_sites():
    assert repr(select([1, 3], [])) == "Selection(2 of 12 units at 1 sites)"


def test_selections_of_different_models_do_not_combine():
    with pytest.raises(InputError, match="of one model and one kind of unit"):
        select([1], [2]) & select([1], [2], sizes=(5, 8))
    with pytest.raises(InputError, match="of one model and one kind of unit"):
        select([1], [2]) | select([1], sizes=(5,))


def test_a_selection_without_the_shape_of_a_site_is_refused():
    with pytest.raises(InputError, match="the shape of every site"):
        Selection({FIRST: torch.tensor([1])}, {})


# Top fractions


@seeded
@given(values=tied_scores, fraction=fractions)
def test_the_top_is_the_naive_sort_with_ties_to_the_lower_index(values, fraction):
    assume(int(fraction * max(SIZES)) > 0)
    top = top_fraction(score(*values), fraction)
    assert sets(top) == {site: naive_top(one, fraction) for site, one in zip(SITES, values, strict=True)}
    assert top.prompt_hashes == {"fairness prompt"}


def test_equal_scores_go_to_the_lower_index():
    assert top_fraction(score([2, 7, 7, 7, 7], [0] * 7), 0.4).units[FIRST].tolist() == [1, 2]
    assert top_fraction(score([1] * 2000), 0.01).units[FIRST].tolist() == list(range(20))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.29, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("n", [1000, 1536, 4864])
def test_a_top_has_int_of_fraction_times_n_units(n, fraction):
    assert len(top_fraction(score(list(range(n))), fraction)) == int(fraction * n)


@seeded
@given(values=tied_scores, small=fractions, large=fractions)
def test_a_larger_fraction_only_adds_units(values, small, large):
    small, large = sorted((small, large))
    assert len(top_fraction(score(*values), small) - top_fraction(score(*values), large)) == 0


@seeded
@given(values=tied_scores, fraction=fractions)
def test_only_the_order_of_the_scores_matters(values, fraction):
    stretched = [[float(np.exp(one)) for one in site] for site in values]
    assert sets(top_fraction(score(*values), fraction)) == sets(top_fraction(score(*stretched), fraction))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_fraction_outside_0_to_1_is_refused_with_what_is_allowed(fraction):
    with pytest.raises(InputError, match=re.escape(f"fraction must be in (0, 1], got {fraction}")):
        top_fraction(score([1, 2], [3, 4]), fraction)


def test_a_fraction_that_selects_nothing_anywhere_is_refused_and_one_that_does_somewhere_is_not():
    values = score([1] * 5, [1] * 100)
    with pytest.raises(InputError, match=r"fraction 0.005 selects no unit; 0.01 selects one of 100"):
        top_fraction(values, 0.005)
    assert list(top_fraction(values, 0.01).counts().values()) == [0, 1]


def test_the_fraction_that_the_error_names_does_select_one():
    for n in range(2, 300):
        values = score(list(range(n)))
        with pytest.raises(InputError) as error:
            top_fraction(values, 0.5 / n)
        named = float(re.search(r"; (\S+) selects one", str(error.value))[1])
        assert len(top_fraction(values, named)) >= 1


@seeded
@given(values=tied_scores, among=picks, wanted=st.tuples(*(st.integers(0, n) for n in SIZES)))
def test_the_strongest_are_the_first_of_the_allowed_by_score_then_index(values, among, wanted):
    among = select(*among, hashes={"another prompt"})
    found = strongest(score(*values), among, dict(zip(SITES, wanted, strict=True)))
    for site, one, n in zip(SITES, values, wanted, strict=True):
        assert sets(found)[site] == set(sorted(sets(among)[site], key=lambda i: (-one[i], i))[:n])
    assert found.prompt_hashes == {"another prompt", "fairness prompt"}


# Coupling


@seeded
@given(first=tied_scores, second=tied_scores, general=tied_scores, fraction=fractions)
def test_coupling_is_the_set_definition_and_treats_both_behaviours_alike(first, second, general, fraction):
    scores = score(*first), score(*second, name="privacy"), score(*general, name="general")
    found = couple(*scores, fraction=fraction)
    tops = [[naive_top(one, fraction) for one in values] for values in (first, second, general)]
    both = [f & s for f, s in zip(*tops[:2], strict=True)]
    assert list(sets(found.both).values()) == both
    assert list(sets(found.coupled).values()) == [b - g for b, g in zip(both, tops[2], strict=True)]
    names = ("first", "second", "general", "both", "coupled")
    assert found.sizes() == {name: len(getattr(found, name)) for name in names}
    swapped = couple(scores[1], scores[0], scores[2], fraction=fraction)
    assert sets(swapped.coupled) == sets(found.coupled) and sets(swapped.first) == sets(found.second)
    assert found.coupled.prompt_hashes == {"fairness prompt", "privacy prompt", "general prompt"}


def test_coupled_is_a_set_intersection_not_a_rank_intersection():
    """Unit 1 is third for one behaviour and first for the other: no common rank, and coupled all the same."""
    first, second, general = score([9, 7, 8, 0, 0]), score([0, 9, 0, 8, 7]), score([0, 0, 1, 2, 3])
    assert couple(first, second, general, fraction=0.6).coupled.units[FIRST].tolist() == [1]


@seeded
@given(first=tied_scores, second=tied_scores, general=tied_scores)
def test_the_smallest_coupling_fraction_works_and_nothing_below_it_does(first, second, general):
    scores = score(*first), score(*second), score(*general)

    def n_coupled(fraction):
        with suppress(InputError):  # no unit in any top
            return len(couple(*scores, fraction=fraction).coupled)
        return 0

    steps = sorted({k / n for n in SIZES for k in range(1, n + 1)})  # no set changes between them
    smallest = smallest_coupling_fraction(*scores)
    if smallest is None:
        assert not any(n_coupled(step) for step in steps)
    else:
        assert n_coupled(smallest) > 0 and n_coupled(smallest * (1 - 1e-8)) == 0
        assert not any(n_coupled(step) for step in steps if step < smallest * (1 - 1e-8))


@pytest.mark.parametrize("n", [49, 1536, 4864, 100_003])
def test_the_smallest_coupling_fraction_survives_the_rounding_of_floats(n):
    for place in (0, 1, n // 3, n - 2):
        one = torch.zeros(n)
        one[:place], one[place] = 2, 1  # the only unit in question is at that place of both
        general = (2 - one).clone()
        general[place] = -1
        scores = [Scores("a", {FIRST: v}, {}, {}, {}, torch.zeros(1), frozenset(), "", {}) for v in (one, one, general)]
        smallest = smallest_coupling_fraction(*scores)
        assert len(couple(*scores, fraction=smallest).coupled) >= 1


def test_without_a_coupled_unit_the_error_gives_sizes_and_the_fraction_that_has_one():
    first, second, general = score([9, 8, 7, 0, 0]), score([0, 8, 7, 9, 0]), score([9, 0, 0, 9, 9])
    message = (
        r"no coupled unit at fraction 0.2 \(sizes {'first': 1, .*'coupled': 0}\); the smallest fraction with one is 0.4"
    )
    with pytest.raises(InputError, match=message):
        refuse_empty(couple(first, second, general, fraction=0.2), first, second, general)
    with pytest.raises(InputError, match="no fraction gives one"):
        refuse_empty(couple(first, second, first, fraction=0.2), first, second, first)


def test_the_fraction_that_the_error_of_coupled_names_does_give_one():
    for n in range(10, 400):
        first = score([n + 1, n + 2, *range(n - 2, 0, -1)])
        second, general = score([n + 1, 0, n, *range(n - 3, 0, -1)]), score([0.5, n + 9, *range(1, n - 1)])
        with pytest.raises(InputError) as error:
            refuse_empty(couple(first, second, general, fraction=1 / n + 1e-9), first, second, general)
        named = float(re.search(r"fraction with one is (\S+)", str(error.value))[1])
        assert len(couple(first, second, general, fraction=named).coupled) >= 1


# Controls

N_UNITS = 100


def decile(norm):
    """Which tenth of its site each unit's norm is in; ties by index."""
    order = sorted(range(len(norm)), key=lambda i: (norm[i], i))
    return np.argsort(order) * 10 // len(norm)


@cache
def norms(n_sites=2, seed=0):
    """Skewed, with ties, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        Site(2 * i, "neurons"): torch.randn(N_UNITS, generator=generator).exp().round(decimals=1)
        for i in range(n_sites)
    }


def strata_of(norm):
    return {site: deciles(values) for site, values in norm.items()}


def by_decile(selection, norm):
    return {
        site: np.bincount(decile(norm[site].tolist())[units.numpy()], minlength=10).tolist()
        for site, units in selection.units.items()
    }


few_units = st.tuples(*[st.sets(st.integers(0, N_UNITS - 1), max_size=5)] * 2)


@seeded
@given(chosen=few_units, seed=st.integers(0, 2**32))
def test_a_random_control_is_disjoint_and_alike_at_every_site_and_decile_of_norm(chosen, seed):
    selection = select(*chosen, sizes=(N_UNITS, N_UNITS))
    norm = norms()
    control = random_like(selection, strata_of(norm), seed=seed)
    assert len(control & selection) == 0
    assert control.counts() == selection.counts() and control.shapes == selection.shapes
    assert by_decile(control, norm) == by_decile(selection, norm)
    assert all(units.tolist() == sorted(set(units.tolist())) for units in control.units.values())


def test_a_control_remembers_the_prompts_behind_the_selection():
    selection = select([1], [2], sizes=(N_UNITS, N_UNITS), hashes={"a prompt"})
    assert random_like(selection, strata_of(norms()), seed=0).prompt_hashes == {"a prompt"}


@seeded
@given(chosen=few_units, seed=st.integers(0, 2**32), growth=st.floats(0.1, 15))
def test_a_grown_control_has_growth_times_the_units_and_shares_them_out_over_the_sites(chosen, seed, growth):
    selection = select(*chosen, sizes=(N_UNITS, N_UNITS))
    control = random_like(selection, strata_of(norms()), seed=seed, growth=growth)
    assert len(control) == round(growth * len(selection))
    for site, n in selection.counts().items():
        n_deciles = sum(count > 0 for count in by_decile(selection, norms())[site])
        assert abs(control.counts()[site] - growth * n) <= n_deciles + 1
    assert len(control & selection) == 0


def test_a_grown_control_has_growth_times_the_units_of_each_decile():
    norm = norms(1)
    selection = select([3, 14, 15, 92, 65, 35], sizes=(N_UNITS,))
    (wanted,) = by_decile(selection, norm).values()
    for growth in (2.0, 3.0):
        (found,) = by_decile(random_like(selection, strata_of(norm), seed=0, growth=growth), norm).values()
        assert found == [growth * n for n in wanted]


def test_what_a_full_stratum_cannot_give_comes_from_its_own_site():
    first, second = SITES
    strata = {first: torch.tensor([0] * 6 + [1] * 10, dtype=torch.int16), second: torch.zeros(100, dtype=torch.int16)}
    selection = select([0, 1, 2, 3, 4, 6], range(5), sizes=(16, 100))
    for seed in range(20):
        assert random_like(selection, strata, seed=seed).counts() == selection.counts()
        # A larger one adds units and drops none, up to all that there are: then the other site gives the rest.
        drawn = [random_like(selection, strata, seed=seed, growth=growth) for growth in (0.5, 1.0, 1.5, 2.0, 4.0, 9.0)]
        assert all(len(smaller - larger) == 0 for smaller, larger in pairwise(drawn))
        assert drawn[-1].counts() == {first: 10, second: 89}


@seeded
@given(chosen=few_units, seed=st.integers(0, 2**32))
def test_one_seed_gives_one_set(chosen, seed):
    selection = select(*chosen, sizes=(N_UNITS, N_UNITS))
    assert sets(random_like(selection, strata_of(norms()), seed=seed)) == sets(
        random_like(selection, strata_of(norms()), seed=seed)
    )


def test_different_seeds_give_different_sets():
    selection = select([3, 14, 15, 92, 65], sizes=(N_UNITS,))
    drawn = {tuple(random_like(selection, strata_of(norms(1)), seed=seed).units[FIRST].tolist()) for seed in range(50)}
    assert len(drawn) == 50


@seeded
@given(chosen=few_units, seed=st.integers(0, 2**32))
def test_a_whole_growth_only_adds_units_even_where_a_decile_runs_out(chosen, seed):
    selection = select(*chosen, sizes=(N_UNITS, N_UNITS))
    drawn = [random_like(selection, strata_of(norms()), seed=seed, growth=growth) for growth in (1.0, 2.0, 5.0, 13.0)]
    for smaller, larger in pairwise(drawn):
        assert len(smaller - larger) == 0


def test_any_larger_growth_only_adds_units():
    """The Alabama paradox: deciles with 1, 3 and 3 units share 10 as (2, 4, 4) and 11 as (1, 5, 5)."""
    norm = {FIRST: torch.arange(1.0, N_UNITS + 1)}
    selection = select([0, 10, 11, 12, 20, 21, 22], sizes=(N_UNITS,))
    smaller, larger = (random_like(selection, strata_of(norm), seed=0, growth=n / 7) for n in (10, 11))
    assert (smaller - larger).units[FIRST].tolist() == []


def test_what_a_decile_cannot_give_comes_from_the_rest_of_the_site():
    norm = {FIRST: torch.arange(1.0, N_UNITS + 1)}
    selection = select([0, 1, 2, 3, 4, 5, 6, 55], sizes=(N_UNITS,))  # the lowest decile has 3 left
    control = random_like(selection, strata_of(norm), seed=0)
    found = by_decile(control, norm)[FIRST]
    assert {7, 8, 9} <= sets(control)[FIRST]
    assert found[0] == 3 and sum(found) == 8 and found[5] >= 1


def test_a_control_may_take_every_unit_outside_the_selection_and_no_more():
    selection = select([*range(50)], sizes=(N_UNITS,))
    assert sets(random_like(selection, strata_of(norms(1)), seed=0)) == {FIRST: set(range(50, 100))}
    with pytest.raises(InputError, match="51 units were asked for; the sites have 50 outside the selection"):
        random_like(selection, strata_of(norms(1)), seed=0, growth=1.02)


@pytest.mark.parametrize("growth", [0.0, -1.0])
def test_a_growth_that_is_not_positive_is_refused(growth):
    with pytest.raises(InputError, match=f"growth must be positive, got {growth}"):
        random_like(select([1], [2]), strata_of(norms()), seed=0, growth=growth)


def test_within_a_decile_every_free_unit_is_drawn_equally_often():
    """Chi-square over 300 seeds, corrected for drawing without replacement; each site's draw is its own."""
    norm = norms()
    tenths = [decile(norm[site].tolist()) for site in SITES]
    chosen = [[int(unit) for t in range(0, 10, 3) for unit in np.flatnonzero(tenth == t)[:2]] for tenth in tenths]
    selection = select(*chosen, sizes=(N_UNITS, N_UNITS))
    controls = [random_like(selection, strata_of(norm), seed=seed) for seed in range(300)]
    statistic = degrees = 0
    for site, tenth, taken in zip(SITES, tenths, chosen, strict=True):
        counts = sum(control.mask(site).double() for control in controls).numpy()
        for t in range(0, 10, 3):
            free = [unit for unit in np.flatnonzero(tenth == t) if unit not in taken]
            assert counts[free].sum() == 600 and len(free) == 8
            statistic += ((counts[free] - 75) ** 2 / 75).sum() * 7 / 6
            degrees += 7
        assert counts[tenth % 3 != 0].sum() == 0, "a decile without a selected unit gives none"
    assert 0.001 < stats.chi2.sf(statistic, degrees) < 0.999


def test_sites_and_pairs_of_units_are_drawn_independently():
    """Two sites of equal norms: the same index is drawn at both no more often than chance has it."""
    norm = {site: torch.arange(1.0, N_UNITS + 1) for site in SITES}
    selection = select([0], [0], sizes=(N_UNITS, N_UNITS))
    drawn = [random_like(selection, strata_of(norm), seed=seed) for seed in range(300)]
    same = sum(control.units[SITES[0]].tolist() == control.units[SITES[1]].tolist() for control in drawn)
    assert 0.001 < stats.binom.cdf(same, 300, 1 / 9) < 0.999


def test_the_pooled_norm_is_the_root_mean_square_over_behaviours():
    one, two = (score([0, 0], norm={FIRST: torch.tensor(norm)}) for norm in ([3.0, 1.0], [4.0, 1.0]))
    assert pooled_norm([one, two])[FIRST].tolist() == pytest.approx([12.5**0.5, 1.0])


@seeded
@given(first=tied_scores, second=tied_scores, general=tied_scores, fraction=st.floats(0.3, 0.9))
def test_named_controls_keep_to_their_rule_and_to_the_coupled_sets_sizes(first, second, general, fraction):
    scores = score(*first), score(*second, name="privacy"), score(*general, name="general")
    found = couple(*scores, fraction=fraction)
    controls = named_selections(found, scores)
    allowed = {
        "fairness only": found.first - found.second - found.general,
        "privacy only": found.second - found.first - found.general,
        "all three": found.first & found.second & found.general,
        "general only": found.general - found.first - found.second,
    }
    assert list(controls) == list(allowed)
    for name, control in controls.items():
        assert len(control - allowed[name]) == 0 and len(control & found.coupled) == 0
        for site, n in control.counts().items():
            assert n == min(found.coupled.counts()[site], allowed[name].counts()[site])


# Files


def scores_to_save():
    return score([0.25, -1.0, 3.5e-8, 0.0, 7.0], [1.0] * 7)


def selection_to_save():
    return select([0, 4], [], hashes={"aé", "b"})


MADE = {"scores": (scores_to_save, load_scores), "selection": (selection_to_save, load_selection)}


@pytest.fixture(params=list(MADE))
def saved(request, tmp_path):
    """A file of each kind, and what reads it."""
    make, load = MADE[request.param]
    path = tmp_path / f"{request.param}.safetensors"
    make().save(path)
    return path, load


def test_scores_come_back_from_their_file_as_they_were(tmp_path):
    scores = scores_to_save()
    scores.save(tmp_path / "scores.safetensors")
    back = load_scores(str(tmp_path / "scores.safetensors"))
    for kind in ("values", "activation_mean", "activation_norm"):
        ours, theirs = getattr(scores, kind), getattr(back, kind)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[site], theirs[site]) and theirs[site].dtype == torch.float32 for site in ours)
    assert torch.equal(scores.loss, back.loss)
    assert (scores.behaviour, scores.prompt_hashes, scores.fingerprint) == (
        back.behaviour, back.prompt_hashes, back.fingerprint,
    )  # fmt: skip


def test_the_highest_of_more_weights_than_32_bits_count_come_back_from_their_file(tmp_path):
    site, far = Site(0, "gate"), 4_000_000_000
    top = Top((70_000, 70_000), torch.tensor([5, far]), torch.tensor([1.0, 2.0]), 1.0)
    Scores("many", {site: top}, {}, {}, {}, torch.zeros(0), frozenset(), "", {"method": "made up"}).save(tmp_path / "s")
    assert load_scores(tmp_path / "s").values[site].indices.tolist() == [5, far]


def test_a_selection_has_one_fingerprint_in_whatever_order_its_sites_are_given():
    units, shapes = {FIRST: torch.tensor([1]), SITES[1]: torch.tensor([0, 2])}, {FIRST: (5,), SITES[1]: (7,)}
    assert Selection(units, shapes).fingerprint == Selection(dict(reversed(units.items())), shapes).fingerprint


def test_sites_come_back_in_the_order_of_layers_not_of_letters(tmp_path):
    sites = [Site(layer, "neurons") for layer in (2, 9, 10, 30)]
    Selection({s: torch.tensor([0]) for s in sites}, {s: (3,) for s in sites}).save(tmp_path / "a.safetensors")
    assert list(load_selection(tmp_path / "a.safetensors").units) == sites


@seeded
@given(chosen=picks, hashes=st.sets(st.text(st.characters(exclude_categories=["Cs"])), max_size=2))
def test_a_selection_comes_back_from_its_file_as_it_was(chosen, hashes, tmp_path_factory):
    selection = select(*chosen, hashes=hashes)
    path = tmp_path_factory.mktemp("selection") / "selection.safetensors"
    selection.save(path)
    back = load_selection(path)
    assert sets(back) == sets(selection) and list(back.units) == list(selection.units)
    assert (back.shapes, back.prompt_hashes) == (selection.shapes, selection.prompt_hashes)
    assert len(back & selection) == len(selection), "it still combines"


def test_saving_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "selection.safetensors"
    select([1], [2]).save(path)
    select([3], []).save(path)
    assert sets(load_selection(path))[FIRST] == {3}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_cut_short_anywhere_is_an_input_error(saved):
    path, load = saved
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"{path.name} is damaged or not a"):
            load(path)


@pytest.mark.parametrize("text", [b"", b"not a tensor", b"{}", bytes(8), b"\xff" * 64], ids=repr)
def test_a_file_of_something_else_is_an_input_error(saved, text):
    path, load = saved
    path.write_bytes(text)
    with pytest.raises(InputError, match=f"{path.name} is damaged or not a"):
        load(path)


def test_a_missing_file_or_a_folder_is_an_input_error(saved, tmp_path):
    _, load = saved
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            load(path)


@pytest.mark.parametrize(
    ("load", "given"),
    [
        (load_scores, None),
        (load_selection, None),
        (load_scores, "dean_interp.scores.0"),
        (load_selection, "dean_interp.selection.0"),
    ],
)
def test_tensors_without_our_format_are_refused_with_the_format_that_is_read(tmp_path, load, given):
    metadata = {"dean_interp": json.dumps({"format": given, "facts": {}})} if given else None
    save_file({"L0.neurons": torch.zeros(2)}, tmp_path / "foreign.safetensors", metadata)
    message = rf"foreign.safetensors is not a \w+ file of this version \(dean_interp.\w+.\d\), got {given}"
    with pytest.raises(InputError, match=message):
        load(tmp_path / "foreign.safetensors")


def test_a_file_of_another_kind_is_named_with_the_function_that_reads_it(tmp_path):
    path = tmp_path / "file.safetensors"
    selection_to_save().save(path)
    for load, kind in ((load_scores, "scores"), (load_gates, "gates"), (load_edit, "edit")):
        said = f"{path} is not a {kind} file: it is a file of the kind 'selection', which `load_selection` reads"
        with pytest.raises(InputError, match=re.escape(said)):
            load(path)


def test_a_folder_in_place_of_a_file_is_told_the_files_in_it(tmp_path):
    selection_to_save().save(tmp_path / "chosen.safetensors")
    for load in (load_selection, load_any_edit):
        said = f"{tmp_path} is a folder, not a file: give {tmp_path / 'chosen.safetensors'}"
        with pytest.raises(InputError, match=re.escape(said)):
            load(tmp_path)
    with pytest.raises(InputError, match="is a folder, not a file, and holds no file of the kind gates"):
        load_gates(tmp_path)


def test_foreign_tensors_are_an_input_error(tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for load in (load_scores, load_selection):
        with pytest.raises(InputError):
            load(tmp_path / "model.safetensors")


def test_foreign_tensors_and_scores_are_not_called_a_bad_site_but_not_a_selection(tmp_path):
    scores_to_save().save(tmp_path / "file.safetensors")
    with pytest.raises(InputError) as error:
        load_selection(tmp_path / "file.safetensors")
    assert "not a selection file" in str(error.value)


def test_one_flipped_bit_in_the_header_is_an_input_error_or_harmless(saved):
    path, load = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with suppress(InputError):
            load(path)


def test_a_unit_that_the_site_does_not_have_is_an_input_error(tmp_path):
    facts = {"shapes": {"L0.neurons": [5]}, "prompt_hashes": []}
    metadata = {"dean_interp": json.dumps({"format": "dean_interp.selection.1", "facts": facts})}
    save_file({"L0.neurons": torch.tensor([9])}, tmp_path / "file.safetensors", metadata)
    with pytest.raises(InputError, match="some of its 5 units in ascending order"):
        load_selection(tmp_path / "file.safetensors")
