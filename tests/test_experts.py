"""Mixtures of experts: their neurons are hook points, scored and silenced exactly, whatever the family."""

import pytest
import torch

from dean_interp import InputError, Selection, load_model
from dean_interp.data.examples import Behaviour, Example
from dean_interp.editing.ablation import ablate, gated
from dean_interp.editing.patching import neuron_cache, patch_activations
from dean_interp.editing.values import Mean, Noise, Project, Scale
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.models.experts import routed_experts
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.matrices import neuron_sites, parameter, shape, weight, weight_sites
from dean_interp.models.sites import Site, parse_site
from dean_interp.models.sizes import neuron_counts, neuron_shapes, site_shape
from dean_interp.models.tokens import collate
from dean_interp.scoring.importance import importance
from dean_interp.scoring.preparation import ScoringConfig, prepare
from dean_interp.scoring.scores import load_scores
from dean_interp.selection.gates import Gates
from tests.mixtures import D_EXPERT, D_MODEL, EACH, FAMILIES, IDS, N_EXPERTS, mixture, save_mixture


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tokenizer, tmp_path_factory):
    return save_mixture(family, tokenizer, tmp_path_factory.mktemp("mixture") / family)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def behaviour():
    prompts = ["Who won?", "Tell me the street where Ann lives, and more", "Is it so?", "abc abc abc", "Why?", "So"]
    examples = []
    for i, prompt in enumerate(prompts):
        examples.append(Example(prompt, {"safe": "I will not say.", "unsafe": f"It is {i}."}, topic=f"topic {i % 3}"))
    return Behaviour("fairness", tuple(examples), "safe", "calibration")


@pytest.fixture(scope="module")
def scores(model, behaviour):
    return importance(model, behaviour, unit=("neuron", "weight"))


def logits_of(model, ids=IDS):
    with torch.inference_mode():
        return model(ids, return_type="logits")


def close(one, other, largest, tolerance=1e-6):
    return float((one - other).abs().max()) <= tolerance * float(largest.abs().max())


def chosen(model, n=7, seed=0):
    """Some neurons of every site."""
    generator, units, shapes = torch.Generator().manual_seed(seed), {}, neuron_shapes(model)
    for site, (width,) in shapes.items():
        units[site] = torch.randperm(width, generator=generator)[:n].sort().values
    return Selection(units, shapes)


# --- loading


def test_the_logits_are_the_plain_models(family, tokenizer):
    plain = mixture(family, len(tokenizer))
    with torch.inference_mode():
        expected = plain(IDS).logits
    hooked = load_model(plain, tokenizer=tokenizer)
    assert close(logits_of(hooked), expected, expected)


def test_experts_and_shared_experts_and_dense_layers_are_sites(family, model):
    sparse = {"qwen2_moe": [1], "qwen3_moe": [1, 2], "deepseek_v3": [1, 2]}.get(family, [0, 1, 2])
    shared = {"qwen2_moe": 28, "deepseek_v3": D_EXPERT}.get(family)
    expected = {}
    for layer in range(3):
        if layer not in sparse:
            expected[Site(layer, "neurons")] = (40,)
            continue
        expected[Site(layer, "experts", N_EXPERTS)] = (N_EXPERTS * D_EXPERT,)
        if shared:
            expected[Site(layer, "shared")] = (shared,)
    assert neuron_shapes(model) == expected
    assert neuron_counts(model)[1] == N_EXPERTS * D_EXPERT + (shared or 0)
    for site in weight_sites(model):
        width = site_shape(model, site.neurons)[0]
        assert shape(model, site) == ((width, D_MODEL) if site.neurons.out == site else (D_MODEL, width))


