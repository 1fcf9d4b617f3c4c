"""What an edit is made of: known answers of its counts, and the study on a model with planted neurons."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from page_figures import figures_of
from planted_gates import HELPS_BOTH, HURTS_BOTH, LAYER, planted_settings
from scipy import stats

from dean_interp import Gates, InputError, Selection, Site, load_model
from dean_interp.arms.composition import mean_spread, n_holding, rank_correlation, shared_units, spread_of
from dean_interp.arms.strongest_neurons import alike
from dean_interp.circuits.neuron import TextActivations
from dean_interp.circuits.neuron_view import view_from_texts, view_neuron
from dean_interp.circuits.stories import LabelCounts, activation_differences
from dean_interp.data.examples import load_behaviour

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))
FIRST, SECOND = Site(0, "neurons"), Site(1, "neurons")
SIGNED = "silencing by sign"


def of_two_layers(first, second, *, width=20):
    units = {FIRST: torch.tensor(first, dtype=torch.int64), SECOND: torch.tensor(second, dtype=torch.int64)}
    return Selection(units, {FIRST: (width,), SECOND: (width,)})


def test_an_even_edit_is_as_spread_as_its_neurons_and_a_lone_one_is_one():
    even = spread_of({FIRST: torch.ones(10), SECOND: torch.ones(10)})
    assert even.by_layer == (0.5, 0.5) and even.effective_neurons == pytest.approx(20)
    assert (even.layers_for_half, even.layers_for_most) == (1, 2)
    assert (even.neurons_for_half, even.neurons_for_most) == (10, 18)
    assert even.depth == 0.5
    lone = torch.zeros(10)
    lone[3] = 0.2
    one = spread_of({FIRST: torch.zeros(10), SECOND: lone})
    assert one.by_layer == (0.0, 1.0) and one.effective_neurons == pytest.approx(1) and one.neurons_for_most == 1
    assert one.depth == 1
    nothing = spread_of({FIRST: torch.zeros(10), SECOND: torch.zeros(10)})
    assert nothing.by_layer == (0.0, 0.0) and nothing.neurons_for_half == 0 and nothing.effective_neurons == 0


def test_parts_below_zero_count_against_the_whole():
    assert n_holding(np.array([4.0, 3.0, -1.0]), 0.5) == 1
    assert n_holding(np.array([4.0, 3.0, -1.0]), 0.9) == 2


def test_chance_overlap_is_hypergeometric_within_layers():
    first, second = of_two_layers(range(10), range(4)), of_two_layers(range(5, 15), range(10, 20))
    shared = shared_units(first, second)
    assert (shared.n_first, shared.n_second, shared.n_both) == (14, 20, 5)
    assert shared.expected == pytest.approx(10 * 10 / 20 + 4 * 10 / 20)
    in_layers = [stats.hypergeom(20, 10, 10).pmf(range(11)), stats.hypergeom(20, 4, 10).pmf(range(5))]
    exact = np.convolve(*in_layers)[5:].sum()
    assert shared.p == pytest.approx(exact, abs=0.04)
    assert shared.jaccard == pytest.approx(5 / 29) and shared.jaccard_by_chance == pytest.approx(7 / 27)
    same = shared_units(first, first)
    assert same.jaccard == 1 and same.p == pytest.approx(1 / 1000)


def test_gates_correlate_fully_with_themselves_and_inversely_with_their_opposite():
    gates = Gates({FIRST: 1 + torch.linspace(-1, 1, 11)})
    assert rank_correlation(gates, gates * 0.5) == pytest.approx(1)
    assert rank_correlation(gates, -gates) == pytest.approx(-1)


def test_random_neurons_are_alike_in_layer_and_stratum_and_none_is_taken_twice():
    strata = {FIRST: torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int16)}
    neurons = [(FIRST, 0), (FIRST, 3)]
    lot = alike(neurons, strata, seed=0, taken=neurons)
    assert lot[0][1] in (1, 2) and lot[1][1] in (4, 5)
    more = alike(neurons, strata, seed=0, taken=[*neurons, *lot])
    assert {index for _, index in [*neurons, *lot, *more]} == set(range(6))
    assert alike(neurons, strata, seed=0, taken=[*neurons, *lot, *more]) == []


def test_the_mean_of_spreads_has_the_mean_share_of_each_layer():
    lone, even = torch.tensor([1.0, 0.0]), torch.ones(2)
    mean = mean_spread([spread_of({FIRST: lone, SECOND: 0 * lone}), spread_of({FIRST: even, SECOND: even})])
    assert mean.by_layer == (0.75, 0.25) and mean.effective_neurons == pytest.approx(2.5)


def test_prompts_of_one_topic_are_told_from_random_ones():
    labels = [f"topic {i // 5}" for i in range(50)]
    counts = LabelCounts(labels, 5, n_draws=999)
    peaks = np.zeros(50)
    peaks[10:15] = 1
    alike = counts.of(peaks)
    assert (alike.label, alike.n, alike.p) == ("topic 2", 5, 1 / 1000)
    peaks = np.zeros(50)
    peaks[::10] = 1
    assert counts.of(peaks).n == 1 and counts.of(peaks).p == 1
    with pytest.raises(InputError, match="n_top must be from 1 to 50 prompts, got 51"):
        LabelCounts(labels, 51)


def test_activations_are_compared_from_where_the_answers_part():
    safe = TextActivations("a", ("p", "q", "Yes", "!"), ((9.0,), (9.0,), (1.0,), (3.0,)))
    unsafe = TextActivations("a", ("p", "q", "No"), ((9.0,), (9.0,), (5.0,)))
    assert activation_differences([safe], [unsafe], 0).tolist() == [-3.0]


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory):
    return planted_settings(tmp_path_factory.mktemp("planted_who"), tokenizer)


def test_a_look_at_texts_that_were_read_is_the_look_that_reads_them(config):
    model = load_model(config.model.name, device="cpu")
    examples = [load_behaviour(config.first, n_examples=6), load_behaviour(config.second, n_examples=6)]
    view = view_neuron(model, (Site(LAYER, "neurons"), HELPS_BOTH), examples, n_texts=12, template="raw")
    again = view_from_texts(model, (Site(LAYER, "neurons"), HELPS_BOTH), view.texts, n_texts=12)
    assert again.texts == view.texts and again.firing == view.firing and again.bins == view.bins
    assert again.activations == view.activations and again.written == view.written and again.effect == ()


@pytest.mark.slow
def test_the_planted_neurons_are_the_ones_that_do_it(config, tmp_path):
    import who_does_it as study

    given = study.Who(tmp_path / "run", fractions=(0.1, 0.3), quick=True, study=config)
    found = study.run(given)
    # The neuron that helps both and the one that hurts both stand first, with the right signs.
    assert {looked.neuron.index for looked in found.neurons} == {HELPS_BOTH, HURTS_BOTH}
    for looked in found.neurons:
        helps = looked.neuron.index == HELPS_BOTH
        assert (looked.neuron.multiplier > 1) == helps
        assert all((gain > 0) == helps for gain in looked.neuron.gain.values())
        assert (SIGNED in looked.held_by) == (not helps)
        assert (tmp_path / "run" / looked.page).is_file()
        # Their direct write tells Y from N, and the first letter of both answers is the same.
        assert "Y" in {token for token, _ in (looked.written.promoted + looked.written.suppressed)}
        assert set(looked.first_words.values()) == {0.0}
    # The model has one layer, and a few neurons do it.
    rise = found.spreads["gates, part in the rise"]
    assert rise.by_layer == (1.0,) and rise.neurons_for_half <= 4 and rise.effective_neurons < 8
    assert sum(looked.share_of_rise for looked in found.neurons) > 0.4
    # Random neurons stand beside them, none of them twice.
    beside = [looked.neuron.index for lot in found.controls for looked in lot]
    assert len(beside) == 6 and not {*beside} & {HELPS_BOTH, HURTS_BOTH} and len({*beside}) == 6
    # Every draw of topics shows them.
    for name, agreements in found.agreements.items():
        assert len(agreements) == (1 if "draws" in name else 2)
        if name.startswith("gates") and "null" not in name:
            assert all(agreement.shared.n_both == agreement.shared.n_first == 1 for agreement in agreements)
            assert all(agreement.correlation > 0.5 for agreement in agreements)
    # Silencing by sign takes what hurts both; large neurons of either sign, and of one behaviour, are coupled.
    assert found.effects[SIGNED].when_silenced["both"] == 1
    assert found.effects[SIGNED].silencing_all["first"].low > 0
    coupled = found.effects["coupled, top 10 %"]
    assert coupled.n >= 2 and coupled.when_silenced["both"] < 1
    assert found.effects["coupled, top 30 %"].share_of_rise > found.effects[SIGNED].share_of_rise
    page = (tmp_path / "run" / "report.html").read_text()
    assert found.neurons[0].page in page and "labelled by hand" in page
    (figure,) = figures_of(page)
    for name, spread in found.spreads.items():
        assert figure.numbers("share", set=name) == list(spread.by_layer)
    assert f"{found.n_neurons} neurons in {found.n_layers} layers" in figure.caption
    with (tmp_path / "run" / "where.csv").open() as file:
        assert list(csv.DictReader(file)) == figure.rows, "the same numbers beside the picture's file"
    assert study.run(given) == found, "a finished run is read from its files"


def test_scores_of_a_comparison_are_taken_and_its_folder_is_left_alone(config, tmp_path):
    import who_does_it as study

    with pytest.raises(InputError, match="does not hold all scores yet"):
        study.run(study.Who(tmp_path / "run", scores=tmp_path / "none", fractions=(0.1,), quick=True, study=config))
    first = study.run(study.Who(tmp_path / "scored", fractions=(0.1,), quick=True, study=config))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "scored").rglob("*"))
    taken = study.Who(
        tmp_path / "run", scores=tmp_path / "scored", fractions=(0.1,), beside=(tmp_path / "scored",), quick=True,
        study=config,
    )  # fmt: skip
    second = study.run(taken)
    assert second.spreads == first.spreads and second.neurons == first.neurons
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "scored").rglob("*")) == before
    assert not (tmp_path / "run" / "scores").exists()
    figure = (tmp_path / "run" / "where.svg").read_text()
    assert f">{second.model}, scored<" in figure and str(tmp_path) not in figure, "the other run, by no path"
