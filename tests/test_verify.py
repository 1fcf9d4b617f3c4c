"""A finished run stands, on as many threads as one likes; what was changed after it is found and named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from dean_interp import InputError
from dean_interp.cli.main import main
from dean_interp.study import verify
from dean_interp.study.config import StudyConfig
from dean_interp.study.folder import SUMS, file_sum, kept_files
from dean_interp.study.results import load_results
from dean_interp.study.run import run_study
from dean_interp.study.verify import TOLERANCE, verify_run

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"units": ("weight",), "n_calibration": 20, "n_test": 12, "n_general_test": 4, "n_random": 1, "n_equal_kl": 1,
         "n_answers": 2, "max_new_tokens": 4, "n_answer_controls": 0, "weight_fraction": 0.03, "read_fraction": 0.3,
         "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def model(checkpoints, tmp_path_factory):
    """A checkpoint folder of this module's own."""
    return shutil.copytree(checkpoints["llama-gqa"], tmp_path_factory.mktemp("model") / "own")


@pytest.fixture(scope="module")
def finished(model, one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_study(StudyConfig(model=str(model), **SIZES), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy to change."""
    return shutil.copytree(finished, tmp_path / "run")


def write_sums_anew(run):
    (run / SUMS).write_text("".join(f"{file_sum(run / name)}  {name}\n" for name in kept_files(run)))


def different(verification):
    return [one.what for one in verification.checks if one.verdict == "different"]


@pytest.fixture
def derived(run, monkeypatch):
    """Results from the kept files are taken as they are stored: other tests derive them."""
    monkeypatch.setattr(verify, "results_in", lambda *_: load_results(run / "results.json"))


def change(path, tensor, factor):
    """Multiply the first number of a tensor in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {each: file.get_tensor(each) for each in file.keys()}, file.metadata()
    tensors[tensor].view(-1)[0] *= factor
    save_file(tensors, path, metadata)


def test_a_run_holds_and_is_left_as_it_was(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["verify", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] and {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    said = {one["what"]: one["verdict"] for one in found["checks"]}
    assert said["results, from the kept files"] == said["weights, from the kept scores"] == "same bytes"
    assert said["neuron scores on 2 privacy examples"] != "different" and said["model"] == "same bytes"
    assert "weight edit: log-probabilities of 4 general prompts" in said


def test_a_second_run_of_the_same_settings_gives_the_same_bytes(finished, model, tmp_path):
    run_study(StudyConfig(model=str(model), **SIZES), tmp_path)
    assert (tmp_path / SUMS).read_text() == (finished / SUMS).read_text()


def test_more_threads_and_another_processor_give_the_same_selection_and_numbers_within_the_tolerance(finished):
    """Plain instructions in the place of this processor's own round differently, as another machine does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "MKL_CBWR": "COMPATIBLE",
                   "ATEN_CPU_CAPABILITY": "default"}  # fmt: skip
    command = [sys.executable, "-m", "dean_interp.cli.main", "verify", str(finished), "--full", "--json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = {one["what"]: one for one in json.loads(ended.stdout)["checks"]}
    overlap = found["weights, from the new scores (1 - Jaccard overlap)"]
    assert overlap["verdict"] == "same bytes" and overlap["difference"] == 0
    for what in ("neuron scores on 20", "weight scores on 20", "original: log-probabilities of 12"):
        (one,) = (some for name, some in found.items() if name.startswith(f"{what} fairness"))
        assert one["difference"] <= one["allowed"] == TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["scores/privacy.safetensors", "states/weight_random_1.safetensors", "config.json"])
def test_a_flipped_bit_is_found_in_any_file(run, name, capsys, monkeypatch):
    monkeypatch.setattr(verify, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    content = bytearray((run / name).read_bytes())
    content[-5] ^= 1
    (run / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(run)])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and said.splitlines()[1].split()[0] == name and "does not hold: 1 of 1 checks" in said


def test_a_file_that_is_gone_is_found(run):
    (run / "answers" / "original.json").unlink()
    (one,) = verify_run(run).checks
    assert (one.what, one.now, one.verdict) == ("answers/original.json", "missing", "different")


def test_an_edited_number_is_found_even_where_the_sums_were_written_anew(run):
    results = json.loads((run / "results.json").read_text())
    results["units"][0]["states"][0]["kl"] += 0.01
    (run / "results.json").write_text(json.dumps(results))
    assert different(verify_run(run)) == ["results.json"]
    write_sums_anew(run)
    found = verify_run(run)
    assert different(found) == ["results, from the kept files"] and found.checks[-1].difference == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("states/weight_edit", "log_prob/privacy", "weight edit: log-probabilities of 4 privacy prompts"),
        ("scores/general", "groups/L1.neurons", "neuron scores on 2 general examples"),
        ("scores/fairness", "loss", "losses of 2 fairness examples"),
    ],
)
def test_a_stored_tensor_that_the_model_does_not_give_is_found(run, derived, name, tensor, what):
    change(run / f"{name}.safetensors", tensor, 1.05)
    write_sums_anew(run)
    assert different(verify_run(run)) == [what]


def test_another_model_of_the_same_name_is_found(run, model):
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    change(weights, "model.layers.1.mlp.up_proj.weight", 1.01)
    found = verify_run(run)
    weights.write_bytes(kept)
    assert different(found) == ["model", "scores: fairness", "scores: privacy", "scores: general"]


def test_other_data_of_the_same_name_are_found(run):
    begun = json.loads((run / "config.json").read_text())
    begun["data"]["privacy (test)"] = "other"
    (run / "config.json").write_text(json.dumps(begun))
    write_sums_anew(run)
    assert different(verify_run(run)) == ["data: privacy (test)"]


def test_a_run_that_is_not_finished_is_refused(run):
    (run / SUMS).unlink()
    with pytest.raises(InputError, match="holds no finished run: SHA256SUMS is missing"):
        verify_run(run)
