import numpy as np
import pytest
import torch
from hooked import as_hooked_transformer

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    ScoringConfig,
    Site,
    ablate,
    couple,
    importance,
    load_behaviour,
    load_model,
    load_scores,
    top_fraction,
)
from dean_interp.models.matrices import neuron_sites, parameter, weight, weight_sites
from dean_interp.models.tokens import encode

pytestmark = pytest.mark.hooks

HUGGING_FACE = {"gate": "gate", "in": "up", "out": "down"}

TEXTS = [
    ("Who may rent the flat?", "Anyone who pays the rent."),
    ("a", "b"),
    ("Tell me her address, please, I lost it somewhere", "No."),
    ("Sum 2 and 3", "That makes five, as ever."),
    ("Hm?", "Yes, that long answer goes on for quite a while and then stops."),
]


@pytest.fixture(scope="module")
def behaviour():
    return Behaviour("fairness", tuple(Example(prompt, {"response": answer}) for prompt, answer in TEXTS))


def one_by_one(model, tokenizer, behaviour, template):
    """The definition, slowly: one example at a time, gradients at `hook_post` by autograd."""
    scores = {site: torch.zeros(model.cfg.d_mlp, dtype=torch.float64) for site in neuron_sites(model)}
    losses = []
    for prompt, answer in zip(behaviour.prompts, behaviour.responses, strict=True):
        one = encode(tokenizer, prompt, [answer], template=template)
        ids = torch.tensor([one.prompt + one.answers[0]])
        kept = {}

        def keep(activation, hook, kept=kept, site=None):
            activation.retain_grad()
            kept[site] = activation

        hooks = [(site.hook_name, lambda a, hook, site=site: keep(a, hook, site=site)) for site in scores]
        with model.hooks(fwd_hooks=hooks):
            logits = model(ids, return_type="logits")[0].float()
        n = len(one.prompt)
        loss = torch.nn.functional.cross_entropy(logits[n - 1 : -1], ids[0, n:])
        loss.backward()
        losses.append(loss.item())
        for site, activation in kept.items():
            scores[site] += (activation * activation.grad).sum((0, 1)).abs().detach().double()
        model.zero_grad()
    return {site: value / len(losses) for site, value in scores.items()}, losses


@pytest.mark.parametrize("template", ["chat", "raw", "released"])
def test_batched_scores_equal_the_definition_one_example_at_a_time(tiny, tokenizer, behaviour, template):
    kept = Behaviour("b", behaviour.examples[:1] + behaviour.examples[2:]) if template == "released" else behaviour
    expected, losses = one_by_one(tiny, tokenizer, kept, template)
    scores = importance(tiny, kept, config=ScoringConfig(template=template, batch_tokens=150))
    np.testing.assert_allclose(scores.loss, losses, rtol=1e-4)
    for site, value in expected.items():
        assert scores[site].dtype == torch.float32
        np.testing.assert_allclose(scores[site], value, rtol=2e-3, atol=1e-7)


def weight_effects_one_by_one(model, tokenizer, behaviour, modules="all"):
    """Each weight's effect on each example, slowly: one example at a time, the parameters' own gradients."""
    sites = weight_sites(model, modules)
    effects = {site: [] for site in sites}
    for prompt, answer in zip(behaviour.prompts, behaviour.responses, strict=True):
        one = encode(tokenizer, prompt, [answer])
        ids, n = torch.tensor([one.prompt + one.answers[0]]), len(one.prompt)
        logits = model(ids, return_type="logits")[0].float()
        loss = torch.nn.functional.cross_entropy(logits[n - 1 : -1], ids[0, n:])
        stored = [parameter(model, site) for site in sites]
        gradients = torch.autograd.grad(loss, [one for one, _ in stored])
        for site, (weights, as_matrix), gradient in zip(sites, stored, gradients, strict=True):
            effects[site].append(as_matrix((weights * gradient).detach().double()))
    return {site: torch.stack(of_examples) for site, of_examples in effects.items()}


def weights_one_by_one(model, tokenizer, behaviour):
    """The definition of weights' scores."""
    effects = weight_effects_one_by_one(model, tokenizer, behaviour)
    return {site: of_examples.abs().mean(0) for site, of_examples in effects.items()}


