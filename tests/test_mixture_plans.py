"""What a mixture of experts would take: of the weights all experts, of a token's work those that it is sent to."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from dean_interp import ScoringConfig, load_behaviour, load_model
from dean_interp.cli.main import main
from dean_interp.models.experts import routed_experts
from dean_interp.models.matrices import neuron_sites, weight_sites
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_counts
from dean_interp.planning.memory import batch_bytes
from dean_interp.planning.parameters import n_parameters, n_used_neurons, n_used_parameters, n_used_weights, n_weights
from dean_interp.planning.placement import Devices
from dean_interp.planning.scoring import _HEAP, _Probe, plan
from dean_interp.planning.site_sums import alike, site_bytes
from dean_interp.planning.study import forecast
from dean_interp.scoring.importance import run_pass
from dean_interp.scoring.preparation import prepare
from dean_interp.scoring.sums import Sums
from dean_interp.study.config import StudyConfig
from dean_interp.study.settings import CalibrationConfig, ModelConfig
from tests.mixtures import FAMILIES, mixture

pytestmark = pytest.mark.usefixtures("estimates_untimed")
GIB = 2**30
BOTH = ("neuron", "weight")
REAL = {
    "Qwen3MoeForCausalLM": lambda: Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144, vocab_size=151936,
    ),
    "GptOssForCausalLM": lambda: GptOssConfig(
        hidden_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
        intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4, vocab_size=201088,
    ),
    "MixtralForCausalLM": lambda: MixtralConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2, vocab_size=32000,
    ),
    "DeepseekV3ForCausalLM": DeepseekV3Config,
}  # fmt: skip
# Billions of parameters as their makers give them, all and those of a token (OpenAI's are without the embedding);
# neurons by hand.
SIZES = {
    "Qwen3MoeForCausalLM": (30.5, 3.3, 48 * 128 * 768, 48 * 8 * 768, 3 * 2048),
    "GptOssForCausalLM": (20.9, 3.61 + 0.58, 24 * 32 * 2880, 24 * 4 * 2880, 3 * 2880),
    "MixtralForCausalLM": (46.7, 12.9, 32 * 8 * 14336, 32 * 2 * 14336, 3 * 4096),
    "DeepseekV3ForCausalLM": (671, 37, 3 * 18432 + 58 * 257 * 2048, 3 * 18432 + 58 * 9 * 2048, 3 * 7168),
}


@pytest.fixture(scope="module", params=REAL)
def real(request, tokenizer, tmp_path_factory):
    """The name of an architecture, and a folder with a configuration of real size and no weights."""
    folder = tmp_path_factory.mktemp("real")
    config = REAL[request.param]()
    config.architectures = [request.param]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


def config_of(folder):
    return StudyConfig(
        model=ModelConfig(str(folder), dtype="bfloat16", template="raw"),
        calibration=CalibrationConfig(score_tokens=1024),
    )


def test_a_real_mixture_is_forecast_from_its_configuration_alone(real, monkeypatch):
    name, folder = real
    billions, used_billions, n_neurons, n_used, weights_a_neuron = SIZES[name]
    model = load_model(folder, device="meta", dtype="bfloat16")
    assert n_parameters(model) == pytest.approx(billions * 1e9, rel=0.01)
    assert sum(neuron_counts(model)) == n_neurons and n_used_neurons(model) == n_used
    assert n_weights(model) == weights_a_neuron * n_neurons and n_used_weights(model) == weights_a_neuron * n_used
    assert n_used_parameters(model) == pytest.approx(used_billions * 1e9, rel=0.03)
    monkeypatch.setattr(ModelConfig, "shape", lambda _: model)
    found = forecast(config_of(folder), Devices(gpus=16, gpu_gib=141.0, host_gib=2000.0, tflops=200.0))
    assert found.n_parameters == n_parameters(model)
    assert found.weights_gib == pytest.approx(2 * billions * 1e9 / GIB, rel=0.01)
    assert "processes share the work" in found.placement or "laid over 16 GPUs" in found.placement
    assert f"{n_neurons:,} neurons in all, a token uses {n_used:,}" in found.experts


def test_time_is_that_of_the_experts_that_a_token_is_sent_to(tokenizer, monkeypatch):
    """Twice as many experts are twice the memory and no more time."""
    found = []
    for n_experts in (8, 16):
        sizes = {"num_local_experts": n_experts, "hidden_size": 128, "intermediate_size": 256}
        model = load_model(mixture("mixtral", len(tokenizer), sizes=sizes), tokenizer=tokenizer)
        monkeypatch.setattr(ModelConfig, "shape", lambda _, model=model: model)
        found.append(forecast(config_of("small"), Devices(gpus=1, host_gib=64.0, tflops=1.0)))
    eight, sixteen = found
    assert sixteen.weights_gib > 1.7 * eight.weights_gib
    for one, other in zip(eight.steps, sixteen.steps, strict=True):
        if one.step != "edit":
            assert other.seconds == pytest.approx(one.seconds, rel=0.02), one.step


def test_the_command_says_what_a_token_uses(real, capsys):
    name, folder = real
    if name != "GptOssForCausalLM":
        return
    given = ["plan", "--model", str(folder), "--dtype", "bfloat16", "--gpus", "1", "--gpu-gib", "141"]
    assert main([*given, "--tflops", "200", "--unit", "neuron", "--score-tokens", "1024"]) == 0
    said = capsys.readouterr().out
    assert "20.91 billion parameters" in said
    assert "24 layers of 32 experts with 2,880 neurons each, a token uses 4" in said
    assert "2,211,840 neurons in all, a token uses 276,480" in said
    assert "of the parameters a token uses 4.19 billion" in said


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tokenizer):
    return load_model(mixture(request.param, len(tokenizer)), tokenizer=tokenizer)


def test_a_configuration_says_how_many_experts_a_token_is_sent_to(tiny):
    for layer in range(3):
        experts = routed_experts(tiny, layer)
        if experts is not None:
            assert experts.ids is not None and experts.ids.shape[2] == experts.n_per_token == 2
            experts.ids = None
            assert experts.n_per_token == 2


def test_sums_take_the_bytes_that_are_said(tiny):
    sites = [*neuron_sites(tiny), *weight_sites(tiny)]
    groups = torch.arange(5)
    sums = Sums(tiny, sites, groups=groups, rows_each=1, folds=("size",)).sums
    for site in sites:
        held = sum(tensor.nbytes for name, tensor in sums.items() if name.endswith(f"/{site}"))
        assert site_bytes(tiny, site, len(groups)) == held, site


def test_every_site_is_like_one_of_its_own_kind(tiny):
    sites = neuron_sites(tiny)
    for site, other in alike(tiny, sites).items():
        assert other in sites and (other.part, other.n_experts) == (site.part, site.n_experts)
    dense = [Site(layer, "neurons") for layer in range(3)]
    if sites == dense:
        assert set(alike(tiny, sites).values()) == {Site(1, "neurons")}


@pytest.mark.parametrize("units", [("neuron",), BOTH], ids=str)
def test_the_peak_of_a_plan_is_what_a_pass_allocates(tiny, units, one_thread):
    how = ScoringConfig(template="raw", batch_tokens=2048)
    behaviour = load_behaviour("privacy", n_examples=12)
    planned = plan(tiny, behaviour, unit=units, config=how)
    sites = neuron_sites(tiny) + (weight_sites(tiny) if len(units) == 2 else [])
    data = prepare(tiny, behaviour, how)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        run_pass(tiny, data, sites, how, label="watched")
    events = [one for one in watched.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = sorted((one.start_ns(), one.nbytes()) for one in events)
    peak = max(itertools.accumulate((n_bytes for _, n_bytes in changes), initial=0))
    assert planned.sums_bytes + planned.batch_bytes / _HEAP == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_memory_of_a_batch_beside_what_is_watched(family, tokenizer, one_thread):
    model = load_model(mixture(family, len(tokenizer), sizes=SMALL[family]), tokenizer=tokenizer)
    how = ScoringConfig(template="raw", batch_tokens=4096)
    data = prepare(model, load_behaviour("privacy", n_examples=6), how)
    longest = max(sum(len(branch.tokens) for branch in row) for row in data.rows)
    watched = _Probe(model, data, neuron_sites(model), how).batch_bytes()(6, longest) / _HEAP
    assert batch_bytes(model, data.rows, 6 * longest, "float32") == pytest.approx(watched, rel=0.35)


SMALL = {
    "qwen3_moe": {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64, "intermediate_size": 256},
    "gpt_oss": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128},
    "deepseek_v3": {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 256},
}
