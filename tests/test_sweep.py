"""Sweeps: every combination measured once, the front chosen on one half of the topics and confirmed on the other."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_figures import figures_of

from dean_interp import InputError, importance, load_behaviour
from dean_interp.cli.main import main
from dean_interp.report.html import options_of, write_sweep_report
from dean_interp.report.page import INTERVALS, minus
from dean_interp.scoring.methods import wanda, wanda_from
from dean_interp.study import settings as settings_module
from dean_interp.study import store
from dean_interp.study.config import SweepConfig
from dean_interp.study.controls import RANDOM_CONTROLS
from dean_interp.study.pareto import halves, objectives, pareto_front
from dean_interp.study.settings import CalibrationConfig, ControlConfig, DataConfig, ModelConfig
from dean_interp.study.sweep import load_sweep, run_sweep

pytestmark = pytest.mark.slow

seeded = settings(max_examples=60)


@pytest.fixture(scope="module")
def config(checkpoints):
    return SweepConfig(
        model=ModelConfig(str(checkpoints["llama-gqa"]), device="cpu"),
        data=DataConfig(n_test=20, n_general_test=12),
        calibration=CalibrationConfig(n_calibration=12),
        neuron_fractions=(0.075,),
        weight_fractions=(0.03,),
        methods=("importance", "wanda", "random"),
        values=("0", "0.5", "mean"),
        controls=ControlConfig(n_random=2, n_equal_kl=0),
    )


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run_sweep(config, folder)


def test_every_combination_is_a_point_or_selects_nothing(config, swept):
    _, sweep = swept
    tried = [(point.unit, point.method, point.fraction, point.value) for point in sweep.points]
    wanted = [each for each in config.combinations() if f"{each[0]} {each[1]} {each[2]:g}" not in sweep.empty]
    assert tried == wanted and len(set(tried)) == len(tried)
    assert {point.unit for point in sweep.points} == {"neuron", "weight"}
    assert {point.method for point in sweep.points if point.unit == "weight"} >= {"importance"}
    assert not any(point.value == "mean" for point in sweep.points if point.unit == "weight")


def test_half_a_dose_does_less_to_general_text_than_a_whole_one(swept):
    _, sweep = swept
    by_name = {point.name: point for point in sweep.points}
    whole = [point for point in sweep.points if point.value == "0" and point.method == "importance"]
    assert {point.unit for point in whole} == {"neuron", "weight"}
    for point in whole:
        half = by_name[point.name.replace(" x0", " x0.5")]
        assert half.n_units == point.n_units
        halved, whole_dose = objectives(half.chosen_on)["ability"], objectives(point.chosen_on)["ability"]
        assert abs(halved.mean) < abs(whole_dose.mean) + 1e-3


def test_the_front_is_that_of_the_choosing_half_and_has_controls(swept):
    _, sweep = swept
    means = [{name: one.mean for name, one in objectives(point.chosen_on).items()} for point in sweep.points]
    front = pareto_front(means)
    assert [point.on_front for point in sweep.points] == front and any(front)
    for point in sweep.points:
        assert len(point.controls) == (2 if point.on_front else 0)
        assert all(set(objectives(control)) == set(sweep.objectives) for control in point.controls)
        ranks = [line.rank for line in point.confirmed_on.lines]
        assert any(rank is not None for rank in ranks) == point.on_front


def test_the_halves_share_no_topic_and_are_all_prompts():
    behaviour = load_behaviour("fairness", n_examples=48, split="test")
    chosen = halves(behaviour)
    topics = [{example.topic for example, row in zip(behaviour.examples, chosen, strict=True) if row == wanted}
              for wanted in (True, False)]  # fmt: skip
    assert not topics[0] & topics[1] and 0.3 < chosen.mean() < 0.7


def test_a_killed_sweep_goes_on_and_ends_in_the_same_bytes(config, swept, tmp_path, monkeypatch):
    folder, _ = swept
    measured, real = [], store.Store.measurement

    def dies(self, model, state, **options):
        measured.append(state.title)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return real(self, model, state, **options)

    monkeypatch.setattr(store.Store, "measurement", dies)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, tmp_path)
    monkeypatch.setattr(store.Store, "measurement", real)
    run_sweep(config, tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == (folder / "sweep.json").read_bytes()


def test_a_finished_sweep_is_not_done_again_and_other_settings_do_not_touch_it(config, swept, monkeypatch):
    folder, sweep = swept
    monkeypatch.setattr(settings_module, "load_model", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert run_sweep(config, folder) == sweep == load_sweep(folder / "sweep.json")
    with pytest.raises(InputError, match=r"another n_random \(2 there, 1 now\)"):
        run_sweep(dataclasses.replace(config, controls=ControlConfig(n_random=1, n_equal_kl=0)), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"values": ("half",)}, "a value is a finite number"), ({"neuron_fractions": (0.0,)}, r"must be in \(0, 1\]"),
     ({"weight_fractions": (1e-4,)}, "selects no unit"),
     ({"neuron_fractions": (1.0,), "weight_fractions": (1.0,)}, "no combination selects a unit")],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused(config, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_sweep(dataclasses.replace(config, **changes), tmp_path)


def test_wanda_from_gradient_scores_is_wanda(llama):
    behaviour = load_behaviour("fairness", n_examples=4)
    scores, own = importance(llama, behaviour, unit="weight"), wanda(llama, behaviour)
    again = wanda_from(llama, scores)
    for site, values in own.values.items():
        np.testing.assert_allclose(again[site], values, rtol=1e-5)
    assert again.facts["method"] == "wanda" and again.fingerprint != scores.fingerprint
    with pytest.raises(InputError, match="Wanda needs what matrices read"):
        wanda_from(llama, importance(llama, behaviour))


points = st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * 3), min_size=1, max_size=12)


@seeded
@given(table=points)
def test_the_front_is_what_nothing_dominates(table):
    front = pareto_front([dict(zip("abc", row, strict=True)) for row in table])
    for i, row in enumerate(table):
        dominated = any(all(x >= y for x, y in zip(other, row, strict=True)) and other != row for other in table)
        assert front[i] == (not dominated), i


def test_the_report_shows_every_edit_and_the_command_says_the_headline(config, swept, tmp_path, capsys):
    folder, sweep = swept
    text = write_sweep_report(sweep, tmp_path).read_text()
    assert all(f"<td>{point.name}</td>" in text for point in sweep.points)
    (figure,) = figures_of(text)
    assert f"{len(sweep.points)} edits" in figure.caption
    for point in sweep.points:
        for name, change in objectives(point.confirmed_on).items():
            assert figure.numbers("mean_nats_per_token", edit=point.name, objective=name) == [change.mean]
    front = [point for point in sweep.points if point.on_front]
    labels = [RANDOM_CONTROLS[name].label for name in ("random", "equal KL")]
    n_drawn = [config.controls.n_random, config.controls.n_equal_kl]
    assert [text.count(f"random, {label}</td>") for label in labels] == [len(front) if n else 0 for n in n_drawn]
    metrics = {line.metric for line in sweep.points[0].confirmed_on.lines}
    assert len(metrics) >= 3 and all(f"<h3>{metric} <span" in text for metric in metrics)
    assert text.count(INTERVALS) == 1
    options = options_of(config, SweepConfig())
    assert main(["sweep", *options, "--out", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert minus(record["headline"]) in (folder / "sweep.html").read_text().replace("&#39;", "'")
    assert record["front"] == [point.name for point in sweep.points if point.on_front]
