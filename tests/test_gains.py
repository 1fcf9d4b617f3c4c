"""Gains, damage and gates in closed form: each number is compared with what the model does when the gate is turned."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Scale,
    ScoringConfig,
    Selection,
    Site,
    ablate,
    importance,
    load_behaviour,
    load_scores,
    measure,
)
from dean_interp.editing.ablation import gated
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.notes import notes
from dean_interp.models.scored_prompts import measuring_scored_prompts
from dean_interp.scoring.per_example import example_scores, with_groups
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gains import Damage, Gains, damage_of, gains_of
from dean_interp.selection.gates import Gates
from dean_interp.selection.gating import GatingConfig, closed_form_gates
from dean_interp.selection.signed import signed_units
from dean_interp.statistics import clustered_interval, standard_error

MARGIN = ScoringConfig(target="margin", signed=True, groups="cluster")
FISHER = ScoringConfig(target="fisher")
SITE = Site(0, "neurons")


def one_gate(model, layer, index, change):
    multipliers = {site: torch.ones(model.cfg.d_mlp) for site in neuron_sites(model)}
    multipliers[Site(layer, "neurons")][index] += change
    return Gates(multipliers)


@pytest.fixture(scope="module")
def behaviour():
    return load_behaviour("fairness", n_examples=24, split="test")


@pytest.fixture(scope="module")
def margins(llama, behaviour):
    """Mean margins under any gates, measured."""

    def margin(gates=None):
        with gated(llama, gates) if gates else contextlib.nullcontext():
            return float(measure(llama, [behaviour])[behaviour.name].margin.mean())

    return margin


@pytest.fixture(scope="module")
def scores(llama, behaviour):
    scores = importance(llama, behaviour, config=MARGIN)
    # These tests measure what they scored.
    notes(llama).scored_prompts.clear()
    return scores


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_gain_is_the_derivative_of_the_measured_margin_by_the_gate(llama, margins, scores, layer):
    gains = gains_of(scores)
    index = int(gains.mean[Site(layer, "neurons")].abs().argmax())
    step = 0.05
    up, down = (margins(one_gate(llama, layer, index, change)) for change in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(float(gains.mean[Site(layer, "neurons")][index]), rel=0.02)


def test_one_silenced_neuron_settles_the_sign(llama, margins, scores):
    """A neuron whose gain is below 0 raises the margin when it is silenced, and lowers it where the gain is above 0."""
    gains, plain = gains_of(scores), margins()
    site = Site(2, "neurons")
    for index in (int(gains.mean[site].argmin()), int(gains.mean[site].argmax())):
        gates = one_gate(llama, 2, index, -1.0)
        change = margins(gates) - plain
        assert np.sign(change) == np.sign(gains.of(gates)) == -np.sign(float(gains.mean[site][index])) != 0


def test_the_error_of_a_gain_is_that_of_intervals_by_topic(llama, behaviour, scores):
    chosen = {site: torch.tensor([3, 11]) for site in neuron_sites(llama)}
    per_example = example_scores(llama, behaviour, chosen, config=MARGIN)
    notes(llama).scored_prompts.clear()
    gains, topics = gains_of(scores), [example.topic for example in behaviour.examples]
    assert gains.n_clusters == len(set(topics))
    for site, units in chosen.items():
        for column, unit in enumerate(units.tolist()):
            values = -per_example[site][:, column].double().numpy()
            assert float(gains.mean[site][unit]) == pytest.approx(values.mean(), rel=1e-3, abs=1e-8)
            assert float(gains.error[site][unit]) == pytest.approx(standard_error(values, topics), rel=1e-3)


def test_flipping_every_topic_changes_the_sign_and_nothing_else(scores):
    gains, topics = gains_of(scores), list(scores.clusters)
    signs = {name: -1 if i < 3 else 1 for i, name in enumerate(topics)}
    flipped = gains_of(scores, signs=dict.fromkeys(topics, -1))
    some, others = gains_of(scores, signs=signs), gains_of(scores, signs={name: -sign for name, sign in signs.items()})
    for site, mean in gains.mean.items():
        torch.testing.assert_close(flipped.mean[site], -mean)
        torch.testing.assert_close(flipped.error[site], gains.error[site])
        torch.testing.assert_close(others.mean[site], -some.mean[site])
    halves = [gains_of(scores, signs=dict.fromkeys(part, 1)) for part in (topics[:5], topics[5:])]
    sizes = [sum(scores.clusters[name] for name in part) for part in (topics[:5], topics[5:])]
    for site, mean in gains.mean.items():
        weighed = sum(size * half.mean[site] for size, half in zip(sizes, halves, strict=True)) / sum(sizes)
        torch.testing.assert_close(weighed, mean)


def test_damage_is_the_curvature_of_the_measured_kl(llama):
    """One text many times: the labels are drawn anew each time, and their mean is the exact Fisher information."""
    text = load_behaviour("general", n_examples=1, split="test").examples[0]
    example = Example(text.prompt, {"response": text.answers["response"][:40]})
    scores = importance(llama, Behaviour("general", (example,) * 400), config=FISHER)
    notes(llama).scored_prompts.clear()
    damage = damage_of(scores)
    test = [Behaviour("general", (example,), split="test")]
    original = measure(llama, test)
    step = 0.3
    for layer in range(llama.cfg.n_layers):
        site = Site(layer, "neurons")
        alone = damage.diagonal[site]
        index = int(alone.argmax())
        kls = []
        for change in (step, -step):
            gates = one_gate(llama, layer, index, change)
            with gated(llama, gates):
                kls.append(measure(llama, test, original=original)["general"].mean_kl)
            assert damage.kl(gates) == pytest.approx(float(alone[index]) * step**2 / 2, rel=1e-4)
            assert damage.kl_alone(gates) == pytest.approx(damage.kl(gates), rel=1e-4)
        assert np.mean(kls) == pytest.approx(damage.kl(gates), rel=0.2)
    # Many neurons at once, in directions that the estimate did not choose.
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        changes = {site: 0.05 * torch.randn(llama.cfg.d_mlp, generator=generator) for site in neuron_sites(llama)}
        gates = Gates({site: 1 + change for site, change in changes.items()})
        with gated(llama, gates):
            up = measure(llama, test, original=original)["general"].mean_kl
        with gated(llama, -gates):
            down = measure(llama, test, original=original)["general"].mean_kl
        assert (up + down) / 2 == pytest.approx(damage.kl(gates), rel=0.3)


def test_damage_of_a_weight_is_the_curvature_of_the_measured_kl_too(llama):
    text = load_behaviour("general", n_examples=1, split="test").examples[0]
    example = Example(text.prompt, {"response": text.answers["response"][:24]})
    scores = importance(llama, Behaviour("general", (example,) * 200), unit="weight", config=FISHER)
    notes(llama).scored_prompts.clear()
    test = [Behaviour("general", (example,), split="test")]
    original = measure(llama, test)
    for site in (Site(0, "gate"), Site(2, "out")):
        flat = scores[site].flatten()
        index = flat.argmax().reshape(1)
        none = torch.zeros(0, dtype=torch.int64)
        chosen = Selection({each: index if each == site else none for each in scores.shapes}, scores.shapes)
        kls = []
        for alpha in (1.5, 0.5):
            with ablate(llama, chosen, value=Scale(alpha)):
                kls.append(measure(llama, test, original=original)["general"].mean_kl)
        assert np.mean(kls) == pytest.approx(float(flat[index]) * 0.5**2 / 2, rel=0.3)


def made_up(first, second, error=0.0):
    gains = []
    for name, mean in (("a", first), ("b", second)):
        values = torch.tensor(mean)
        gains.append(Gains(name, {SITE: values}, {SITE: torch.full_like(values, error)}, 8, frozenset()))
    return gains


@pytest.mark.parametrize("cost", ["together", "alone"])
def test_no_other_change_of_the_same_cost_raises_the_sum_of_both_margins_more(cost):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, generator=generator) for _ in range(2))
    rows = torch.randn(8, 50, generator=generator)
    damage, n_tokens = Damage({SITE: rows}, torch.tensor([2, 3] * 4)), 20
    gains = made_up(first.tolist(), second.tolist())
    gates = closed_form_gates(*gains, damage, config=GatingConfig(cost=cost, ridge=0.5))
    diagonal = damage.diagonal[SITE]
    matrix = torch.diag(diagonal + 0.5 * diagonal.mean())
    if cost == "together":
        matrix = matrix + rows.T @ rows / n_tokens

    def efficiency(change):
        rise = sum(float(change @ each.mean[SITE]) / each.size for each in gains)
        return rise / float(change @ matrix @ change) ** 0.5

    best = gates.changes[SITE]
    expected = torch.linalg.solve(matrix, first / gains[0].size + second / gains[1].size)
    torch.testing.assert_close(best / best.norm(), expected / expected.norm(), atol=1e-4, rtol=1e-3)
    assert damage.kl_alone(gates) == pytest.approx(1.0, rel=1e-4)
    for seed in range(50):
        other = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        assert efficiency(best + 0.3 * best.norm() / 7 * other) < efficiency(best)


def test_gates_go_the_way_of_both_gains_and_settings_do_what_they_say():
    gains = made_up([1.0, -1.0, 2.0, 0.1], [1.0, -1.0, -1.9, 0.1], error=0.5)
    # Neurons that never move a prediction together.
    damage = Damage({SITE: torch.eye(4)}, torch.tensor([1, 0, 0, 0]))
    change = closed_form_gates(*gains, damage).changes[SITE]
    assert change[0] > 0 > change[1] and change[0] == pytest.approx(-float(change[1]))
    assert closed_form_gates(*gains, damage, config=GatingConfig(agree=True)).changes[SITE][2] == 0
    assert closed_form_gates(*gains, damage, config=GatingConfig(certainty=1.0)).changes[SITE][3] == 0
    silenced = closed_form_gates(*gains, damage, config=GatingConfig(silence_only=True)).changes[SITE]
    assert silenced[1] < 0 and (silenced <= 0).all()
    strongest = closed_form_gates(*gains, damage, config=GatingConfig(count=2))
    assert strongest.selection.units[SITE].tolist() == [0, 1]
    with pytest.raises(InputError, match="no neuron raises both"):
        closed_form_gates(*gains, damage, config=GatingConfig(certainty=100.0))
    with pytest.raises(InputError, match="ridge must be at least 0"):
        closed_form_gates(*gains, damage, config=GatingConfig(ridge=-1.0))


def signed_scores(name, gains, *, error):
    """Scores of the margin on two topics of one size, whose mean gains have one standard error."""
    mean = -torch.tensor(gains)
    groups = torch.stack([mean - error, mean + error])
    facts = {"method": "gradient", "target": "margin", "signed": True, "groups": "cluster"}
    return Scores(
        behaviour=name,
        values={SITE: mean},
        activation_mean={},
        activation_norm={},
        groups={SITE: groups},
        loss=torch.zeros(2),
        prompt_hashes=frozenset(),
        fingerprint=name,
        facts=facts,
        clusters={"one": 1, "two": 1},
    )


def test_signed_units_are_sets_by_the_signs_of_both_gains():
    first = signed_scores("first", [1.0, -1.0, 2.0, 0.1], error=0.5)
    second = signed_scores("second", [1.0, -1.0, -1.9, 0.1], error=0.5)
    by_signs = {}
    for signs in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
        by_signs[signs] = signed_units(first, second, first_sign=signs[0], second_sign=signs[1]).units[SITE].tolist()
    assert by_signs == {(1, 1): [0], (-1, -1): [1], (1, -1): [2], (-1, 1): []}
    certain = signed_units(first, second, first_sign=1, second_sign=1, certainty=0.1)
    assert certain.units[SITE].tolist() == [0, 3], "a gain of 0.1 is 0.2 standard errors"
    with pytest.raises(InputError, match="a sign must be"):
        signed_units(first, second, first_sign=0, second_sign=1)


def margins_anew(model, parts):
    """Mean margins on prompts that were scored, too."""
    with measuring_scored_prompts(model):
        measured = measure(model, parts)
    return {part.name: float(measured[part.name].margin.mean()) for part in parts}


def test_signed_weights_move_both_margins_the_way_their_signs_say(llama):
    parts = [load_behaviour(name, n_examples=8, split="test") for name in ("fairness", "privacy")]
    scores = []
    for part in parts:
        of_weights = importance(llama, part, unit="weight", config=MARGIN).kept(0.05)
        with pytest.raises(InputError, match="with_groups"):
            signed_units(of_weights, of_weights, first_sign=1, second_sign=1)
        scores.append(with_groups(llama, of_weights, part, config=MARGIN))
    before = margins_anew(llama, parts)
    for sign in (-1, 1):
        units = signed_units(*scores, first_sign=sign, second_sign=sign)
        assert 0 < len(units) < sum(scores[0].n_kept(site) for site in units.units)
        # A small step along one sign alone is what the first order says.
        with ablate(llama, units, value=Scale(0.98)):
            after = margins_anew(llama, parts)
        for name, margin in after.items():
            assert (margin - before[name]) * sign < 0


def test_scores_of_another_kind_are_refused(llama, scores):
    with pytest.raises(InputError, match="by topic"):
        gains_of(dataclasses.replace(scores, facts={**scores.facts, "groups": "spread"}))
    with pytest.raises(InputError, match="fisher"):
        damage_of(scores)
    with pytest.raises(InputError, match="no topic 'nowhere'"):
        gains_of(scores, signs={"nowhere": 1})
    with pytest.raises(InputError, match="two topics"):
        gains_of(scores, signs={next(iter(scores.clusters)): 1})
    with pytest.raises(InputError, match="which have no sign"):
        importance(llama, load_behaviour("general", n_examples=4), config=dataclasses.replace(FISHER, signed=True))


def test_scores_by_topic_come_back_from_their_file(scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors")
    again = load_scores(tmp_path / "scores.safetensors")
    assert dict(again.clusters) == dict(scores.clusters) and list(again.clusters) == list(scores.clusters)
    assert gains_of(again).of(Gates({s: 1 + m for s, m in gains_of(scores).mean.items()})) > 0


def test_preference_is_minus_the_loss(behaviour, scores, margins):
    interval = clustered_interval(-scores.loss.double().numpy(), [example.cluster for example in behaviour.examples])
    assert interval.mean == pytest.approx(margins(), abs=1e-4)


def test_the_gains_of_the_register_set_are_subtracted():
    first, second = made_up([1.0, 1.0], [1.0, 1.0])
    register, _ = made_up([0.0, 4.0], [0.0, 0.0])
    damage = Damage({SITE: torch.eye(2)}, torch.tensor([1, 0]))
    plain = closed_form_gates(first, second, damage).changes[SITE]
    assert plain[1] == pytest.approx(float(plain[0])), "both neurons raise both margins alike"
    config = GatingConfig(against_register=1.0)
    change = closed_form_gates(first, second, damage, register=register, config=config).changes[SITE]
    # (1 + 1) and (1 + 1 - 4 / 2): the second raises the tone as much as the behaviours
    assert change[0] > 0 and abs(float(change[1])) < 1e-6
    assert torch.equal(closed_form_gates(first, second, damage, config=config).changes[SITE], plain), "there is none"
