"""A tiny model in which one neuron is built to serve two behaviours: it must be found, and nothing else blamed."""

import pytest
from planted_coupling import LAYER, ONLY_F, ONLY_G, ONLY_P, SHARED, behaviour, margins, planted_model

from dean_interp import (
    ScoringConfig,
    Site,
    ablate,
    couple,
    importance,
    load_model,
    random_like,
)
from dean_interp.circuits.neuron import strongest_neurons
from dean_interp.selection.strata import strata
from dean_interp.study.controls import named_selections

pytestmark = pytest.mark.hooks


@pytest.fixture(scope="module")
def planted(tokenizer):
    return load_model(planted_model(tokenizer), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def scores(planted):
    return [importance(planted, behaviour(letter, 0), config=ScoringConfig(template="raw")) for letter in "fpg"]


@pytest.fixture(scope="module")
def found(scores):
    return couple(*scores, fraction=0.075)  # three neurons a layer


@pytest.fixture(scope="module")
def tests():
    return [behaviour(letter, 500) for letter in "fpg"]


def test_the_shared_neuron_is_found_and_the_single_minded_ones_are_not(scores, found):
    assert strongest_neurons(found.coupled, scores[0], scores[1], n_neurons=1) == [(Site(LAYER, "neurons"), SHARED)]
    chosen = found.coupled.units[Site(LAYER, "neurons")].tolist()
    assert not {ONLY_F, ONLY_P, ONLY_G} & set(chosen)


def test_silencing_it_takes_both_behaviours_away_and_leaves_general_ability(planted, found, tests):
    before, perplexity = margins(planted, tests)
    with ablate(planted, found.coupled):
        after, perplexity_after = margins(planted, tests)
    for had, has in zip(before, after, strict=True):
        assert had > 0.5 and has < 0.35 * had
    assert perplexity_after == pytest.approx(perplexity, rel=0.1)


def test_matched_random_controls_leave_both_behaviours_unmoved(planted, scores, found, tests):
    before, _ = margins(planted, tests)
    matched, n_compared = strata(planted, scores), 0
    for seed in range(30):
        control = random_like(found.coupled, matched, seed=seed)
        if set(control.units[Site(LAYER, "neurons")].tolist()) & {ONLY_F, ONLY_P}:
            continue  # a draw may hit a neuron that was planted for one of them
        with ablate(planted, control):
            after, _ = margins(planted, tests)
        assert after == pytest.approx(before, abs=0.15 * min(before))
        n_compared += 1
    assert n_compared >= 10, "enough draws hit no planted neuron"


def test_top_of_one_behaviour_moves_that_one_alone(planted, scores, found, tests):
    before, _ = margins(planted, tests)
    controls = named_selections(found, scores)
    assert ONLY_F in controls["fairness only"].units[Site(LAYER, "neurons")]
    with ablate(planted, controls["fairness only"]):
        after, _ = margins(planted, tests)
    assert after[0] < before[0] - 0.05
    assert after[1] == pytest.approx(before[1], abs=0.05)
