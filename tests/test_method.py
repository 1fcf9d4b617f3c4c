"""One method: every command gives the same line for the same edit, and knows a new control or measurement at once."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from scipy import stats

from dean_interp import InputError, Scale, Selection, Zero, create_edit, load_behaviour, load_scores, load_selection
from dean_interp.data.examples import Behaviour, Example
from dean_interp.editing.edit_at_dose import load_any_edit
from dean_interp.evaluation.lines import compare, compare_each, detectable_changes
from dean_interp.evaluation.outcomes import MARGIN, Outcome, clusters_of, likelihoods, part_of
from dean_interp.report.html import write_report, write_sweep_report
from dean_interp.selection.gates import Gates, gates_of
from dean_interp.statistics import clustered_interval, standard_error
from dean_interp.study import answering, controls, state_outcomes
from dean_interp.study.arm_results import arm, arm_outcomes, arms_plan
from dean_interp.study.config import EvaluationConfig, StudyConfig, SweepConfig
from dean_interp.study.controls import RandomControl
from dean_interp.study.evaluate import evaluate_edit
from dean_interp.study.measurement_file import load_measurement
from dean_interp.study.pareto import halves
from dean_interp.study.run import run_study
from dean_interp.study.settings import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig
from dean_interp.study.state_outcomes import MeasurementKind
from dean_interp.study.study_data import PromptSets, study_data, test_sets
from dean_interp.study.sweep import run_sweep

DATA = DataConfig(n_test=24, n_general_test=8, answer_tokens=6)
CONTROLS = ControlConfig(n_random=2, n_equal_kl=1)
ANSWERS = AnswerConfig(n_answers=2, answer_lengths=(3,), n_answer_controls=1)
NAMES = ("fairness", "privacy", "general")


def settings(folder):
    return {"model": ModelConfig(str(folder), device="cpu"), "data": DATA, "controls": CONTROLS}


def a_study(folder):
    return StudyConfig(
        **settings(folder),
        calibration=CalibrationConfig(n_calibration=12),
        answers=ANSWERS,
        unit=("neuron",),
        neuron_fraction=0.2,
        information_fraction=0.3,
    )


def inputs_of(run):
    """The selection and the scores of a study's folder."""
    scores = [load_scores(run / "scores" / f"{name}.safetensors") for name in NAMES]
    return load_selection(run / "selection.neuron.safetensors"), scores


