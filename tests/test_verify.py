"""A run that was not touched holds; one that was is found out."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dean_interp.cli.main import main
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import run_study
from dean_interp.study.verify import verify_run, write_checksums

SIZES = {"n_calibration": 12, "n_test": 12, "n_general_test": 12, "n_random": 2, "n_equal_kl": 1, "n_answers": 2,
         "max_new_tokens": 4, "n_answer_controls": 1, "neuron_fraction": 0.075, "weight_fraction": 0.03,
         "read_fraction": 0.3, "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "own"
    shutil.copytree(checkpoints["llama-gqa"], model)
    folder = tmp_path_factory.mktemp("run")
    run_study(StudyConfig(model=str(model), **SIZES), folder)
    return model, folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "copy")


def differing(found) -> list[str]:
    return [one.what for one in found.checks if one.verdict == "different"]


def test_a_run_that_was_not_touched_holds(finished, capsys):
    found = verify_run(finished[1])
    assert found.holds and not differing(found) and found.versions == ""
    assert {one.what.split(":")[0] for one in found.checks} == {
        "files", "data", "model", "scores", "selection", "measured"
    }  # fmt: skip
    assert main(["verify", str(finished[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True


def test_everything_scored_again_gives_the_scores(finished):
    found = verify_run(finished[1], full=True)
    every = [one for one in found.checks if "every score" in one.what]
    assert len(every) == 3 and found.holds and max(one.difference for one in every) < 1e-4


def test_other_threads_give_the_same_selection_and_the_difference_is_reported(finished):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        found = verify_run(finished[1], full=True)
    finally:
        torch.set_num_threads(before)
    assert found.holds
    assert all(one.verdict == "same" for one in found.checks if one.what.startswith("selection"))


def test_a_flipped_byte_is_found(copy, capsys):
    path = copy / "scores" / "privacy.safetensors"
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the lowest bit of a number: nothing else would notice
    path.write_bytes(bytes(content))
    assert "files" in differing(verify_run(copy))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(copy)])
    assert ended.value.code == 1 and "changed since the run: scores/privacy.safetensors" in capsys.readouterr().out


def test_an_edited_number_is_found_though_its_checksum_was_renewed(copy):
    path = copy / "states" / "neuron_edit.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("log_prob/fairness"))
    tensors[name][0, 0] += 0.05
    save_file(tensors, path, metadata)
    write_checksums(copy)
    assert differing(verify_run(copy)) == ["measured: neuron edit, fairness"]


def test_another_model_under_the_same_name_is_found(finished):
    model, folder = finished
    weights = model / "model.safetensors"
    original = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    try:
        found = differing(verify_run(folder))
    finally:
        weights.write_bytes(original)
    assert "model" in found and "scores: privacy, fingerprint" in found


def test_a_folder_without_a_finished_run_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err