def test_hook_points_hold_neurons_wherever_a_site_says_so(model):
    """`blocks.{i}.mlp.hook_post` of a sparse layer is what the block writes: no site may name it."""
    _, cache = model.run_with_cache(IDS)
    for site in neuron_sites(model):
        assert site.hook_name in model.hook_dict
        activation = cache[site.hook_name]
        if site.is_of_experts:
            assert activation.shape == (*IDS.shape, 2, D_EXPERT)
            assert cache[site.ids_hook_name].shape == (*IDS.shape, 2)
            assert int(cache[site.ids_hook_name].max()) < N_EXPERTS
        else:
            assert activation.shape[-1] == site_shape(model, site)[0]
            assert activation.numel() == IDS.numel() * site_shape(model, site)[0]


def test_a_users_own_hook_on_an_expert_neuron_changes_what_the_model_says(model):
    def louder(activation, hook):
        return activation * 1.5

    with model.hooks(fwd_hooks=[(EACH.hook_name, louder)]):
        changed = logits_of(model)
    everything = {site: torch.arange(width) for site, (width,) in neuron_shapes(model).items() if site == EACH}
    shapes = {EACH: neuron_shapes(model)[EACH]}
    with ablate(model, Selection(everything, shapes), value=Scale(1.5)):
        assert torch.equal(logits_of(model), changed)
    assert not close(changed, logits_of(model), changed, 1e-3)


def test_a_site_is_written_and_read_back():
    for site in (Site(3, "experts", 128), Site(3, "experts.out", 128), Site(3, "shared"), Site(3, "shared.gate")):
        assert parse_site(str(site)) == site
    assert str(EACH) == "L1.experts:8"
    for wrong in ("L1.experts", "L1.neurons:8", "L1.experts:0", "L1.experts:x"):
        with pytest.raises(InputError, match="a site is written"):
            parse_site(wrong)


# --- scoring


def test_scores_are_the_parameters_own_gradients(model, behaviour):
    """`importance` compares one layer before it begins. Here every layer, signed, on all examples at once."""
    config = ScoringConfig(signed=True)
    signed = importance(model, behaviour, unit=("neuron", "weight"), config=config)
    # Signed scores of weights add up to those of the neurons that they make.
    for site in neuron_sites(model):
        by_row = signed[site.out].sum(1)
        assert close(by_row, signed[site], signed[site], 1e-4), site


def test_scores_depend_neither_on_batches_nor_on_padding_nor_on_order(model, behaviour, scores):
    alone = importance(model, behaviour, unit=("neuron", "weight"), config=ScoringConfig(batch_tokens=1))
    left = importance(model, behaviour, unit=("neuron", "weight"), config=ScoringConfig(padding="left"))
    backwards = Behaviour(behaviour.name, behaviour.examples[::-1], behaviour.response, behaviour.split)
    turned = importance(model, backwards, unit=("neuron", "weight"))
    for other in (alone, left, turned):
        for site, value in scores.values.items():
            assert close(other.values[site], value, value, 1e-4), site
        for site, slots in scores.slots.items():
            assert torch.equal(other.slots[site], slots)


def test_an_expert_that_no_token_is_sent_to_scores_0_and_is_known_to_be_unseen(model, behaviour, scores):
    for site, slots in scores.slots.items():
        if site.unit == "neuron":
            by_expert = scores[site].unflatten(0, (N_EXPERTS, -1))
            assert (by_expert[slots == 0] == 0).all()
            # An expert of the last layer may have got tokens that predict no answer.
            assert (by_expert[slots > 0].abs().sum(1) > 0).float().mean() > 0.8
            assert scores.activation_norm[site].unflatten(0, (N_EXPERTS, -1))[slots == 0].sum() == 0


def test_slots_are_counted_without_padding(model, behaviour, scores):
    n_tokens = 0
    seen = []

    def count(ids, hook):
        seen.append(ids)

    with model.hooks(fwd_hooks=[(EACH.ids_hook_name, count)]):
        importance(model, behaviour, config=ScoringConfig(batch_tokens=1))
    # The check of the hooks runs one row before, forward twice.
    for ids in seen[2:]:
        n_tokens += ids.shape[1]
    assert int(scores.slots[EACH].sum()) == 2 * n_tokens