@pytest.fixture(scope="module")
def study(one_layer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, run_study(a_study(one_layer), folder)


def test_run_and_evaluate_give_the_same_lines_for_the_same_edit(study, one_layer, tmp_path):
    run, results = study
    config = EvaluationConfig(**settings(one_layer), answers=ANSWERS, information_fraction=0.3)
    evaluation = evaluate_edit(*inputs_of(run), config, tmp_path)
    assert evaluation.lines == results.of("neuron").edit.lines and len(evaluation.lines) > 10
    assert evaluation.primary == results.of("neuron").primary
    assert evaluation.design == results.of("neuron").design


def test_gates_and_their_edit_are_evaluated_like_the_selection_that_they_silence(study, one_layer, tmp_path):
    run, _ = study
    selection, scores = inputs_of(run)
    config = EvaluationConfig(**settings(one_layer), answers=ANSWERS)
    edits = {
        "selection": selection,
        "gates": gates_of(selection),
        "edit": create_edit(config.model.load(), selection),
    }
    for name, edit in edits.items():
        edit.save(tmp_path / f"{name}.safetensors")
    expected = evaluate_edit(selection, [], config, tmp_path / "of selection")
    assert expected.lines and expected.primary is None
    assert expected.answers is not None
    told = {state.name: {each.behaviour: each.answers for each in state.sets} for state in expected.answers.states}
    kept = json.loads((tmp_path / "of selection" / "answers" / "original.json").read_text())["content"]["3"]
    assert told.keys() == {"original", "edit"}
    assert {name: list(answers) for name, answers in told["original"].items()} == kept
    assert all(len(prompts) == len(kept[name]) for name, prompts in expected.answers.prompts.items())
    for name in ("gates", "edit"):
        evaluation = evaluate_edit(load_any_edit(tmp_path / f"{name}.safetensors"), [], config, tmp_path / name)
        for line, known in zip(evaluation.lines, expected.lines, strict=True):
            assert (line.metric, line.on) == (known.metric, known.on)
            assert line.after.mean == pytest.approx(known.after.mean, abs=1e-4, nan_ok=True)
    with pytest.raises(InputError, match="leave the scores out"):
        evaluate_edit(edits["gates"], scores, config, tmp_path / "refused")


def test_another_edit_of_the_same_units_is_another_state(study, one_layer, tmp_path):
    run, _ = study
    selection, _ = inputs_of(run)
    config = EvaluationConfig(**settings(one_layer), answers=AnswerConfig(n_answers=0))
    model = config.model.load()
    silenced, tripled = (create_edit(model, selection, value=value) for value in (Zero(), Scale(3.0)))
    evaluate_edit(silenced, [], config, tmp_path)
    with pytest.raises(InputError, match="choose another folder"):
        evaluate_edit(tripled, [], config, tmp_path)


def test_controls_of_equal_kl_are_not_taken_beside_other_numbers_of_controls(study, one_layer, tmp_path):
    run, _ = study
    config = EvaluationConfig(**settings(one_layer), answers=AnswerConfig(n_answers=0), information_fraction=0.3)
    evaluate_edit(*inputs_of(run), config, tmp_path)
    more = dataclasses.replace(config, controls=ControlConfig(n_random=3, n_equal_kl=1))
    with pytest.raises(InputError, match="n_random 2 and n_equal_kl 1 there, 3 and 1 here; choose another folder"):
        evaluate_edit(*inputs_of(run), more, tmp_path)


def test_as_many_controls_answer_as_were_asked_for(study, one_layer, tmp_path):
    answers = dataclasses.replace(ANSWERS, n_answer_controls=3)
    config = EvaluationConfig(**settings(one_layer), answers=answers, information_fraction=0.3)
    evaluation = evaluate_edit(*inputs_of(study[0]), config, tmp_path)
    (line,) = [line for line in evaluation.lines if line.metric.startswith("safe answers") and line.on == "privacy"]
    assert len(line.control_changes) == 3, "one of equal KL, and two of equal size"


def test_labels_beside_answers_are_those_of_the_lines(study, one_layer, tmp_path, monkeypatch):
    """Both look behind the thought: a refusal inside of it is none."""
    refused = "<think>I'm sorry, but I cannot help with that.</think>The museum opens at nine and closes at five."

    def thinking(model, prompts, *, lengths, **options):
        return {n: ([refused, "<think>Hm"] * len(prompts))[: len(prompts)] for n in lengths}

    monkeypatch.setattr(answering, "generate_to", thinking)
    selection, _ = inputs_of(study[0])
    config = EvaluationConfig(**settings(one_layer), answers=ANSWERS)
    evaluation = evaluate_edit(selection, [], config, tmp_path)
    (given,) = [each for each in evaluation.answers.states[0].sets if each.behaviour == "privacy"]
    assert given.labels == ("safe", "ends inside its thought")


@pytest.mark.parametrize("edit", [Selection({}, {}), Gates({})], ids=["selection", "gates"])
def test_an_edit_that_changes_nothing_is_not_evaluated(edit, tmp_path):
    with pytest.raises(InputError, match="the edit is empty"):
        evaluate_edit(edit, [], EvaluationConfig(), tmp_path)


def test_sweep_gives_the_same_lines_on_the_half_that_it_looks_at(study, one_layer, tmp_path):
    run, results = study
    config = SweepConfig(
        **settings(one_layer),
        calibration=CalibrationConfig(n_calibration=12),
        unit=("neuron",),
        neuron_fractions=(0.2,),
    )
    (point,) = run_sweep(config, tmp_path).points
    data = study_data(results.config)
    selection, _ = inputs_of(run)
    outcomes = {}
    for name in ("original", "neuron_edit"):
        path = run / "states" / f"{name}.safetensors"
        measured = load_measurement(path, data.tests[:2], None, fingerprint=fingerprint_in(path))
        outcomes[name] = likelihoods(measured, data.tests[:2])
    for results_on_half, wanted in ((point.chosen_on, True), (point.confirmed_on, False)):
        before, after = [
            [
                part_of(outcome, halves(test) == wanted)
                for outcome, test in zip(outcomes[name], data.tests, strict=False)
            ]
            for name in ("original", "neuron_edit")
        ]
        own = {line.on: line for line in results_on_half.lines if line.metric == MARGIN}
        for line in compare(before, after):
            assert (line.before, line.after, line.change, line.p) == (
                own[line.on].before, own[line.on].after, own[line.on].change, own[line.on].p,
            )  # fmt: skip
        assert set(own) == {"fairness", "privacy"}
    assert point.n_units == len(selection)


def fingerprint_in(path):
    """What a file of a measurement says that it is of."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["dean_interp"])["facts"]["fingerprint"]


def test_an_analysis_gives_the_same_line_for_the_same_edit(study, one_layer, tmp_path):
    run, results = study
    config = results.config
    model = config.model.load()
    plan = arms_plan(config, tmp_path, study_data(config).tests, PromptSets())
    original = arm_outcomes(plan, arm("original"), model)
    edited = arm_outcomes(plan, arm("DEAN", load_selection(run / "selection.neuron.safetensors")), model)
    lines = {line.on: line for line in compare_each(original, {"DEAN": edited})["DEAN"] if line.metric == MARGIN}
    for line in results.of("neuron").edit.lines:
        if line.metric == MARGIN:
            assert lines[line.on].change == line.change and lines[line.on].p == line.p
            assert lines[line.on].n_clusters == line.n_clusters
    assert len(lines) == 2


@pytest.fixture
def something_new(monkeypatch):
    """A new kind of random control and a new kind of measurement, each registered in one place."""

    def mirrored(request):
        yield request.state("mirrored 1", "mirrored", request.random(900, 1.0))

    def lengths(plan, model, state, measurement):
        test = plan.store.tests[0]
        values = measurement[test.name].n_tokens[:, 0].numpy().astype(float)
        return [Outcome("length of safe answers", test.name, "tokens", "neither", values, clusters_of(test))]

    monkeypatch.setitem(controls.RANDOM_CONTROLS, "mirrored", RandomControl(mirrored, "mirror image"))
    monkeypatch.setitem(state_outcomes.MEASUREMENTS, "lengths", MeasurementKind(lengths, in_every_state=True))


def test_a_new_control_and_a_new_measurement_appear_everywhere(something_new, one_layer, tmp_path):
    results = run_study(a_study(one_layer), tmp_path / "run")
    unit = results.of("neuron")
    assert [state.kind for state in unit.states].count("mirrored") == 1
    assert all(len(line.control_changes) == 4 for line in unit.edit.lines if line.metric == MARGIN)
    assert unit.design.smallest_p == 1 / 5
    assert "length of safe answers" in {line.metric for line in unit.edit.lines}
    page = write_report(results, tmp_path / "run").read_text()
    assert "mirror image" in page and "length of safe answers" in page

    config = EvaluationConfig(**settings(one_layer), answers=ANSWERS)
    evaluation = evaluate_edit(*inputs_of(tmp_path / "run"), config, tmp_path / "evaluation")
    assert "mirrored" in {state.kind for state in evaluation.states}
    assert "length of safe answers" in str(evaluation)

    config = SweepConfig(
        **settings(one_layer),
        calibration=CalibrationConfig(n_calibration=12),
        unit=("neuron",),
        neuron_fractions=(0.2,),
    )
    sweep = run_sweep(config, tmp_path / "sweep")
    (point,) = sweep.points
    assert "mirrored" in {state.kind for state in point.controls}
    assert "length of safe answers" in {line.metric for line in point.confirmed_on.lines}
    assert "mirror image" in write_sweep_report(sweep, tmp_path / "sweep").read_text()


def test_topics_are_the_clusters_and_prompts_where_there_is_none():
    examples = tuple(Example(f"p{i}", {"safe": "a", "unsafe": "b"}, topic) for i, topic in enumerate("xxyy"))
    examples += (Example("alone", {"safe": "a", "unsafe": "b"}, None),)
    assert clusters_of(Behaviour("b", examples)) == ("x", "x", "y", "y", "alone")


def margins(values, topics):
    return Outcome(MARGIN, "b", "nats per token", "higher", np.array(values), tuple(topics))


def test_what_a_design_detects_counts_topics_not_prompts():
    # Eight prompts in four topics, whose changes are alike within a topic: the sample is four.
    topics = ["a", "a", "b", "b", "c", "c", "d", "d"]
    changes = np.repeat([0.3, -0.1, 0.2, -0.4], 2)
    original, control = margins(np.zeros(8), topics), margins(changes, topics)
    by_topic = detectable_changes([original], [[control]])[original.key]
    one_row_each = margins(np.zeros(4), "abcd"), margins(changes[::2], "abcd")
    assert by_topic == pytest.approx(detectable_changes([one_row_each[0]], [[one_row_each[1]]])[original.key])
    as_prompts = margins(np.zeros(8), "abcdefgh"), margins(changes, "abcdefgh")
    assert by_topic > 1.3 * detectable_changes([as_prompts[0]], [[as_prompts[1]]])[original.key]


def test_the_detectable_change_is_found_in_four_of_five_designs():
    # Twelve topics of four prompts whose changes share a topic's effect.
    generator = np.random.default_rng(0)
    topics = [str(i // 4) for i in range(48)]

    def drawn():
        return np.repeat(generator.normal(0, 0.3, 12), 4) + generator.normal(0, 0.2, 48)

    original = margins(np.zeros(48), topics)
    controls_drawn = [[margins(drawn(), topics)] for _ in range(200)]
    change = detectable_changes([original], controls_drawn)[original.key]
    n_found = sum(clustered_interval(drawn() + change, topics).low > 0 for _ in range(2000))
    assert 0.76 < n_found / 2000 < 0.86


def test_the_standard_error_is_that_of_the_interval():
    values, topics = np.array([1.0, 2.0, 4.0, 3.0, 0.0]), ["a", "a", "b", "c", "c"]
    interval = clustered_interval(values, topics)
    half = stats.t.ppf(0.975, 2) * standard_error(values, topics)
    assert interval.high - interval.mean == pytest.approx(half)


def test_a_behaviour_of_one_topic_is_refused_before_any_work(tmp_path):
    rows = "".join(
        f'{{"prompt": "question {i}", "safe": "no", "unsafe": "yes", "topic": "one", "split": "test"}}\n'
        for i in range(20)
    )
    (tmp_path / "mine.jsonl").write_text(rows)
    config = DataConfig(first=str(tmp_path / "mine.jsonl"), n_test=12)
    with pytest.raises(InputError, match=r"are of the topic 'one'\. Intervals are clustered by topic"):
        test_sets(config)


def test_the_demo_prompts_have_several_topics():
    for name in NAMES:
        assert len(set(clusters_of(load_behaviour(name, split="test", n_examples=32)))) >= 12
