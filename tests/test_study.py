import dataclasses
import json
import re
import shutil

import pytest
import torch

from dean_interp import InputError, load_behaviour, load_scores, load_selection
from dean_interp.arms.comparison import NULLS, RECORD, ComparisonConfig, nulls_of, piece_folder, records_of
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.files import write_text
from dean_interp.report.html import write_report
from dean_interp.study import run as study
from dean_interp.study import settings
from dean_interp.study.config import EvaluationConfig, InformationConfig, StudyConfig, SweepConfig
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.measurement_file import load_measurement
from dean_interp.study.method import score
from dean_interp.study.results import load_results
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig, ControlConfig, DataConfig, ModelConfig
from dean_interp.study.store import Store
from dean_interp.study.study_data import calibration_sets, test_sets

pytestmark = [pytest.mark.slow, pytest.mark.product]

UNITS = ("neuron", "weight")


def test_a_study_leaves_what_its_documentation_lists(finished_study):
    folder, results = finished_study
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "scores", "selection.neuron.safetensors", "selection.weight.safetensors", "states", "answers",
        "results.json", "times.json",
    }  # fmt: skip
    for unit in UNITS:
        assert len(load_selection(folder / f"selection.{unit}.safetensors")) == results.of(unit).sizes["coupled"] > 0
    assert load_scores(folder / "scores" / "privacy.safetensors").units == UNITS
    assert load_results(folder / "results.json") == results
    assert not list(folder.rglob("*.unfinished")) and not list(folder.rglob("*.part"))


@pytest.mark.parametrize("unit", UNITS)
def test_states_are_the_edit_and_every_control(finished_study, unit):
    _, results = finished_study
    measured, edit = results.of(unit).states, results.of(unit).state("edit")
    kinds = [state.kind for state in measured]
    assert measured[0] == edit and kinds.count("edit") == kinds.count("equal KL") == 1
    assert kinds.count("random") == 3
    assert all(state.n_units == results.of(unit).sizes["coupled"] for state in measured if state.kind == "random")
    assert results.original.kl == 0 and edit.kl > 0
    assert sum(results.of(unit).coupled_per_layer) == edit.n_units


@pytest.mark.parametrize("unit", UNITS)
def test_the_primary_outcome_follows_from_the_states(finished_study, unit):
    results = finished_study[1].of(unit)
    controls = [state for state in results.states if state.kind in ("random", "equal KL")]
    edit = results.state("edit")
    for name, p in results.primary.p.items():
        beaten = sum(control.change[name].mean >= edit.change[name].mean for control in controls)
        assert p == pytest.approx((1 + beaten) / (len(controls) + 1))
    assert results.primary.p_larger == max(results.primary.p.values())
    assert not results.primary.reached, "4 controls cannot give p <= 0.05"
    units = f"{edit.n_units} coupled {unit}{'s' if edit.n_units > 1 else ''} "
    assert "was not reached" in results.headline and f"Silencing {units}" in results.headline


def test_changes_are_paired_differences_to_the_original(finished_study):
    _, results = finished_study
    states = [state for one in results.units for state in one.states]
    assert len(states) > 2 * 4, "an edit and its controls of either unit"
    for state in states:
        for name, change in state.change.items():
            assert change.mean == pytest.approx(state.margin[name] - results.original.margin[name], abs=1e-9)
            assert change.low <= change.mean <= change.high


def test_answers_are_given_by_the_original_every_edit_and_its_controls(finished_study):
    results = finished_study[1]
    answers = results.answers
    assert [state.title for state in answers.states] == [
        "original", "neuron edit", "neuron equal KL 1", "weight edit", "weight equal KL 1",
    ]  # fmt: skip
    sets = ["fairness", "privacy", "over_refusal_fairness", "over_refusal_privacy", "general"]
    assert [*answers.prompts] == sets
    for state in answers.states:
        assert [answered.behaviour for answered in state.sets] == sets
        assert all(len(answered.answers) == len(answered.labels) == 4 for answered in state.sets)
    # The lines of the edit say what share of these answers each label has, before and after.
    before, after = answers.states[0], answers.states[1]
    lines = {(line.metric, line.on): line for line in results.of("neuron").edit.lines}
    for old, new in zip(before.sets, after.sets, strict=True):
        line = lines["incoherent answers, at 8 tokens", old.behaviour]
        shares = [answered.labels.count("incoherent") / 4 for answered in (old, new)]
        assert [line.before.mean, line.after.mean] == pytest.approx(shares)
        assert line.change.mean == pytest.approx(shares[1] - shares[0])
    # Controls that answer have these lines, too; the others have likelihoods alone.
    kinds = {state.kind: {line.metric for line in state.lines} for state in results.of("neuron").states}
    assert "incoherent answers, at 8 tokens" in kinds["equal KL"] and MARGIN in kinds["random"]
    assert not any("answers, at" in metric for metric in kinds["random"])


