"""Whole studies of a tiny mixture of each family: `run` and `improve` from the first pass to the report."""

import pytest
from planted_gates import planted_settings

from dean_interp import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig, StudyConfig
from dean_interp.editing.checkpoint import apply_edit_to_checkpoint, checkpoint_state
from dean_interp.editing.edit import load_edit
from dean_interp.selection.gates import load_gates
from dean_interp.study.improve import run_improve
from dean_interp.study.run import run_study
from tests.mixtures import FAMILIES, save_mixture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_study_of_a_mixture_runs_to_its_report(family, tokenizer, tmp_path):
    folder = save_mixture(family, tokenizer, tmp_path / family)
    config = StudyConfig(
        model=ModelConfig(str(folder), device="cpu"),
        data=DataConfig(n_test=12, n_general_test=12),
        calibration=CalibrationConfig(n_calibration=12),
        controls=ControlConfig(n_random=2, n_equal_kl=1),
        answers=AnswerConfig(n_answers=2, answer_lengths=(8,), n_answer_controls=1),
        neuron_fraction=0.15,
        weight_fraction=0.03,
        information_fraction=0.3,
    )
    results = run_study(config, tmp_path / "run")
    assert [unit.unit for unit in results.units] == ["neuron", "weight"]
    for unit in results.units:
        assert unit.edit.n_units > 0 and unit.controls
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_improvement_of_a_mixture_ends_with_an_edit_of_its_folder(family, tokenizer, tmp_path):
    config = planted_settings(tmp_path, tokenizer, n_flips=2, n_random=1)
    save_mixture(family, tokenizer, tmp_path / "model")
    improvement = run_improve(config, tmp_path / "run")
    gates = load_gates(tmp_path / "run" / "gates.safetensors")
    assert any(site.is_of_experts and bool((change != 0).any()) for site, change in gates.changes.items())
    assert 0 < improvement.dose.kl.mean <= 1.1 * config.max_kl
    assert (tmp_path / "run" / "report.html").is_file()
    edit = load_edit(tmp_path / "run" / "edit.safetensors")
    apply_edit_to_checkpoint(tmp_path / "model", edit, tmp_path / "edited")
    assert checkpoint_state(tmp_path / "edited", edit) == "edited"
