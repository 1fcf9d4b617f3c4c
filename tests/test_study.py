import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dean_interp import InputError, load_scores, load_selection
from dean_interp.study import run as study
from dean_interp.study.config import StudyConfig
from dean_interp.study.results import load_results
from dean_interp.study.states import load_measurement

SIZES = {"n_calibration": 12, "n_test": 12, "n_general_test": 12, "n_random": 3, "n_equal_kl": 1,
         "fraction": 0.075, "read_fraction": 0.3, "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def config(checkpoints):
    return StudyConfig(model=str(checkpoints["llama-gqa"]), **SIZES)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run folder and its results, made without interruption."""
    folder = tmp_path_factory.mktemp("run")
    return folder, study.run_study(config, folder)


def test_a_study_leaves_what_its_documentation_lists(finished):
    folder, results = finished
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "scores", "selection.safetensors", "states", "results.json", "times.json",
    }  # fmt: skip
    assert len(load_selection(folder / "selection.safetensors")) == results.sizes["coupled"] > 0
    assert load_scores(folder / "scores" / "privacy.neuron.safetensors").behaviour == "privacy"
    assert load_results(folder / "results.json") == results


def test_states_are_the_original_the_edit_and_every_control(finished):
    _, results = finished
    kinds = [state.kind for state in results.states]
    assert kinds.count("original") == kinds.count("edit") == kinds.count("equal KL") == 1
    assert kinds.count("random") == 3
    assert all(state.n_units == results.sizes["coupled"] for state in results.states if state.kind == "random")
    assert results.state("original").kl == 0
    edit, (equal,) = results.state("edit"), [state for state in results.states if state.kind == "equal KL"]
    assert edit.kl > 0 and equal.kl > 0


def test_the_primary_outcome_follows_from_the_states(finished):
    _, results = finished
    controls = [state for state in results.states if state.kind in ("random", "equal KL")]
    edit = results.state("edit")
    for name, p in results.primary.p.items():
        beaten = sum(control.change[name].mean >= edit.change[name].mean for control in controls)
        assert p == pytest.approx((1 + beaten) / (len(controls) + 1))
    assert results.primary.p_larger == max(results.primary.p.values())
    assert not results.primary.reached, "4 controls cannot give p <= 0.05"
    assert "was not reached" in results.headline


def test_changes_are_paired_differences_to_the_original(finished):
    _, results = finished
    for state in results.states:
        for name, change in state.change.items():
            original = results.state("original").margin[name]
            assert change.mean == pytest.approx(state.margin[name] - original, abs=1e-9)
            assert change.low <= change.mean <= change.high


def test_a_finished_study_is_not_done_again(finished, config, monkeypatch):
    folder, results = finished
    monkeypatch.setattr(study, "load_model", lambda *args, **options: pytest.fail("the model was loaded again"))
    assert study.run_study(config, folder) == results


def test_a_study_with_other_settings_does_not_touch_the_folder(finished, config):
    import dataclasses

    folder, _ = finished
    with pytest.raises(InputError, match="holds a run with another n_random, seed: choose another folder"):
        study.run_study(dataclasses.replace(config, seed=5, n_random=4), folder)


def test_scores_of_another_model_under_the_same_name_are_refused(config, checkpoints, tmp_path):
    import dataclasses
    import shutil

    model = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], model)
    config = dataclasses.replace(config, model=str(model))
    loaded = study.load_model(model, device="cpu")
    study._scores(loaded, config.calibration()[0], config, tmp_path)
    with torch.no_grad():
        next(loaded.parameters())[0] += 1
    with pytest.raises(InputError, match="made with another model"):
        study._scores(loaded, config.calibration()[0], config, tmp_path)


def test_a_state_of_other_units_is_not_taken_for_this_one(finished, config):
    folder, _ = finished
    with pytest.raises(InputError, match="is of another model, other data or other units"):
        load_measurement(folder / "states" / "edit.safetensors", config.tests(), None, fingerprint="else")


def test_two_runs_in_one_folder_are_refused(config, tmp_path):
    with study._owned(tmp_path, config), pytest.raises(InputError, match="another run is writing"):
        study.run_study(config, tmp_path)


def test_a_stopped_run_resumes_to_the_same_bytes(finished, config, tmp_path, monkeypatch):
    real, saved = study.save_measurement, []

    def stop_after_three(measurement, path, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        real(measurement, path, **options)

    monkeypatch.setattr(study, "save_measurement", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(config, tmp_path)
    monkeypatch.setattr(study, "save_measurement", real)
    times = [path.stat().st_mtime_ns for path in saved]
    study.run_study(config, tmp_path)
    assert [path.stat().st_mtime_ns for path in saved] == times, "finished states were measured again"
    assert (tmp_path / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(finished, config, tmp_path):
    command = [sys.executable, "-m", "dean_interp.cli", "run", "--out", str(tmp_path), "--model", config.model]
    for name, value in SIZES.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("states/*.safetensors"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "results.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()
    assert (tmp_path / "report.html").is_file()


def test_what_can_be_detected_is_stated_from_the_controls_alone(finished):
    folder, results = finished
    random = [state for state in results.states if state.kind == "random"]
    for name, to_beat in results.design.to_beat.items():
        assert to_beat == pytest.approx(max(state.change[name].mean for state in random))
        assert results.design.detectable[name] > 0
    assert results.design.smallest_p == pytest.approx(1 / 5)
    assert json.loads((folder / "config.json").read_text())["n_random"] == 3


def test_information_is_there_for_every_layer_and_every_control(finished):
    _, results = finished
    information = results.information
    assert len(information.edit.layers) == results.n_layers
    assert set(information.control_changes) == {s.name for s in results.states if s.kind in ("random", "equal KL")}
    assert 0 <= information.largest_fall_layer < results.n_layers and 0 < information.largest_fall_p <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0"),
        ({"fraction": 1.5}, r"fraction must be in \(0, 1\], got 1.5"),
        ({"n_test": 3}, "n_test must be at least 12, got 3"),
        ({"first": "privacy"}, "three different behaviours"),
    ],
)
def test_settings_out_of_range_are_named(options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        study.run_study(StudyConfig(**options), tmp_path)
    assert not list(tmp_path.iterdir())