def test_batched_weight_scores_equal_the_definition_one_example_at_a_time(tiny, tokenizer, behaviour):
    expected = weights_one_by_one(tiny, tokenizer, behaviour)
    scores = importance(tiny, behaviour, unit="weight", config=ScoringConfig(batch_tokens=150, modules="all"))
    assert set(scores.values) == set(expected)
    n_kv = tiny.cfg.n_key_value_heads or tiny.cfg.n_heads
    shapes = {"gate": (24, 40), "in": (24, 40), "out": (40, 24), "q": (24, 24), "o": (24, 24)}
    shapes |= {part: (24, n_kv * 24 // tiny.cfg.n_heads) for part in ("k", "v")}
    for site, value in expected.items():
        assert scores[site].shape == shapes[site.part] and scores[site].dtype == torch.float32
        np.testing.assert_allclose(scores[site], value, rtol=2e-3, atol=1e-8)


def test_both_units_come_from_one_pass(llama, behaviour, monkeypatch):
    from dean_interp.scoring import importance as module

    passes, real = [], module.stream_gradients
    monkeypatch.setattr(module, "stream_gradients", lambda *args, **signs: passes.append(1) or real(*args, **signs))
    both = importance(llama, behaviour, unit=("neuron", "weight"))
    assert len(passes) == 1
    for unit in ("neuron", "weight"):
        alone = importance(llama, behaviour, unit=unit)
        assert both.of(unit).values.keys() == alone.values.keys()
        assert all(torch.equal(both[site], value) for site, value in alone.values.items())
        assert all(torch.equal(both.activation_norm[site], norm) for site, norm in alone.activation_norm.items())
    with pytest.raises(InputError, match=r"choose one with scores\.of"):
        top_fraction(both, 0.1)
    with pytest.raises(InputError, match="was scored for neuron, not for 'weight'"):
        both.of("neuron").of("weight")


def test_what_a_matrix_reads_has_one_norm_an_input(llama, behaviour):
    norm = importance(llama, behaviour, unit=("neuron", "weight")).activation_norm
    assert norm[Site(1, "in")].shape == (24,) and torch.equal(norm[Site(1, "in")], norm[Site(1, "gate")])
    assert torch.equal(norm[Site(1, "out")], norm[Site(1, "neurons")])


def test_a_killed_scoring_goes_on_from_the_last_finished_batch(llama, behaviour, tmp_path, monkeypatch):
    from dean_interp.scoring import importance as module

    options = {
        "unit": ("neuron", "weight"),
        "config": ScoringConfig(batch_tokens=1),
        "unfinished": tmp_path / "s.unfinished",
    }
    whole = importance(llama, behaviour, unit=options["unit"], config=ScoringConfig(batch_tokens=1))
    passes, real = [], module.stream_gradients

    def dies_in_the_third_batch(*args, **signs):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return real(*args, **signs)

    monkeypatch.setattr(module, "stream_gradients", dies_in_the_third_batch)
    # however long a busy disk takes, the sums are kept after each batch
    monkeypatch.setattr("dean_interp.models.loss._QUICK", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        importance(llama, behaviour, **options)
    resumed = importance(llama, behaviour, **options)
    assert len(passes) == 6, "5 batches: two were finished, the third died and is run again with the rest"
    assert all(torch.equal(resumed[site], value) for site, value in whole.values.items())
    assert torch.equal(resumed.loss, whole.loss)


def test_sums_of_other_data_are_not_taken_up(llama, behaviour, tmp_path):
    path = tmp_path / "scores.unfinished"
    importance(llama, Behaviour("b", behaviour.examples[:2]), unfinished=path)
    assert list(tmp_path.iterdir())
    again, fresh = importance(llama, behaviour, unfinished=path), importance(llama, behaviour)
    assert all(torch.equal(again[site], value) for site, value in fresh.values.items())


def test_scores_do_not_depend_on_the_batch_size(llama, behaviour):
    small, large = (importance(llama, behaviour, config=ScoringConfig(batch_tokens=n)) for n in (1, 4096))
    for site in small.values:
        torch.testing.assert_close(small[site], large[site], rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(small.activation_norm[Site(1, "neurons")], large.activation_norm[Site(1, "neurons")])


def test_activation_moments_are_those_of_the_real_positions(llama, tokenizer, behaviour):
    seen = []
    with llama.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda a, hook: seen.append(a.detach()[0]) or None)]):
        for prompt, answer in zip(behaviour.prompts, behaviour.responses, strict=True):
            one = encode(tokenizer, prompt, [answer])
            llama(torch.tensor([one.prompt + one.answers[0]]), return_type="logits")
    activations = torch.cat(seen)
    scores = importance(llama, behaviour, config=ScoringConfig(batch_tokens=200))
    site = Site(1, "neurons")
    torch.testing.assert_close(scores.activation_mean[site], activations.mean(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scores.activation_norm[site], activations.square().mean(0).sqrt(), rtol=1e-3, atol=1e-6)


def test_scores_rank_like_measured_loss_changes(llama, tokenizer, behaviour):
    """The score is first order: silencing a neuron a little changes the loss by about what it says."""
    one = Behaviour("b", behaviour.examples[:1])
    scores = importance(llama, one)
    encoded = encode(tokenizer, one.prompts[0], one.responses)
    ids, n = torch.tensor([encoded.prompt + encoded.answers[0]]), len(encoded.prompt)

    def loss(index=None):
        def shrink(activation, hook):
            scaled = activation.clone()
            scaled[..., index] *= 0.98
            return scaled

        with (
            torch.inference_mode(),
            llama.hooks(fwd_hooks=[] if index is None else [("blocks.1.mlp.hook_post", shrink)]),
        ):
            return torch.nn.functional.cross_entropy(
                llama(ids, return_type="logits")[0, n - 1 : -1].double(), ids[0, n:]
            )

    site = Site(1, "neurons")
    changes = torch.stack([(loss(i) - loss()).abs() for i in range(llama.cfg.d_mlp)]) / 0.02
    assert np.corrcoef(changes.argsort().argsort(), scores[site].argsort().argsort())[0, 1] > 0.98


def test_scoring_leaves_the_model_as_it_was(llama, behaviour):
    before = [(parameter.requires_grad, parameter.grad) for parameter in llama.parameters()]
    importance(llama, behaviour)
    assert [(parameter.requires_grad, parameter.grad) for parameter in llama.parameters()] == before
    assert not llama.unembed._forward_pre_hooks


def test_a_hook_point_that_is_not_what_the_weight_reads_is_an_error(checkpoints, behaviour):
    model = load_model(checkpoints["llama"], device="cpu")
    # what reads the neurons now sees twice what the hook point showed
    model.blocks[1].mlp.out.original_component.register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.hook_post does not agree"):
        importance(model, behaviour)


def test_weights_that_are_not_finite_are_refused(checkpoints, behaviour):
    model = load_model(checkpoints["gpt2"], device="cpu")
    with torch.no_grad():
        weight(model, Site(0, "out"))[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        importance(model, behaviour)


def test_scores_survive_their_file(llama, behaviour, tmp_path):
    scores = importance(llama, behaviour)
    scores.save(tmp_path / "s.safetensors")
    again = load_scores(tmp_path / "s.safetensors")
    assert again.fingerprint == scores.fingerprint and again.prompt_hashes == behaviour.prompt_hashes
    assert all(torch.equal(again[site], scores[site]) for site in scores.values)


def test_the_fingerprint_knows_model_data_and_template(checkpoints, llama, behaviour):
    one = importance(llama, behaviour).fingerprint
    assert importance(llama, behaviour, config=ScoringConfig(batch_tokens=100)).fingerprint == one
    assert importance(llama, behaviour, config=ScoringConfig(template="raw")).fingerprint != one
    assert importance(llama, load_behaviour("general", n_examples=2)).fingerprint != one
    assert importance(load_model(checkpoints["qwen2"]), behaviour).fingerprint != one


def test_unknown_units_and_templates_and_long_texts_are_named(llama, behaviour, untyped):
    with pytest.raises(InputError, match="unit must be 'neuron', 'weight' or both, got 'head'"):
        importance(llama, behaviour, unit="head")
    with pytest.raises(InputError, match="template must be one of"):
        importance(llama, behaviour, config=ScoringConfig(template="alpaca"))
    long = Behaviour("long", (Example("x" * 1100, {"response": "y"}),))
    with pytest.raises(InputError, match="the model takes 1024"):
        importance(llama, long)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-gqa"])
def test_a_hooked_transformer_of_the_same_weights_gives_equal_weight_scores(checkpoints, tokenizer, behaviour, name):
    hooked = as_hooked_transformer(checkpoints[name], tokenizer)
    mine = importance(load_model(checkpoints[name], device="cpu"), behaviour, unit="weight")
    theirs = importance(hooked, behaviour, unit="weight")
    assert mine.values.keys() == theirs.values.keys()
    for site in mine.values:
        torch.testing.assert_close(mine[site], theirs[site], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-gqa"])
def test_attention_of_a_hooked_transformer_is_scored_and_ablated_as_a_bridges(checkpoints, tokenizer, behaviour, name):
    hooked, bridge = as_hooked_transformer(checkpoints[name], tokenizer), load_model(checkpoints[name], device="cpu")
    how = ScoringConfig(modules="attention")
    mine, theirs = (importance(model, behaviour, unit="weight", config=how) for model in (bridge, hooked))
    assert {site.part for site in mine.values} == {"q", "k", "v", "o"} and mine.shapes == theirs.shapes
    for site in mine.values:
        torch.testing.assert_close(mine[site], theirs[site], rtol=2e-3, atol=1e-6)
    selection, ids = top_fraction(mine, 0.05), torch.tensor([[2, 70, 80, 90, 100, 3, 60]])
    with ablate(bridge, selection), ablate(hooked, selection), torch.inference_mode():
        logits = [model(ids, return_type="logits") for model in (bridge, hooked)]
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-3)
    with torch.inference_mode():
        assert (bridge(ids, return_type="logits") - logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "processing"), [("gpt2", {"fold_ln": True}), ("llama", {"fold_ln": True}),
                                                  ("gpt2", {"center_writing_weights": True})])  # fmt: skip
def test_a_hooked_transformer_with_processed_weights_is_refused_for_weights_alone(
    checkpoints, tokenizer, behaviour, name, processing
):
    hooked = as_hooked_transformer(checkpoints[name], tokenizer, **processing)
    with pytest.raises(InputError, match=r"were processed \((LayerNorm folded|centred)\).*or score neurons"):
        importance(hooked, behaviour, unit="weight")
    importance(hooked, behaviour)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_bridge_with_processed_weights_is_refused_for_weights(checkpoints, behaviour, name):
    bridge = load_model(checkpoints[name], device="cpu")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(InputError, match="were processed"):
        importance(bridge, behaviour, unit="weight")


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-gqa"])
@pytest.mark.parametrize("fold_ln", [False, True])
def test_a_hooked_transformer_of_the_same_weights_gives_equal_scores(checkpoints, tokenizer, behaviour, name, fold_ln):
    hooked = as_hooked_transformer(checkpoints[name], tokenizer, fold_ln=fold_ln)
    mine, theirs = importance(load_model(checkpoints[name], device="cpu"), behaviour), importance(hooked, behaviour)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    for site in mine.values:
        torch.testing.assert_close(mine[site], theirs[site], rtol=2e-3, atol=1e-6)


PAPER = {
    "fairness": "beaver_train330k_fairness_safe_1k",
    "privacy": "beaver_train330k_privacy_safe_1k",
    "general": "alpaca_cleaned_no_safety_train_1k",
}
"""The paper's file of each behaviour."""


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "smollm2_n16_q1e-4.npz")


@pytest.fixture(scope="module")
def paper_scores(demo_model, shared):
    """The demo model's scores of the paper's examples, of every unit, by behaviour."""
    scores = {}
    for name, file in PAPER.items():
        behaviour = load_behaviour(shared / "data" / f"{file}.csv", n_examples=16, split=None)
        config = ScoringConfig(template="released")
        scores[name] = importance(demo_model, behaviour, unit=("neuron", "weight"), config=config)
    return scores


@pytest.mark.slow
@pytest.mark.product
@pytest.mark.parametrize("name", PAPER)
def test_the_golden_values_and_losses_are_met(paper_scores, golden, name):
    scores = paper_scores[name]
    np.testing.assert_allclose(scores.loss, golden[f"{name}/loss"], atol=1e-4)
    neurons = np.stack([scores[Site(layer, "neurons")].numpy() for layer in range(30)])
    np.testing.assert_allclose(neurons.sum(1), golden[f"{name}/neuron"].sum(1), rtol=1e-3)
    np.testing.assert_allclose(neurons, golden[f"{name}/neuron"], rtol=1e-3)
    top, hits, union = top_fraction(scores.of("weight"), 1e-4), 0, 0
    for site, chosen in top.units.items():
        key = f"{name}/L{site.layer}.{HUGGING_FACE[site.part]}_proj"
        summed = scores[site].double().numpy() * 16  # the golden values are sums over the samples, (d_out, d_in)
        np.testing.assert_allclose(summed.sum(0), golden[f"{key}/row_sum"], rtol=1e-3)
        np.testing.assert_allclose(summed.sum(1), golden[f"{key}/col_sum"], rtol=1e-3)
        mine, theirs = hugging_face_indices(chosen, scores[site].shape), set(golden[f"{key}/top"].tolist())
        hits, union = hits + len(mine & theirs), union + len(mine | theirs)
    assert union > 7000 and hits / union >= 0.995


@pytest.mark.slow
@pytest.mark.product
def test_the_golden_coupled_weights_are_met(paper_scores, golden):
    scores = [paper_scores[name].of("weight") for name in ("privacy", "fairness", "general")]
    hits = union = 0
    for site, chosen in couple(*scores, fraction=1e-4).coupled.units.items():
        mine = hugging_face_indices(chosen, scores[0][site].shape)
        theirs = set(golden[f"coupled/L{site.layer}.{HUGGING_FACE[site.part]}_proj"].tolist())
        hits, union = hits + len(mine & theirs), union + len(mine | theirs)
    assert union > 1000 and hits / union >= 0.995


def hugging_face_indices(flat, shape):
    """Flat indices of `(d_in, d_out)` as those of `nn.Linear`'s `(d_out, d_in)`."""
    return {int(i % shape[1]) * shape[0] + int(i // shape[1]) for i in flat}