def test_leaked_test_prompts_are_left_out_and_both_numbers_told_on_request(tmp_path, study_config):
    known, test = (load_behaviour("fairness", n_examples=n, split=split)
                   for n, split in ((12, "calibration"), (14, "test")))  # fmt: skip
    # in one file such prompts would be refused; here they are those of another set
    others = calibration_sets(study_config.data, study_config.calibration)[1]
    first, second, third = others.prompts[:3]
    leaky = (f"{first} !", second.upper(), f"{third} Please tell me now.")
    rows = [(one, one.prompt, some.split) for some in (known, test) for one in some.examples]
    rows += [(one, prompt, "test") for one, prompt in zip(known.examples, leaky, strict=False)]
    file = tmp_path / "leaky.jsonl"
    file.write_text("".join(
        json.dumps({"prompt": prompt, **one.answers, "split": split}) + "\n" for one, prompt, split in rows
    ))  # fmt: skip
    data = dataclasses.replace(study_config.data, first=str(file))
    told = dataclasses.replace(
        study_config, data=data, report_leaked=True, answers=AnswerConfig(n_answers=0), unit=("neuron",)
    )
    calibration = calibration_sets(data, told.calibration)
    tests, leaked = test_sets(data, calibration)
    assert not {*map(str.lower, tests[0].prompts)} & {*map(str.lower, calibration[1].prompts)}
    assert leaked[0].exact == leaky[:2]
    results = study.run_study(told, tmp_path / "run")
    leak, *others = results.leaks
    assert (leak.behaviour, leak.n_prompts, leak.n_exact, leak.n_near) == ("leaky", 17, 2, 1)
    assert len(others) == 2 and [*leak.change] == ["neuron"] and all(not one.n_exact for one in others)
    assert leak.change["neuron"] != results.of("neuron").state("edit").change["leaky"]
    page = write_report(results, tmp_path / "run").read_text()
    assert "3 of 17 leaky test" in page and "On a test set that holds them" in page
    with pytest.raises(InputError, match="16 test prompts of 'leaky' are asked for"):
        test_sets(dataclasses.replace(data, n_test=16), calibration)


def test_a_finished_study_is_not_done_again(finished_study, study_config, monkeypatch):
    folder, results = finished_study
    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert study.run_study(study_config, folder) == results


def test_a_study_with_other_settings_does_not_touch_the_folder(finished_study, study_config):
    folder, _ = finished_study
    other = dataclasses.replace(
        study_config,
        data=dataclasses.replace(study_config.data, seed=5),
        controls=dataclasses.replace(study_config.controls, n_random=4),
    )
    with pytest.raises(
        InputError, match=r"another seed \(0 there, 5 now\), n_random \(3 there, 4 now\): choose another folder"
    ):
        study.run_study(other, folder)


def test_scores_of_another_model_under_the_same_name_are_refused(study_config, checkpoints, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], model)
    config = dataclasses.replace(study_config, model=ModelConfig(str(model), device="cpu"))
    loaded = config.model.load()
    behaviour = calibration_sets(config.data, config.calibration)[0]
    score(loaded, behaviour, config, tmp_path)
    with torch.no_grad():
        next(loaded.parameters())[0] += 1
    with pytest.raises(InputError, match="made with another model"):
        score(loaded, behaviour, config, tmp_path)


def test_a_record_that_is_damaged_is_refused_by_name_and_what_it_held_is_made_anew_where_it_is_deleted(tmp_path):
    """Its content too: what is there is no number."""
    store = Store(folder=tmp_path, fingerprint="x", tests=[], config=DataConfig(), template="chat")
    file = tmp_path / "verdicts" / "a.json"
    assert store.record("verdicts/a.json", [], int, lambda _: 3) == 3
    whole = file.read_bytes()
    for damaged in (b"", whole[:-4], whole.replace(b"3\n", b'"three"\n'), whole.replace(b"3\n", b"[3]\n")):
        assert damaged != whole
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.json is damaged .*: where it is deleted, .* makes it anew"):
            store.record("verdicts/a.json", [], int, lambda _: 4)
        assert file.read_bytes() == damaged
    file.unlink()
    assert store.record("verdicts/a.json", [], int, lambda _: 4) == 4


def test_records_of_arms_that_are_damaged_are_refused_by_name(tmp_path):
    for name in (RECORD, NULLS):
        write_text(piece_folder(tmp_path, "gates") / name, "[{")
    with pytest.raises(InputError, match=f"gates/{RECORD} is damaged .*: where it is deleted"):
        records_of(tmp_path, ["gates"])
    with pytest.raises(InputError, match=f"gates/{NULLS} is damaged .*: where it is deleted"):
        nulls_of(tmp_path, "gates")


def test_a_state_of_other_units_is_not_taken_for_this_one(finished_study, study_config):
    folder, _ = finished_study
    with pytest.raises(InputError, match="is of another model, other data or other units"):
        load_measurement(
            folder / "states" / "neuron_edit.safetensors", test_sets(study_config.data)[0], None, fingerprint="else"
        )


