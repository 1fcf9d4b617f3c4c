"""Units that help or hurt are found with their sign, gates raise both behaviours, and chance is not called a rise."""

import sys
from pathlib import Path

import pytest
import torch
from planted_gates import (
    GENERAL,
    HELPS_BOTH,
    HELPS_FIRST,
    HELPS_SECOND,
    HURTS_BOTH,
    LAYER,
    OPPOSED,
    planted_model,
    write_data,
    write_register,
)

from dean_interp import (
    AnswerConfig,
    InputError,
    ModelConfig,
    ScoringConfig,
    Site,
    importance,
    load_behaviour,
    load_model,
)
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.selection.gains import damage_of, gains_of
from dean_interp.selection.gating import GatingConfig, benefit_of, closed_form_gates
from dean_interp.selection.iterated import climb, gates_of_scores
from dean_interp.selection.signed import signed_units
from dean_interp.study.improve import run_improve
from dean_interp.study.improvement import ImproveConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))
SITE = Site(LAYER, "neurons")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted_gates") / "model"
    planted_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder, data, **changes):
    settings = {"n_score": 20, "n_choose": 12, "n_confirm": 32, "n_flips": 20, "n_random": 2, "max_kl": 0.02}
    return ImproveConfig(
        model=ModelConfig(str(folder), template="raw", device="cpu"),
        first=data["first"],
        second=data["second"],
        general=data["general"],
        answers=AnswerConfig(n_answers=0),
        **({"register": None} | settings | changes),
    )


@pytest.fixture(scope="module")
def effects(folder, tmp_path_factory):
    """Scores of both margins by topic, and of the damage to general text, on the calibration half."""
    data = write_data(tmp_path_factory.mktemp("data"), n_topics=32, n_each=2, real=(True, True))
    model = load_model(folder, device="cpu")
    margin = ScoringConfig(template="raw", target="margin", signed=True, groups="cluster")
    fisher = ScoringConfig(template="raw", target="fisher")
    scores = []
    for name, config in (("first", margin), ("second", margin), ("general", fisher)):
        scores.append(importance(model, load_behaviour(data[name], n_examples=None), config=config))
    return scores


@pytest.fixture(scope="module")
def gains(effects):
    """Gains of both behaviours and damage."""
    first, second, general = effects
    return gains_of(first), gains_of(second), damage_of(general)


def test_every_planted_unit_is_found_with_its_sign(effects, gains):
    first, second, _ = gains
    found = {}
    for signs in ((1, 1), (-1, -1), (1, -1)):
        units = signed_units(*effects[:2], first_sign=signs[0], second_sign=signs[1])
        # Random neurons have gains, too: the planted ones are the largest.
        sizes = (first.mean[SITE].abs() + second.mean[SITE].abs())[units.units[SITE]]
        found[signs] = int(units.units[SITE][sizes.argmax()])
    assert found == {(1, 1): HELPS_BOTH, (-1, -1): HURTS_BOTH, (1, -1): OPPOSED}
    for helper, own, other in ((HELPS_FIRST, first, second), (HELPS_SECOND, second, first)):
        assert own.mean[SITE][helper] > 10 * abs(other.mean[SITE][helper])


def test_gates_turn_the_planted_units_the_right_way_and_spare_general_text(gains):
    first, second, damage = gains
    gates = closed_form_gates(first, second, damage)
    change = gates.changes[SITE]
    assert change[HELPS_BOTH] > 0 > change[HURTS_BOTH]
    assert change[HELPS_FIRST] > 0 and change[HELPS_SECOND] > 0
    assert damage.diagonal[SITE].argmax() == GENERAL
    assert abs(float(change[GENERAL])) < 0.05 * float(change.abs().max())
    assert abs(float(change[OPPOSED])) < 0.2 * float(change[HELPS_BOTH]), "what it gives to one it takes from the other"


def test_proximal_steps_end_in_the_closed_form_and_a_threshold_leaves_neurons_alone(effects):
    first, second, general = effects
    benefit = benefit_of(gains_of(first), gains_of(second), None, GatingConfig())
    damage = damage_of(general)
    *_, last = climb(benefit, damage, GatingConfig(folds=2))
    closed = closed_form_gates(gains_of(first), gains_of(second), damage).changes[SITE]
    assert torch.nn.functional.cosine_similarity(last[SITE], closed, dim=0) > 0.999
    *_, sparse = climb(benefit, damage, GatingConfig(folds=2, sparsity=0.3))
    assert 0 < int((sparse[SITE] != 0).sum()) < len(closed) / 2


