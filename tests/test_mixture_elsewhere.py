"""A mixture whose experts lie in memory and on disk, or whose scoring was killed, gives the same numbers."""

import pytest
import torch
from graphs import bytes_held

from dean_interp import ScoringConfig, ablate, generate, importance, load_behaviour, load_model, measure
from dean_interp.models.experts import routed_experts
from dean_interp.models.load import model_fingerprint
from dean_interp.models.matrices import weight, weight_sites
from dean_interp.models.offload import held_once, is_offloaded
from dean_interp.scoring import importance as engine
from tests.mixtures import FAMILIES, save_mixture
from tests.test_experts import chosen, logits_of
from tests.test_offload import cache  # noqa: F401 - a fixture

UNITS = ("neuron", "weight")
HOW = ScoringConfig(template="raw", batch_tokens=400)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tokenizer, tmp_path_factory):
    return save_mixture(request.param, tokenizer, tmp_path_factory.mktemp("mixture") / request.param)


@pytest.fixture(scope="module")
def both(folder):
    """One mixture whole, and with its last two layers on disk."""
    whole = load_model(folder, device="cpu")
    outer = whole.original_model.get_submodule("model")
    places = {f"model.{name}": "cpu" for name, _ in outer.named_children() if name != "layers"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    away = load_model(folder, device=places)
    assert is_offloaded(away) and routed_experts(away, 1).stack("out").is_meta
    return whole, away


def same(one, other):
    for kind in ("values", "activation_mean", "activation_norm", "groups", "slots"):
        first, second = getattr(one, kind), getattr(other, kind)
        assert first.keys() == second.keys()
        for site, tensor in first.items():
            assert torch.equal(second[site], tensor), (kind, site)
    assert torch.equal(one.loss, other.loss) and one.fingerprint == other.fingerprint


def test_offloaded_experts_are_the_same_model(both):
    whole, away = both
    assert model_fingerprint(away) == model_fingerprint(whole)
    assert torch.equal(logits_of(away), logits_of(whole))
    for site in weight_sites(whole):
        assert torch.equal(weight(away, site), weight(whole, site)), site


@pytest.mark.parametrize("how", [HOW, ScoringConfig(template="raw", target="margin", signed=True, layers_per_pass=1)])
def test_offloaded_experts_are_scored_equally(both, how):
    privacy = load_behaviour("privacy", n_examples=3)
    whole, away = (importance(model, privacy, unit=UNITS, config=how) for model in both)
    same(whole, away)


def test_offloaded_experts_are_silenced_measured_and_answer_equally(both):
    test = load_behaviour("fairness", split="test", n_examples=4)
    found = []
    for model in both:
        with ablate(model, chosen(model)):
            measured = measure(model, [test], answer_tokens=8)["fairness"].log_prob
            found.append((logits_of(model), measured, generate(model, test.prompts[:2], max_new_tokens=6)))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(one, other)
    assert found[0][2] == found[1][2]


@pytest.mark.filterwarnings("ignore:_packed_")
def test_the_graph_of_a_pass_holds_no_expert_that_was_brought(both):
    whole, away = both
    n_bytes = {}
    gradients = []
    for name, model in {"whole": whole, "away": away}.items():
        with held_once(model):
            n_bytes[name], gradient = held_by_graph(model)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    stacks = 0
    for layer in (1, 2):
        experts = routed_experts(whole, layer)
        stacks += sum(stored.nbytes for stored in experts.module.parameters()) if experts else 0
    assert n_bytes["whole"] - n_bytes["away"] >= 0.99 * stacks * has_matrices(whole)


def has_matrices(model) -> float:
    """The share of the experts' parameters that are matrices: a bias is saved by no graph."""
    experts = routed_experts(model, 1)
    stored = [experts.stack(part) for part in ("in", "out")]
    return sum(one.nbytes for one in stored) / sum(one.nbytes for one in experts.module.parameters())


def held_by_graph(model) -> tuple[int, torch.Tensor]:
    """Bytes of the storages that the graph of one pass holds, and the gradient of the embedded text that comes back."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    given = torch.ones(1, 9, 24, requires_grad=True)
    loss = model.original_model(inputs_embeds=given, use_cache=False).logits.square().sum()
    held = bytes_held(loss)
    (gradient,) = torch.autograd.grad(loss, given)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return held, gradient


def test_a_killed_scoring_of_a_mixture_resumes_to_the_same_numbers(both, tmp_path, monkeypatch):
    model, path = both[0], tmp_path / "scores.unfinished"
    privacy = load_behaviour("privacy", n_examples=4)
    real, n_batches = engine.stream_gradients, []
    dies_at = 10**9

    def killed(*arguments, **options):
        n_batches.append(1)
        if len(n_batches) == dies_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(engine, "stream_gradients", killed)
    expected = importance(model, privacy, unit=UNITS, config=HOW)
    n_all, dies_at = len(n_batches), len(n_batches) + 3
    with pytest.raises(KeyboardInterrupt):
        importance(model, privacy, unit=UNITS, config=HOW, unfinished=path)
    n_before = len(n_batches)
    same(expected, importance(model, privacy, unit=UNITS, config=HOW, unfinished=path))
    assert n_all > 2 and len(n_batches) - n_before == n_all - 2, "the two finished batches are not run again"