@pytest.mark.parametrize("unit", UNITS)
def test_what_can_be_detected_is_stated_from_the_controls_alone(finished_study, unit):
    folder, results = finished_study[0], finished_study[1].of(unit)
    controls = [state for state in results.states if state.kind in ("random", "equal KL")]
    for name, to_beat in results.design.to_beat.items():
        assert to_beat == pytest.approx(max(state.change[name].mean for state in controls))
        assert results.design.margin(name) > 0
        assert results.design.n_clusters[name] <= results.design.n_prompts == 12
    assert results.design.smallest_p == pytest.approx(1 / 5)
    assert json.loads((folder / "config.json").read_text())["config"]["controls"]["n_random"] == 3


@pytest.mark.parametrize("unit", UNITS)
def test_information_is_there_for_every_layer_and_every_control(finished_study, unit):
    n_layers, results = finished_study[1].n_layers, finished_study[1].of(unit)
    n_controls = sum(state.kind in ("random", "equal KL") for state in results.states)
    assert [one.estimand for one in results.information] == ["downstream_mi", "awareness_mi"]
    for information in results.information:
        assert len(information.layers) == n_layers
        assert all(len(shift.control_changes) == n_controls for shift in information.shifts)
        for variant in information.variants:
            p = information.largest_fall_p[variant]
            assert 0 <= information.largest_fall_layer[variant] < n_layers and p is not None and 0 < p <= 1


def test_data_that_changed_under_a_half_finished_run_are_named(finished_study, study_config):
    changed = [
        dataclasses.replace(one, examples=one.examples[:-1])
        for one in calibration_sets(study_config.data, study_config.calibration)
    ]
    fresh = [one.name for one in changed]
    with (
        pytest.raises(InputError, match=rf"the data of {fresh[0]} \(calibration\), .* changed since the run"),
        owned(finished_study[0], study_config, changed),
    ):
        pass


def test_a_file_in_place_of_a_run_folder_is_named(study_config, tmp_path):
    (tmp_path / "afile").touch()
    with pytest.raises(InputError, match="afile is a file, and a folder is wanted"):
        study.run_study(study_config, tmp_path / "afile")


def test_a_folder_that_is_gone_on_with_says_so(tmp_path, caplog):
    caplog.set_level("INFO", logger="dean_interp")
    with owned(tmp_path / "run", DataConfig(), []):
        pass
    assert not caplog.messages
    for name in ("one", "two"):
        write_text(tmp_path / "run" / "scores" / f"{name}.safetensors", "")
    with owned(tmp_path / "run", DataConfig(), []):
        pass
    assert caplog.messages == [f"{tmp_path / 'run'}: goes on; 2 files of scores and measurements are there"]
    write_text(tmp_path / "run" / "checksums.json", "{}")
    with owned(tmp_path / "run", DataConfig(), []):
        pass
    assert caplog.messages[1] == f"{tmp_path / 'run'}: is finished, and what it found is read"


def test_a_folder_that_cannot_be_written_is_named(study_config):
    with pytest.raises(InputError, match="cannot write to /proc/nowhere"):
        study.run_study(study_config, "/proc/nowhere")


def test_parts_of_one_published_set_are_different_behaviours():
    DataConfig(first="paper:fairness@data", second="paper:privacy@data", general="paper:general@data").check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"neuron_fraction": 0.0}, r"neuron_fraction must be in \(0, 1\], got 0"),
        ({"weight_fraction": 1.5}, r"weight_fraction must be in \(0, 1\], got 1.5"),
        ({"data": DataConfig(n_test=3)}, "n_test must be at least 12, got 3"),
        ({"data": DataConfig(first="privacy")}, "three different behaviours"),
        ({"data": DataConfig(first="data/privacy.csv")}, "three different behaviours"),
        ({"controls": ControlConfig(1, 0)}, r"n_answer_controls must be at most n_random \+ n_equal_kl \(1\), got 2"),
        ({"answers": AnswerConfig(answer_lengths=())}, "answer_lengths must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        study.run_study(StudyConfig(**options), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            StudyConfig,
            {"model": "smollm2-135m-instruct"},
            "model must be a ModelConfig, such as ModelConfig(); got 'smol",
        ),
        (StudyConfig, {"data": ("fairness", "privacy")}, "data must be a DataConfig"),
        (EvaluationConfig, {"controls": 3}, "controls must be a ControlConfig"),
        (InformationConfig, {"model": None}, "model must be a ModelConfig, such as ModelConfig(); got None"),
        (SweepConfig, {"calibration": {}}, "calibration must be a CalibrationConfig"),
        (
            ImproveConfig,
            {"answers": {"n_answers": 4}},
            "answers must be an AnswerConfig, such as AnswerConfig(); got {",
        ),
        (ComparisonConfig, {"study": StudyConfig()}, "study must be an ImproveConfig"),
    ],
)
def test_a_group_of_settings_that_is_something_else_is_named_before_any_work(kind, options, said, untyped):
    with pytest.raises(InputError, match=re.escape(said)):
        kind(**options).check()
