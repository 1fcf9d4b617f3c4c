"""A study that is killed at any moment goes on, and ends in the bytes of one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from killed_study import content
from several_processes import SIZES

from dean_interp import InputError, tensorfile
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import run_study


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(kills, checkpoints, tmp_path):
    script = Path(__file__).with_name("killed_study.py")
    command = [sys.executable, str(script), str(kills), "0", str(checkpoints["llama-gqa"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["ended"] >= 1 and found["different"] == []


@pytest.mark.long
def test_a_full_disk_keeps_what_was_finished_and_the_run_goes_on(checkpoints, tmp_path, monkeypatch):
    config = StudyConfig(model=str(checkpoints["llama-gqa"]), **SIZES | {"n_answers": 0})
    run_study(config, tmp_path / "whole")
    save, saved = tensorfile.save_file, []

    def save_until_full(tensors, path, metadata):
        saved.append(path)
        if len(saved) > 30:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(tensorfile, "save_file", save_until_full)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device. What was finished before is kept"):
        run_study(config, tmp_path / "full")
    assert list((tmp_path / "full" / "scores").glob("*.safetensors")) and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    run_study(config, tmp_path / "full")
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="cannot write to"):
        run_study(StudyConfig(model="nowhere", **SIZES), tmp_path / "file" / "run")