def test_scores_of_experts_are_kept_in_their_file(scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors", keep=1.0)
    again = load_scores(tmp_path / "scores.safetensors")
    assert again.slots.keys() == scores.slots.keys()
    for site, value in scores.values.items():
        assert torch.equal(again[site], value)
    table = again.of("neuron").to_pandas()
    of_expert = table[(table.layer == 1) & (table.part == "experts") & (table.expert == 3) & (table["index"] == 5)]
    assert float(of_expert.score.iloc[0]) == pytest.approx(float(scores[EACH][3 * D_EXPERT + 5]))


# --- ablation


def test_silencing_by_hook_is_zeroing_columns_of_the_checkpoint(family, tokenizer, folder, model):
    selection = chosen(model)
    with ablate(model, selection):
        by_hook = logits_of(model)
    edited = load_model(folder, device="cpu")
    for site, units in selection.units.items():
        zero_rows(edited, site, units)
    assert close(by_hook, logits_of(edited), by_hook)
    assert not close(by_hook, logits_of(model), by_hook, 1e-3)


def zero_rows(model, site, units):
    """Set what some neurons write to 0 in the parameters themselves."""
    with torch.no_grad():
        if not site.is_of_experts:
            weight(model, site.out)[units] = 0
            return
        experts = routed_experts(model, site.layer)
        stack = experts.stack("out")
        for unit in units.tolist():
            expert, neuron = divmod(unit, experts.d_expert)
            of_expert = stack[expert] if experts.module.is_transposed else stack[expert].T
            of_expert[neuron] = 0


def test_weights_are_taken_out_exactly(model, folder):
    """The product without one weight of each matrix is that of a model where the weight is 0."""
    units, shapes = {}, {site: shape(model, site) for site in weight_sites(model)}
    generator = torch.Generator().manual_seed(0)
    for site, (n_in, n_out) in shapes.items():
        units[site] = torch.randperm(n_in * n_out, generator=generator)[:40].sort().values
    with ablate(model, Selection(units, shapes)):
        by_hook = logits_of(model)
    edited = load_model(folder, device="cpu")
    for site in shapes:
        set_to_zero(edited, site, units[site])
    assert close(by_hook, logits_of(edited), by_hook)


def set_to_zero(model, site, units):
    """Find a weight in its parameter by marking the matrix, as a reader of the code would."""
    stored, as_matrix = parameter(model, site)
    with torch.no_grad():
        marks = torch.arange(stored.numel(), dtype=torch.float64).reshape(stored.shape)
        places = as_matrix(marks).flatten()[units].long()
        stored.view(-1)[places] = 0


def test_gates_multiply_and_means_and_noise_take_their_place(model, scores, folder):
    shapes = neuron_shapes(model)
    generator = torch.Generator().manual_seed(0)
    gates = Gates({site: 1 + 0.3 * torch.randn(width, generator=generator) for site, (width,) in shapes.items()})
    with gated(model, gates):
        by_gates = logits_of(model)
    edited = load_model(folder, device="cpu")
    for site in shapes:
        multiply_rows(edited, site, gates.multipliers[site])
    assert close(by_gates, logits_of(edited), by_gates, 1e-5)
    neurons = scores.of("neuron")
    for value in (Mean(neurons), Noise(neurons)):
        with ablate(model, chosen(model), value=value):
            once = logits_of(model)
            assert torch.equal(once, logits_of(model))
        assert once.isfinite().all() and not torch.equal(once, logits_of(model))


def multiply_rows(model, site, multipliers):
    with torch.no_grad():
        if not site.is_of_experts:
            weight(model, site.out).mul_(multipliers[:, None])
            return
        experts = routed_experts(model, site.layer)
        stack = experts.stack("out")
        by_expert = multipliers.unflatten(0, (experts.n_experts, -1))
        stack.mul_(by_expert[:, :, None] if experts.module.is_transposed else by_expert[:, None, :])


def test_a_projection_of_experts_is_refused(model):
    with pytest.raises(InputError, match="a projection needs all neurons"):
        directions = {site: torch.ones(n) for site, (n,) in neuron_shapes(model).items()}
        with ablate(model, chosen(model), value=Project(directions)):
            pass


def test_an_ablation_leaves_texts_alone_that_do_not_reach_the_expert(model):
    """A neuron of an expert changes the tokens that are sent there, in its own layer, and no others."""
    _, cache = model.run_with_cache(IDS)
    ids = cache[EACH.ids_hook_name]
    expert = int(ids[0, 0, 0])
    units = torch.arange(expert * D_EXPERT, (expert + 1) * D_EXPERT)
    selection = Selection({EACH: units}, {EACH: neuron_shapes(model)[EACH]})
    with ablate(model, selection):
        _, ablated = model.run_with_cache(IDS)
    name = "blocks.1.mlp.hook_out"
    differs = (cache[name] != ablated[name]).any(-1)
    assert torch.equal(differs, (ids == expert).any(-1))


def test_generation_with_and_without_a_cache_says_the_same_under_an_ablation(model):
    from dean_interp.models.generate import generate

    with ablate(model, chosen(model)):
        with_cache = generate(model, ["Who won?", "Tell me more of it"], max_new_tokens=8)
        for prompt, answer in zip(["Who won?", "Tell me more of it"], with_cache, strict=True):
            assert generate(model, [prompt], max_new_tokens=8)[0] == answer


def test_patching_puts_the_sources_activations_where_the_expert_is(model):
    selection = chosen(model, n=60)
    clean, corrupted = IDS[:1], IDS[1:]
    cache = neuron_cache(model, selection, clean)
    with patch_activations(model, selection, source=cache):
        again = logits_of(model, clean)
    assert torch.equal(again, logits_of(model, clean))
    with patch_activations(model, selection, source=clean):
        patched = logits_of(model, corrupted)
    assert not torch.equal(patched, logits_of(model, corrupted))


# --- routers


def test_a_routers_rows_are_scored_by_its_own_gradient_and_not_ablated_by_hooks(model, behaviour):
    config = ScoringConfig(modules="router", signed=True)
    scored = importance(model, behaviour, unit="weight", config=config)
    sites = [site for site in neuron_sites(model) if site.is_of_experts]
    assert list(scored.values) == [Site(site.layer, "router") for site in sites]
    site = Site(sites[-1].layer, "router")
    assert scored[site].shape == (D_MODEL, N_EXPERTS)
    data = prepare(model, behaviour, config)
    batch = collate(data.rows, device="cpu")
    stored = parameter(model, site)[0]
    stored.requires_grad_(True)
    with answer_positions(model, batch):
        logits = forward(model, batch)[0]
    nats = torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
    sum(nats[batch.answer == i].mean() for i in range(len(behaviour))).backward()
    expected = (stored * stored.grad).detach().T / len(behaviour)
    stored.grad = None
    assert close(scored[site], expected, expected, 1e-4)
    one = Selection({site: torch.tensor([3])}, {site: (D_MODEL, N_EXPERTS)})
    with pytest.raises(InputError, match="weights of a router cannot be ablated by hooks"), ablate(model, one):
        pass


def test_a_dense_model_has_no_router(llama, behaviour):
    with pytest.raises(InputError, match="it has no router"):
        importance(llama, behaviour, unit="weight", config=ScoringConfig(modules="router"))


def test_adapters_are_refused_that_would_not_reach_the_experts(folder, behaviour, tmp_path):
    pytest.importorskip("peft")
    config = FineTuningConfig(method="lora")
    with pytest.raises(InputError, match=r"adapters \(lora\) do not reach the routed experts"):
        fine_tune(folder, [behaviour], config, folder=tmp_path / "tuned")
