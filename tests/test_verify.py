"""A run that was not touched holds; one that was is found out."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dean_interp.cli.main import main
from dean_interp.study import settings, verify
from dean_interp.study.config import StudyConfig
from dean_interp.study.results import load_results
from dean_interp.study.run import run_study
from dean_interp.study.run_folder import CHECKSUMS, kept_files, note_checksums
from dean_interp.study.settings import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig
from dean_interp.study.verify import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def config_of(model):
    return StudyConfig(
        model=ModelConfig(str(model), device="cpu"),
        data=DataConfig(n_test=12, n_general_test=4),
        calibration=CalibrationConfig(n_calibration=20),
        controls=ControlConfig(n_random=1, n_equal_kl=1),
        answers=AnswerConfig(n_answers=2, answer_lengths=(4,), n_answer_controls=0),
        unit=("weight",),
        weight_fraction=0.03,
        information_fraction=0.3,
    )


@pytest.fixture(scope="module")
def finished(checkpoints, one_thread, tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "own"
    shutil.copytree(checkpoints["llama-gqa"], model)
    folder = tmp_path_factory.mktemp("run")
    run_study(config_of(model), folder)
    return model, folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "copy")


@pytest.fixture
def derived(finished, monkeypatch):
    """Results from the kept files are taken as they are stored: other tests derive them."""
    monkeypatch.setattr(verify, "results_in", lambda *_, **__: load_results(finished[1] / "results.json"))


def differing(found) -> list[str]:
    return [one.what for one in found.checks if one.match == "different"]


def noted_anew(folder):
    (folder / CHECKSUMS).unlink()
    note_checksums(folder)


def changed(path, tensor, by):
    """Multiply the first number of a tensor in a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[tensor].view(-1)[0] *= by
    save_file(tensors, path, metadata)


def test_a_run_that_was_not_touched_holds_and_is_left_as_it_was(finished, capsys):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["verify", str(folder), "--json"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    found = json.loads(capsys.readouterr().out)
    said = {one["what"]: one["match"] for one in found["checks"]}
    assert found["holds"] is True and found["versions"] == ""
    assert {what.split(":")[0] for what in said} == {
        "files", "data", "model", "scores", "selection", "measured", "results, from the kept files",
    }  # fmt: skip
    assert said["results, from the kept files"] == said["selection: weights, from the kept scores"] == "same"
    assert {"scores: privacy, scores of neurons", "measured: weight edit, general"} <= {*said}


@pytest.mark.long
def test_a_second_run_of_the_same_settings_gives_the_same_bytes(finished, tmp_path):
    model, folder = finished
    run_study(config_of(model), tmp_path)
    assert (tmp_path / CHECKSUMS).read_bytes() == (folder / CHECKSUMS).read_bytes()


def test_more_threads_and_another_processor_give_the_same_selection_and_the_difference_is_reported(finished):
    """Plain instructions in the place of this processor's own round differently, as another machine does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "MKL_CBWR": "COMPATIBLE",
                   "ATEN_CPU_CAPABILITY": "default"}  # fmt: skip
    command = [sys.executable, "-m", "dean_interp.cli.main", "verify", str(finished[1]), "--full", "--json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = {one["what"]: one for one in json.loads(ended.stdout)["checks"]}
    assert found["selection: weights, from new scores"]["match"] == "same"
    for what in ("scores: privacy, scores of neurons and weights", "scores: privacy, losses"):
        assert found[what]["difference"] <= 1e-4 and found[what]["detail"].startswith("20 examples")


@pytest.mark.parametrize("name", ["scores/privacy.safetensors", "states/weight_random_1.safetensors", "config.json"])
def test_a_flipped_bit_is_found_before_a_model_is_loaded(copy, name, capsys, monkeypatch):
    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    content = bytearray((copy / name).read_bytes())
    content[-5] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(copy)])
    assert ended.value.code == 1 and f"changed since the run: {name}" in capsys.readouterr().out


def test_an_edited_result_is_found_though_its_checksum_was_renewed(copy):
    results = json.loads((copy / "results.json").read_text())
    results["units"][0]["states"][0]["kl"] += 0.01
    (copy / "results.json").write_text(json.dumps(results))
    assert differing(verify_run(copy)) == ["files"]
    noted_anew(copy)
    found = verify_run(copy)
    assert differing(found) == ["results, from the kept files"]
    assert found.checks[-1].difference == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("states/weight_edit", "log_prob/privacy", "measured: weight edit, privacy"),
        ("states/general/original", "log_prob/general", "measured: original, general"),
        ("scores/general", "groups/L1.neurons", "scores: general, scores of neurons"),
        ("scores/fairness", "loss", "scores: fairness, losses"),
    ],
)
def test_an_edited_number_is_found_though_its_checksum_was_renewed(copy, derived, name, tensor, what):
    changed(copy / f"{name}.safetensors", tensor, 1.05)
    noted_anew(copy)
    assert differing(verify_run(copy)) == [what]


def test_another_model_under_the_same_name_is_found(finished):
    model, folder = finished
    original = (model / "model.safetensors").read_bytes()
    changed(model / "model.safetensors", "model.layers.1.mlp.up_proj.weight", 1.01)
    found = differing(verify_run(folder))
    (model / "model.safetensors").write_bytes(original)
    assert "model" in found and "scores: privacy, fingerprint" in found


def test_other_data_under_the_same_name_are_found(copy, derived):
    begun = json.loads((copy / "config.json").read_text())
    begun["data"]["privacy (test)"] = "other"
    (copy / "config.json").write_text(json.dumps(begun))
    noted_anew(copy)
    assert differing(verify_run(copy)) == ["data: privacy (test)"]


def test_the_files_of_a_run_are_noted_where_their_folder_is_a_link_too(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "original.safetensors").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "states").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert kept_files(tmp_path / "run") == ["states/original.safetensors"]


def test_checksums_that_a_kill_kept_from_being_written_are_written_by_the_same_command(finished, copy):
    model, _ = finished
    noted = (copy / CHECKSUMS).read_bytes()
    (copy / CHECKSUMS).unlink()
    assert differing(verify_run(copy)) == ["files"]
    run_study(config_of(model), copy)
    assert (copy / CHECKSUMS).read_bytes() == noted


def test_a_folder_without_a_finished_run_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err
