"""Tiny mixtures of each family from the first command to an edited checkpoint: `run`, `improve`, `edit export`."""

import json

import pytest
import torch
from planted_gates import planted_settings
from transformers import AutoModelForCausalLM

from dean_interp import load_model
from dean_interp.cli.main import main
from dean_interp.editing.ablation import gated
from dean_interp.selection.gates import load_gates
from dean_interp.study.improvement import load_improvement
from tests.mixtures import FAMILIES, save_mixture

pytestmark = pytest.mark.slow

IDS = torch.tensor([[2, 70, 80, 90, 100, 3, 60, 61, 62]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_study_of_a_mixture_runs_to_its_report(family, tokenizer, tmp_path):
    folder = save_mixture(family, tokenizer, tmp_path / family)
    sizes = ["--n-test", "12", "--n-general-test", "12", "--n-calibration", "12", "--n-random", "2"]
    sizes += ["--n-equal-kl", "1"]
    answers = ["--n-answers", "2", "--answer-lengths", "8", "--n-answer-controls", "1"]
    units = ["--neuron-fraction", "0.15", "--weight-fraction", "0.03", "--information-fraction", "0.3"]
    out = tmp_path / "run"
    assert main(["run", "--model", str(folder), "--device", "cpu", "--out", str(out), *sizes, *answers, *units]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [unit["unit"] for unit in results["units"]] == ["neuron", "weight"]
    for unit in results["units"]:
        # the edit, two random sets, one at its KL, and the top of each behaviour
        assert unit["states"][0]["n_units"] == unit["sizes"]["coupled"] > 0
        assert len(unit["states"]) >= 6 and unit["information"]
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_improvement_of_a_mixture_ends_with_an_edit_of_its_folder(family, tokenizer, tmp_path):
    config = planted_settings(tmp_path, tokenizer)
    folder = save_mixture(family, tokenizer, tmp_path / "mixture")
    out, edited = tmp_path / "run", tmp_path / "edited"
    command = [
        "improve", "--model", str(folder), "--device", "cpu", "--template", "raw", "--first", config.first, "--second",
        config.second, "--general", config.general, "--register", str(config.register), "--out", str(out),
        "--n-score", "20", "--n-choose", "12", "--n-confirm", "32", "--n-flips", "2", "--n-random", "1",
        "--n-answers", "0",
    ]  # fmt: skip
    assert main(command) == 0
    gates = load_gates(out / "gates.safetensors")
    assert any(site.is_of_experts and bool((change != 0).any()) for site, change in gates.changes.items())
    assert 0 < load_improvement(out).dose.kl.mean <= 1.1 * config.max_kl
    assert (out / "report.html").is_file()
    assert main(["edit", "export", str(out / "edit.safetensors"), "--model", str(folder), "--out", str(edited)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(edited, dtype="float32").eval()
    model = load_model(folder, device="cpu")
    with torch.inference_mode(), gated(model, gates):
        expected = model(IDS, return_type="logits")
        logits = plain(IDS).logits
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
