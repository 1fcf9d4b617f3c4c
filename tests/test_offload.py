"""A model that lies in memory and on disk gives the numbers of one that is all in memory."""

import pytest
import torch
from graphs import bytes_held
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dean_interp import (
    InputError,
    ScoringConfig,
    Selection,
    Site,
    ablate,
    apply_edit,
    create_edit,
    generate,
    importance,
    load_behaviour,
    load_model,
    measure,
)
from dean_interp.evaluation.guard import super_weights
from dean_interp.models.load import model_fingerprint
from dean_interp.models.matrices import weight, weight_sites
from dean_interp.models.offload import held_once, is_offloaded
from dean_interp.models.supported import refuse_not_finite
from dean_interp.scoring.methods import wanda
from dean_interp.scoring.per_example import example_scores

UNITS = ("neuron", "weight")
EDIT = Selection({Site(1, "neurons"): torch.tensor([3, 5])}, {Site(1, "neurons"): (40,)})
WEIGHTS = Selection({Site(2, "out"): torch.tensor([3, 500])}, {Site(2, "out"): (40, 24)})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEAN_INTERP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2"])
def both(request, checkpoints):
    """One model whole, and with its last two layers on disk."""
    folder = checkpoints[request.param]
    whole = load_model(folder, device="cpu")
    blocks = "model.layers" if request.param == "llama-gqa" else "transformer.h"
    names = [name for name, _ in whole.original_model.named_children()]
    outer = whole.original_model.get_submodule(names[0])
    rest = {f"{names[0]}.{name}": "cpu" for name, _ in outer.named_children() if not blocks.endswith(f".{name}")}
    placed = rest | {"lm_head": "cpu", f"{blocks}.0": "cpu", f"{blocks}.1": "disk", f"{blocks}.2": "disk"}
    away = load_model(folder, device=placed)
    assert is_offloaded(away) and not is_offloaded(whole)
    return whole, away


def test_what_is_away_is_the_same_model(both):
    whole, away = both
    assert model_fingerprint(away) == model_fingerprint(whole)
    for site in weight_sites(whole, "all" if hasattr(whole.blocks[0].attn, "q") else "mlp"):
        assert torch.equal(weight(away, site), weight(whole, site))
    assert [str(one) for one in super_weights(away)] == [str(one) for one in super_weights(whole)]
    refuse_not_finite(away)


@pytest.mark.parametrize(
    "how", [ScoringConfig(), ScoringConfig(target="margin", signed=True, layers_per_pass=1)], ids=str
)
def test_scores_are_equal(both, how):
    whole, away = both
    one = load_behaviour("privacy", n_examples=4)
    first, second = (importance(model, one, unit=UNITS, config=how) for model in both)
    assert second.fingerprint == first.fingerprint
    for site in first.values:
        assert torch.equal(second[site], first[site]), site
    assert all(parameter.requires_grad for parameter in away.parameters())
    for site, values in wanda(whole, one).values.items():
        assert torch.equal(wanda(away, one).values[site], values)
    chosen = EDIT.units | WEIGHTS.units
    effects = [example_scores(model, one, chosen) for model in both]
    assert all(torch.equal(effects[0][site], effects[1][site]) for site in chosen)


@pytest.mark.parametrize("edit", [EDIT, WEIGHTS], ids=["neurons", "weights"])
def test_ablations_measure_and_answer_equally(both, edit):
    test = load_behaviour("fairness", split="test", n_examples=12)
    found = []
    for model in both:
        with ablate(model, edit):
            measured = measure(model, [test], answer_tokens=8)["fairness"]
            found.append((measured, generate(model, test.prompts[:3], max_new_tokens=6)))
    assert torch.equal(found[0][0].log_prob, found[1][0].log_prob)
    assert found[0][1] == found[1][1]


def test_an_edit_is_made_of_what_is_away_and_not_written_into_it(both):
    whole, away = both
    edit = create_edit(away, EDIT)
    assert edit.digest == create_edit(whole, EDIT).digest
    with pytest.raises(InputError, match="needs all weights on devices that compute"):
        apply_edit(away, edit)


def test_the_graph_of_a_pass_holds_no_weight_that_was_brought(tmp_path):
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=50
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with_all = graph_bytes(model)
    with held_once(model):
        without = graph_bytes(model)
    assert torch.equal(with_all[1], without[1])
    assert with_all[0] > 4 * 4 * 3 * 256 * 1024 and without[0] < with_all[0] / 10


def graph_bytes(model) -> tuple[int, torch.Tensor]:
    """Bytes that the graph of one pass holds, by its saved tensors, and the gradient that comes back."""
    given = torch.ones(1, 5, 256, requires_grad=True)
    loss = model(inputs_embeds=given).logits.square().sum()
    held = bytes_held(loss)
    (gradient,) = torch.autograd.grad(loss, given)
    return held, gradient
