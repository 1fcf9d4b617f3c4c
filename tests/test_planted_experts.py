"""A planted neuron of a rarely routed expert is found by what texts route, and nothing else is blamed."""

from dataclasses import replace

import pytest
import torch
from planted_coupling import LAYER, behaviour, margins
from planted_experts import D_EXPERT, N_EXPERTS, ONLY_F, ONLY_G, ONLY_P, RARE, SHARED, planted_mixture

from dean_interp import InputError, ScoringConfig, Site, ablate, couple, importance, load_model, random_like
from dean_interp.circuits.neuron import strongest_neurons
from dean_interp.selection.selection import top_fraction
from dean_interp.selection.strata import strata
from dean_interp.selection.whole_experts import expert_scores, top_experts

SITE = Site(LAYER, "experts", N_EXPERTS)


@pytest.fixture(scope="module")
def planted(tokenizer):
    return load_model(planted_mixture(tokenizer), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def scores(planted):
    return [importance(planted, behaviour(letter, 0), config=ScoringConfig(template="raw")) for letter in "fpg"]


@pytest.fixture(scope="module")
def found(scores):
    return couple(*scores, fraction=0.0188)  # three neurons a layer


@pytest.fixture(scope="module")
def tests():
    return [behaviour(letter, 500) for letter in "fpg"]


def test_its_expert_is_rarely_routed(scores):
    for behaviour_scores in scores:
        share = behaviour_scores.slots[SITE][RARE] / behaviour_scores.slots[SITE].sum()
        assert 0 < share < 0.1


def test_the_shared_neuron_is_found_and_the_single_minded_ones_are_not(scores, found):
    assert strongest_neurons(found.coupled, scores[0], scores[1], n_neurons=1) == [(SITE, SHARED)]
    assert not {ONLY_F, ONLY_P, ONLY_G} & set(found.coupled.units[SITE].tolist())


def test_silencing_it_takes_both_behaviours_away_and_leaves_general_ability(planted, found, tests):
    before, perplexity = margins(planted, tests)
    with ablate(planted, found.coupled):
        after, perplexity_after = margins(planted, tests)
    for had, has in zip(before, after, strict=True):
        assert had > 0.5 and has < 0.35 * had
    assert perplexity_after == pytest.approx(perplexity, rel=0.1)


def test_controls_are_drawn_from_experts_that_are_routed_as_often(planted, scores, found, tests):
    before, _ = margins(planted, tests)
    matched, n_compared = strata(planted, scores), 0
    share = torch.stack([each.slots[SITE] / each.slots[SITE].sum() for each in scores]).mean(0)
    fifth_of = share.argsort().argsort() * 5 // N_EXPERTS
    wanted = sorted(fifth_of[found.coupled.units[SITE] // D_EXPERT].tolist())
    for seed in range(12):
        control = random_like(found.coupled, matched, seed=seed)
        assert sorted(fifth_of[control.units[SITE] // D_EXPERT].tolist()) == wanted
        if set(control.units[SITE].tolist()) & {ONLY_F, ONLY_P}:
            continue
        with ablate(planted, control):
            after, _ = margins(planted, tests)
        assert after == pytest.approx(before, abs=0.15 * min(before))
        n_compared += 1
    assert n_compared >= 6, "enough draws hit no planted neuron"


def test_whole_experts_are_ranked_by_the_sum_over_their_neurons(planted, scores, tests):
    totals = expert_scores(scores[0])[SITE]
    assert totals[RARE] == pytest.approx(float(scores[0][SITE][RARE * D_EXPERT : (RARE + 1) * D_EXPERT].sum()))
    assert int(totals.argmax()) == RARE
    coupled = top_experts(scores[0], 0.125) & top_experts(scores[1], 0.125)
    coupled = coupled - top_experts(scores[2], 0.125)
    assert coupled.units[SITE].tolist() == list(range(RARE * D_EXPERT, (RARE + 1) * D_EXPERT))
    before, _ = margins(planted, tests)
    with ablate(planted, coupled):
        after, _ = margins(planted, tests)
    assert all(has < 0.2 * had for had, has in zip(before, after, strict=True))


def test_an_expert_without_a_token_is_never_chosen(scores):
    unseen = {site: slots.clone() for site, slots in scores[0].slots.items()}
    unseen[SITE][RARE] = 0
    chosen = top_experts(replace(scores[0], slots=unseen), 1.0).units[SITE]
    assert len(chosen) == (N_EXPERTS - 1) * D_EXPERT and not (chosen // D_EXPERT == RARE).any()
    with pytest.raises(InputError, match="fraction must be in"):
        top_experts(scores[0], 0.0)


def test_the_top_of_a_layer_is_the_top_over_all_its_experts(scores):
    top = top_fraction(scores[0], 1 / (N_EXPERTS * D_EXPERT))
    assert top.units[SITE].tolist() == [SHARED]