def test_folds_stop_the_steps_and_turn_the_planted_units_the_right_way(effects):
    first, second, general = effects
    config = GatingConfig(folds=4, sparsity=0.05)
    gates = gates_of_scores(first, second, damage_of(general), config=config)
    change = gates.changes[SITE]
    assert change[HELPS_BOTH] > 0 > change[HURTS_BOTH] and change[HELPS_FIRST] > 0 and change[HELPS_SECOND] > 0
    with pytest.raises(InputError, match="9 folds need 18 topics or more; 'first' has 16"):
        gates_of_scores(first, second, damage_of(general), config=GatingConfig(folds=9))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"folds": 1}, "folds must be 0 or at least 2, got 1"),
        ({"folds": 3, "count": 5}, "folds go with cost 'together', without count and silence_only"),
        ({"sparsity": 0.1}, "sparsity is for proximal steps: give folds, too"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        GatingConfig(**wrong).check()


@pytest.mark.slow
def test_a_real_rise_is_confirmed(folder, tmp_path):
    data = write_data(tmp_path, n_topics=32, n_each=2, real=(True, True))
    improvement = run_improve(config_of(folder, data), tmp_path / "run")
    assert improvement.confirmed, improvement.headline
    assert all(line.change.low > 0 and line.rank == pytest.approx(1 / 21) for line in improvement.margins)
    assert improvement.dose.kl.high <= 0.02
    multipliers = {(neuron.layer, neuron.index): neuron.multiplier for neuron in improvement.neurons}
    assert multipliers[LAYER, HELPS_BOTH] > 1 > multipliers[LAYER, HURTS_BOTH]
    for prediction in improvement.predictions:
        assert prediction.held_out == pytest.approx(prediction.measured, rel=0.5)


@pytest.mark.slow
def test_the_study_of_defaults_judges_every_setting_on_topics_that_did_not_make_the_gates(folder, tmp_path):
    import gate_defaults as study

    data = write_data(tmp_path, n_topics=32, n_each=2, real=(True, True))
    config = config_of(folder, data, register=write_register(tmp_path))
    spread = study.run(study.GateDefaults(tmp_path / "run", quick=True, study=config))
    assert set(spread) == {"first margin", "second margin", "register margin"}
    for on in ("first margin", "second margin"):
        rises = spread[on]
        assert "strongest 460" not in rises, "the model has 40 neurons"
        assert rises["ridge 1"].low > 0 and rises["ridge 1"].mean >= rises["each neuron's cost alone"].mean * 0.95
    moved = {name: change.mean for name, change in spread["register margin"].items()}
    assert moved["against register 0.5"] < moved["register left alone"], "what is subtracted stays away on new topics"
    assert "both rise in 100%" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_the_study_of_draws_measures_each_on_prompts_that_no_draw_holds_and_on_other_data(folder, tmp_path):
    import gate_draws as study

    data = write_data(tmp_path, n_topics=32, n_each=2, real=(True, True))
    (tmp_path / "other").mkdir()
    other = Path(write_data(tmp_path / "other", n_topics=16, n_each=2, real=(True, True), seed=5)["first"])
    other = other.rename(other.with_name("elsewhere.jsonl"))
    config = config_of(folder, data, register=write_register(tmp_path))
    given = study.GateDraws(tmp_path / "run", quick=True, also=(str(other),), study=config)
    results = study.run(given)
    assert list(results.arms) == ["draw 1", "draw 2"]
    for draw in results.arms:
        for on in ("first", "second", "elsewhere"):
            assert results.line(draw, MARGIN, on).change.low > 0
    changes = [results.line(draw, MARGIN, "first").change.mean for draw in results.arms]
    assert changes[0] != changes[1], "other topics make other gates"
    assert "elsewhere: margin of safe over unsafe rises beyond its interval in 2 of 2 draws" in str(results)
    assert study.run(given) == results


@pytest.mark.long
@pytest.mark.parametrize("real", [(False, False), (True, False)])
def test_chance_is_claimed_as_a_rise_of_both_at_most_18_times_in_200(folder, tmp_path, real):
    n_claims = 0
    for seed in range(200):
        data_folder = tmp_path / f"{seed}"
        data_folder.mkdir()
        data = write_data(data_folder, n_topics=32, n_each=2, real=real, seed=seed)
        improvement = run_improve(config_of(folder, data, n_random=0, seed=seed), data_folder / "run")
        n_claims += improvement.confirmed
    assert n_claims <= 18
