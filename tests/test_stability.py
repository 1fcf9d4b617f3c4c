"""Expressions, ranking within layers and the model, the released selection, and whether coupling is beyond chance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dean_interp import (
    InputError,
    Scores,
    ScoringConfig,
    Selection,
    Site,
    couple,
    importance,
    load_behaviour,
    load_scores,
    random_like,
    top_fraction,
)
from dean_interp.scoring import methods
from dean_interp.scoring.per_example import with_groups
from dean_interp.selection.expression import select, select_each
from dean_interp.selection.released import released_coupling, released_selection
from dean_interp.selection.selection import top_count
from dean_interp.selection.stability import (
    chance_overlap,
    expected_overlap,
    half_overlap,
    jaccard,
    on_groups,
    overlap_coefficient,
    selection_probability,
    stable,
)
from dean_interp.selection.strata import deciles, strata

seeded = settings(max_examples=60)
SITES = (Site(0, "gate"), Site(0, "out"), Site(1, "gate"))
SHAPE = (4, 5)
ALONE = Site(0, "neurons")


def chosen(*indices, n=100):
    return Selection({ALONE: torch.tensor(sorted(indices), dtype=torch.int64)}, {ALONE: (n,)})


def matrices(seed=0, keep=None):
    """Scores of three matrices; with `keep`, what a file would hold of them."""
    generator = torch.Generator().manual_seed(seed)
    values = {site: torch.randn(SHAPE, generator=generator) for site in SITES}
    scores = Scores(f"behaviour {seed}", values, {}, {}, {}, torch.zeros(0), frozenset(), "", {"method": "made up"})
    return scores.kept(keep) if keep else scores


def grouped(values, name="fairness"):
    """Neuron scores of 16 groups of examples, `(16, n)`."""
    groups = {ALONE: torch.as_tensor(values, dtype=torch.float32)}
    means = {ALONE: groups[ALONE].mean(0)}
    return Scores(name, means, {}, {}, groups, torch.zeros(16), frozenset(), "", {"method": "made up"})


# Ranking units together


@pytest.mark.parametrize("within", ["layer", "model"])
def test_units_ranked_together_are_the_highest_of_all_their_sites(within):
    scores = matrices()
    found = top_count(scores, 7, within=within)
    pools = {"layer": [SITES[:2], SITES[2:]], "model": [SITES]}[within]
    assert len(found) == 7 * len(pools)
    for sites in pools:
        inside = torch.cat([scores[site].flatten()[found.units[site]].abs() for site in sites])
        outside = torch.cat([scores[site].abs()[~found.mask(site)] for site in sites])
        assert inside.min() > outside.max()
    assert sum(found.layer_counts().values()) == len(found) and list(found.layer_counts()) == [0, 1]


def test_a_fraction_of_the_model_is_a_budget_for_all_its_matrices():
    found = top_fraction(matrices(), 0.25, within="model")
    assert len(found) == 15 and len(set(found.counts().values())) > 1


@seeded
@given(seed=st.integers(0, 200), count=st.integers(1, 30), keep=st.sampled_from([0.2, 0.5, 0.9]))
def test_a_file_that_kept_the_highest_gives_the_same_ranking_or_says_that_it_cannot(seed, count, keep):
    whole = top_count(matrices(seed), count, within="model")
    try:
        found = top_count(matrices(seed, keep=keep), count, within="model")
    except InputError as error:
        assert "keep more" in str(error)
        assert any(n >= int(keep * 20) for n in whole.counts().values())
    else:
        assert found.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("count", "within", "message"),
    [(0, "matrix", "from 1 to 20 a matrix"), (21, "matrix", "from 1 to 20 a matrix, got 21"),
     (61, "model", "from 1 to 60 a model")],
)  # fmt: skip
def test_a_count_out_of_range_says_what_is_allowed(count, within, message):
    with pytest.raises(InputError, match=message):
        top_count(matrices(), count, within=within)


# Expressions


SETS = {"fairness": chosen(1, 2, 3, 4), "privacy": chosen(3, 4, 5), "general": chosen(4), "refusal": chosen(2, 5, 9)}


@pytest.mark.parametrize(
    ("expression", "units"),
    [("(fairness & privacy) - general", {3}), ("fairness & privacy - general", {3}), ("fairness", {1, 2, 3, 4}),
     ("(fairness | privacy) - general - refusal", {1, 3}), ("fairness - (privacy | refusal)", {1}),
     ("  refusal & (fairness | privacy)", {2, 5})],
)  # fmt: skip
def test_an_expression_is_set_algebra(expression, units):
    assert set(select(expression, SETS).units[ALONE].tolist()) == units


def test_every_part_of_an_expression_has_its_value_and_the_whole_comes_last():
    parts = select_each("(fairness & privacy) - general", SETS)
    assert {name: len(part) for name, part in parts.items()} == {
        "fairness": 4, "privacy": 3, "fairness & privacy": 2, "general": 1, "(fairness & privacy) - general": 1,
    }  # fmt: skip
    assert list(parts)[-1] == "(fairness & privacy) - general"


@pytest.mark.parametrize(
    ("expression", "message"),
    [("fairness +", "cannot read the expression 'fairness \\+'"), ("", "cannot read"),
     ("fairness ^ privacy", "'fairness \\^ privacy' in the expression"), ("~fairness", "'~fairness' in"),
     ("fairness & cooking", "no behaviour 'cooking' in .*: there are fairness, privacy, general, refusal"),
     ("__import__('os')", "in the expression"), ("fairness & 3", "'3' in the expression")],
)  # fmt: skip
def test_an_expression_that_is_not_set_algebra_is_refused(expression, message):
    with pytest.raises(InputError, match=message):
        select(expression, SETS)


# The released selection


def test_the_released_selection_meets_the_golden_sets(shared):
    golden = np.load(shared / "golden" / "smollm2_n16_q1e-4.npz")
    matrices_ = [name.removeprefix("released/") for name in golden if name.startswith("released/")]
    assert len(matrices_) == 90
    for name in matrices_:
        n_rows, n_columns = len(golden[f"privacy/{name}/row_sum"]), len(golden[f"privacy/{name}/col_sum"])
        scores = []
        for behaviour in ("privacy", "fairness", "general"):
            dense = torch.zeros(n_rows * n_columns)
            dense[torch.from_numpy(golden[f"{behaviour}/{name}/top"]).long()] = 1.0
            scores.append(dense.reshape(n_rows, n_columns))
        with pytest.warns(UserWarning, match="not an intersection"):
            found = released_selection(*scores, fraction=1e-4)
        assert found.tolist() == golden[f"released/{name}"].tolist()


def test_the_released_coupling_of_scores_is_the_released_selection_of_every_matrix(tiny):
    scores = [methods.random(tiny, load_behaviour(name, n_examples=2), unit="weight", seed=seed)
              for seed, name in enumerate(("fairness", "privacy", "general"))]  # fmt: skip
    with pytest.warns(UserWarning, match="not an intersection"):
        found = released_coupling(*scores, fraction=0.2)
        for site, (d_in, d_out) in scores[0].shapes.items():
            flat = released_selection(*(one[site].T.contiguous() for one in scores), fraction=0.2)
            chosen = torch.zeros(d_out, d_in, dtype=torch.bool)
            chosen.view(-1)[flat] = True
            assert torch.equal(found.units[site], chosen.T.flatten().nonzero()[:, 0])
    for fraction in (-0.5, 0.0, 1.5):
        with pytest.raises(InputError, match=r"fraction must be in \(0, 1\]"):
            released_coupling(*scores, fraction=fraction)
    neurons = methods.random(tiny, load_behaviour("fairness", n_examples=2), unit="neuron")
    with pytest.raises(InputError, match="selects weights"):
        released_coupling(neurons, neurons, neurons, fraction=0.2)


def test_the_released_selection_depends_on_order_and_layout_and_coupling_does_not():
    generator = torch.Generator().manual_seed(0)
    first, second, general = (torch.rand(30, 40, generator=generator) for _ in range(3))
    with pytest.warns(UserWarning):
        found = released_selection(first, second, general, fraction=0.1)
        swapped = released_selection(second, first, general, fraction=0.1)
        turned = released_selection(first.T, second.T, general.T, fraction=0.1)
    assert set(found.tolist()) != set(swapped.tolist())
    back = {(i % 30) * 40 + i // 30 for i in turned.tolist()}
    assert set(found.tolist()) != back


@pytest.mark.parametrize(
    ("fraction", "message"),
    [((0.1, 0.2), "one fraction"), (0.0, "in \\(0, 1\\]"), (1e-3, "selects none of 20 weights")],
)
def test_what_the_released_code_cannot_do_is_refused(fraction, message):
    with pytest.raises(InputError, match=message):
        released_selection(*[torch.rand(4, 5)] * 3, fraction=fraction)


# More than chance?


def test_overlap_measures_by_hand():
    first, second = chosen(*range(0, 20)), chosen(*range(10, 50))
    assert jaccard(first, second) == 10 / 50 and overlap_coefficient(first, second) == 10 / 20
    assert expected_overlap(first, second) == 20 * 40 / 100
    assert jaccard(chosen(), chosen()) == overlap_coefficient(chosen(), first) == 0


def test_the_floor_is_the_mean_of_shuffles_within_strata():
    rng = np.random.default_rng(0)
    strata = {ALONE: torch.from_numpy(rng.integers(0, 3, 100).astype(np.int16))}
    first, second = (chosen(*rng.permutation(100)[:30].tolist()) for _ in range(2))
    floor = chance_overlap(first, second, strata, n_draws=4000)
    codes, shuffled = strata[ALONE].numpy(), []
    mine, theirs = first.mask(ALONE).numpy(), second.mask(ALONE).numpy()
    for _ in range(4000):
        moved = theirs.copy()
        for code in range(3):
            moved[codes == code] = rng.permutation(theirs[codes == code])
        shuffled.append(int((moved & mine).sum()))
    assert floor.expected == pytest.approx(np.mean(shuffled), abs=0.2)
    assert (floor.low, floor.high) == pytest.approx(tuple(np.quantile(shuffled, (0.025, 0.975))), abs=1)


def test_the_rank_of_independent_selections_is_uniform_and_a_built_in_coupling_is_found():
    rng = np.random.default_rng(1)
    strata = {ALONE: deciles(torch.from_numpy(rng.random(1000)))}
    ranks = []
    for seed in range(200):
        first, second = (chosen(*rng.permutation(1000)[:200].tolist(), n=1000) for _ in range(2))
        ranks.append(chance_overlap(first, second, strata, seed=seed, n_draws=499).p)
    assert 0.02 < np.mean(np.array(ranks) <= 0.1) < 0.2
    shared_units = rng.permutation(1000)[:60].tolist()
    first, second = (chosen(*{*shared_units, *rng.permutation(1000)[:140].tolist()}, n=1000) for _ in range(2))
    floor = chance_overlap(first, second, strata)
    assert floor.p == 1 / 1000 and floor.n > floor.high > floor.expected > floor.low


def test_what_strata_explain_is_not_called_coupling():
    """Both behaviours choose the units of the highest stratum, independently: far above plain chance, at the floor."""
    rng = np.random.default_rng(2)
    strata = {ALONE: deciles(torch.arange(1000.0))}
    high = np.arange(900, 1000)
    first, second = (chosen(*rng.permutation(high)[:50].tolist(), n=1000) for _ in range(2))
    floor = chance_overlap(first, second, strata)
    assert floor.n > 5 * expected_overlap(first, second) and floor.p > 0.01


def test_excluded_units_are_in_neither_the_overlap_nor_its_floor():
    strata = {ALONE: torch.zeros(100, dtype=torch.int16)}
    first, second, general = chosen(*range(40)), chosen(*range(20, 60)), chosen(*range(30, 50))
    floor = chance_overlap(first, second, strata, excluded=general)
    assert floor.n == len((first & second) - general) == 10
    assert floor.expected == 30 * 20 / 80


def test_halves_of_one_behaviour_agree_more_than_two_unrelated_behaviours():
    rng = np.random.default_rng(3)
    own, other = rng.random(400), rng.random(400)
    first, second = (grouped(base + 0.2 * rng.random((16, 400))) for base in (own, other))
    ceiling = half_overlap(first, first, fraction=0.1)
    between = half_overlap(first, second, fraction=0.1)
    assert 0.6 < ceiling.mean <= 1 and between.mean < 0.2 and ceiling.low > between.high
    assert half_overlap(first, first, fraction=0.1) == ceiling


def test_a_unit_that_every_example_needs_is_stable_and_one_that_a_single_example_needs_is_not():
    values = np.full((16, 50), 0.1) + 0.01 * np.arange(50) / 50
    values[:, 7] = 1.0
    values[3, 9] = 4.0  # the mean of its groups is above the rest, by one group of examples
    scores = [grouped(values), grouped(values, "privacy"), grouped(np.roll(values, 20, axis=1), "general")]

    def rule(drawn):
        return couple(*drawn, fraction=0.04).coupled

    found = rule(scores)
    assert set(found.units[ALONE].tolist()) == {7, 9}
    probability = selection_probability(scores, rule, n_draws=200)
    assert probability[ALONE][7] == 1.0 and probability[ALONE][9] < 0.75
    assert stable(probability, found).units[ALONE].tolist() == [7]


def test_scores_without_groups_say_how_to_get_them():
    with pytest.raises(InputError, match="takes a second pass"):
        half_overlap(matrices(), matrices(), fraction=0.1)
    one = grouped(np.ones((1, 5)))
    with pytest.raises(InputError, match="come from one example"):
        half_overlap(one, one, fraction=0.2)
    assert torch.equal(on_groups(grouped(np.eye(16)), [2, 2]).values[ALONE], torch.eye(16)[2])


# On a model


@pytest.fixture(scope="module")
def behaviour():
    return load_behaviour("fairness", n_examples=8)


def test_groups_of_weights_average_to_their_scores(llama, behaviour, tmp_path):
    scores = importance(llama, behaviour, unit=("neuron", "weight")).kept(0.05)
    found = with_groups(llama, scores, behaviour)
    for site, value in found.of("weight").values.items():
        groups = found.groups[site]
        assert groups.shape == (8, len(value.indices))
        torch.testing.assert_close(groups.mean(0), value.values, rtol=1e-4, atol=1e-8)
    for site, groups in scores.of("neuron").groups.items():
        assert torch.equal(found.groups[site], groups)
    weights = found.of("weight")
    ceiling = half_overlap(weights, weights, fraction=0.02, n_splits=10)
    assert 0 < ceiling.low <= ceiling.mean <= ceiling.high <= 1
    again = on_groups(weights, range(8))
    assert top_fraction(again, 0.02).fingerprint == top_fraction(weights, 0.02).fingerprint
    # Groups stay with the units that are kept, in memory and in a file.
    for keep in (0.05, 0.02):
        path = tmp_path / f"{keep}.safetensors"
        found.save(path, keep=keep)
        fewer, loaded = weights.kept(keep), load_scores(path).of("weight")
        for site, value in fewer.values.items():
            torch.testing.assert_close(fewer.groups[site].mean(0), value.values, rtol=1e-4, atol=1e-8)
            assert torch.equal(loaded.groups[site], fewer.groups[site])


def test_groups_are_taken_as_their_scores_were(llama, behaviour):
    scores = importance(llama, behaviour, unit="weight", keep=0.05)
    with pytest.raises(InputError, match="made with target='response', and their groups would be with 'margin'"):
        with_groups(llama, scores, behaviour, config=ScoringConfig(target="margin"))
    with pytest.raises(InputError, match="made with signed=False"):
        with_groups(llama, scores, behaviour, config=ScoringConfig(signed=True))


def test_all_groups_give_the_scores_again_however_many_examples_each_holds(llama):
    nine = load_behaviour("fairness", n_examples=9)
    configs = [ScoringConfig(groups="cluster"), ScoringConfig(target="fisher"), ScoringConfig()]
    examples = [nine, nine, load_behaviour("fairness", n_examples=21)]
    for config, scored in zip(configs, examples, strict=True):
        scores = importance(llama, scored, config=config)
        n_groups = len(scores.groups[ALONE])
        again = on_groups(scores, range(n_groups))
        for site, value in scores.values.items():
            torch.testing.assert_close(again.values[site], value, rtol=1e-4, atol=1e-9)


def test_halves_of_behaviours_with_other_numbers_of_groups_are_halves_of_each():
    rng = np.random.default_rng(4)
    many, few = grouped(rng.random((16, 400))), grouped(rng.random((10, 400)))
    for first, second in ((many, few), (few, many)):
        assert half_overlap(first, second, fraction=0.1).mean < 0.2


def test_groups_of_other_examples_or_of_whole_matrices_are_refused(llama, behaviour):
    scores = importance(llama, behaviour, unit="weight")
    with pytest.raises(InputError, match="the highest of each matrix"):
        with_groups(llama, scores, behaviour)
    with pytest.raises(InputError, match="scores of other examples"):
        with_groups(llama, scores.kept(), load_behaviour("privacy", n_examples=8))


@pytest.mark.parametrize("unit", ["neuron", "weight"])
@pytest.mark.parametrize("keep", [1.0, 0.1])
def test_controls_can_be_matched_on_the_general_score_too(llama, unit, keep):
    scores = [importance(llama, load_behaviour(name, n_examples=6), unit=unit).kept(keep)
              for name in ("fairness", "privacy", "general")]  # fmt: skip
    plain, matched = strata(llama, scores), strata(llama, scores, general=scores[2])
    found = couple(*scores, fraction=0.075).coupled
    control = random_like(found, matched, seed=1)
    assert control.counts() == found.counts() and len(control & found) == 0
    for site, codes in matched.items():
        assert torch.equal(codes % 100, plain[site] % 100)
        levels = codes // 100
        assert set(levels.unique().tolist()) <= set(range(10)) and levels.float().std() > 0
        highest = scores[2].top(site, int(0.075 * codes.numel()))
        assert (levels.flatten()[highest] == 9).all()
