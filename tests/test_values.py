"""Ablation values, positions, and activation patching."""

import dataclasses

import pytest
import torch
from hooked import as_hooked_transformer
from transformers import AutoConfig, AutoModelForCausalLM
from units import IDS, logits_of, some_neurons, some_weights

from dean_interp import Behaviour, Example, InputError, Site, ablate, generate, importance, load_model
from dean_interp.editing.apply import create_edit
from dean_interp.editing.patching import neuron_cache, patch_activations, patching
from dean_interp.editing.value_names import value_fingerprint
from dean_interp.editing.values import (
    Given,
    Mean,
    Multiply,
    Noise,
    Project,
    Resample,
    Restore,
    Scale,
    Zero,
    activation_bank,
)
from dean_interp.models.loss import forward
from dean_interp.models.matrices import neuron_sites, weight, weight_sites
from dean_interp.models.tokens import collate, encode, paths, trees
from dean_interp.selection.gates import Gates

pytestmark = pytest.mark.hooks

TEXTS = Behaviour("texts", (Example("hello", {"response": "world"}), Example("one", {"response": "two three"})))
SITE = Site(1, "neurons")


def activations(model, run, site=SITE):
    """What the site's neurons are, after every hook before."""
    seen = []
    with model.hooks(fwd_hooks=[(site.hook_name, lambda a, hook: seen.append(a.detach().clone()) or None)]):
        run()
    return seen


@pytest.fixture
def scores(llama):
    return importance(llama, TEXTS)


# Values


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_scaling_by_hooks_equals_scaling_the_weights(checkpoints, choose, alpha):
    folder = checkpoints["llama-gqa"]
    model, scaled = load_model(folder, device="cpu"), load_model(folder, device="cpu")
    selection = choose(model)
    with torch.no_grad():
        for site, units in selection.units.items():
            if site.unit == "neuron":
                weight(scaled, Site(site.layer, "out"))[units] *= alpha
            else:
                weight(scaled, site)[selection.mask(site)] *= alpha
    with ablate(model, selection, value=Scale(alpha)):
        torch.testing.assert_close(logits_of(model), logits_of(scaled), atol=1e-4, rtol=1e-4)


def test_zero_is_scale_zero(llama):
    with ablate(llama, some_neurons(llama), value=Scale(0.0)):
        scaled = logits_of(llama)
    with ablate(llama, some_neurons(llama), value=Zero()):
        assert torch.equal(logits_of(llama), scaled)


@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_restoring_everything_gives_the_other_checkpoints_mlp(checkpoints, choose):
    folder = checkpoints["llama-gqa"]
    base, tuned = load_model(folder, device="cpu"), load_model(folder, device="cpu")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in weight_sites(tuned):
            weight(tuned, site).add_(0.05 * torch.randn(weight(tuned, site).shape, generator=generator))
    changed = logits_of(tuned)
    every = choose(tuned, n=tuned.cfg.d_mlp if choose is some_neurons else 10**9)
    with ablate(tuned, every, value=Restore(base)):
        torch.testing.assert_close(logits_of(tuned), logits_of(base), atol=1e-4, rtol=1e-4)
    some = choose(tuned)
    with ablate(tuned, some, value=Restore(base)):
        part = logits_of(tuned)
    assert (part - changed).abs().max() > 1e-4 and (part - logits_of(base)).abs().max() > 1e-4


def test_weights_are_restored_only_from_a_model_of_the_same_layers_and_biases(checkpoints, tokenizer):
    config = AutoConfig.from_pretrained(checkpoints["llama-gqa"], mlp_bias=True)
    model = load_model(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)
    for change in ({"num_hidden_layers": 1}, {"intermediate_size": 8}):
        other_config = AutoConfig.from_pretrained(checkpoints["llama-gqa"], mlp_bias=True, **change)
        other = load_model(AutoModelForCausalLM.from_config(other_config), tokenizer=tokenizer)
        with pytest.raises(InputError, match="has other layers than"):
            create_edit(model, some_neurons(model), value=Restore(other))
    with (
        pytest.raises(InputError, match="has other layers than"),
        ablate(model, some_weights(model), value=Restore(load_model(checkpoints["gpt2"], device="cpu"))),
    ):
        pass
    without_biases = load_model(checkpoints["llama-gqa"], device="cpu")
    with pytest.raises(InputError, match=r"the biases of the neurons of L0\.gate differ"):
        create_edit(model, some_neurons(model), value=Restore(without_biases))


def test_projecting_leaves_nothing_along_the_direction_and_the_rest_as_it_was(llama):
    direction = {site: torch.randn(llama.cfg.d_mlp, generator=torch.Generator().manual_seed(1))
                 for site in neuron_sites(llama)}  # fmt: skip
    every = some_neurons(llama, n=llama.cfg.d_mlp)
    first = Site(0, "neurons")
    plain = activations(llama, lambda: logits_of(llama), first)[0]
    with ablate(llama, every, value=Project(direction)):
        seen = activations(llama, lambda: logits_of(llama), first)[0]
    unit = direction[first] / direction[first].norm()
    assert (seen @ unit).abs().max() < 1e-5
    across = torch.linalg.svd(unit[None])[2][1:]
    torch.testing.assert_close(seen @ across.T, plain @ across.T, atol=1e-5, rtol=1e-5)


def test_noise_and_resampling_belong_to_a_place_in_a_text_and_not_to_the_batch(llama, scores):
    bank = activation_bank(llama, TEXTS, n_rows=7)
    assert {len(rows) for rows in bank.values()} == {7}
    selection = some_neurons(llama)
    encoded = [encode(llama.tokenizer, prompt, [answer], template="raw")
               for prompt, answer in (("hello there", "well"), ("a", "b c d"))]  # fmt: skip
    for value in (Noise(scores), Resample(bank), Mean(scores)):
        with ablate(llama, selection, value=value), torch.inference_mode():
            together = collate(paths(encoded), device="cpu")
            left = collate(paths(encoded), device="cpu", padding="left")
            rows = [forward(llama, batch)[batch.read_row, batch.read_pos] for batch in (together, left)]
            alone = [forward(llama, batch)[batch.read_row, batch.read_pos]
                     for batch in (collate([row], device="cpu") for row in paths(encoded))]  # fmt: skip
            tree = collate(trees(encoded), device="cpu")
            shared = forward(llama, tree)[tree.read_row, tree.read_pos][tree.answer.argsort(stable=True)]
        for other in (rows[1], torch.cat(alone), shared):
            torch.testing.assert_close(rows[0], other, atol=1e-4, rtol=1e-4)


def test_noise_has_the_size_that_was_asked_for_and_a_seed(llama, scores):
    every, first = some_neurons(llama, n=llama.cfg.d_mlp), Site(0, "neurons")
    ids = torch.randint(5, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    plain = activations(llama, lambda: logits_of(llama, ids), first)[0]
    drawn = []
    for seed in (0, 0, 1):
        with ablate(llama, every, value=Noise(scores, scale=2.0, seed=seed)):
            drawn.append(activations(llama, lambda: logits_of(llama, ids), first)[0] - plain)
    ratio = drawn[0].std(1)[0] / scores.activation_norm[first]
    assert ratio.mean() == pytest.approx(2.0, rel=0.05)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_resampled_neurons_are_rows_of_the_bank(llama):
    bank = activation_bank(llama, TEXTS, n_rows=5)
    every = some_neurons(llama, n=llama.cfg.d_mlp)
    with ablate(llama, every, value=Resample(bank)):
        seen = activations(llama, lambda: logits_of(llama))[0]
    for row in seen[0]:
        assert (bank[SITE] - row).abs().sum(1).min() < 1e-5
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("make", [Mean, Noise, lambda scores: Resample({})])
def test_values_of_activations_are_not_for_weights(llama, scores, make):
    with (
        pytest.raises(InputError, match="weights have no activation"),
        ablate(llama, some_weights(llama), value=make(scores)),
    ):
        pass


def test_a_value_that_lacks_a_site_says_so(llama):
    lacking = Project({SITE: torch.ones(llama.cfg.d_mlp)})
    with (
        pytest.raises(InputError, match=r"hold nothing for L0\.neurons"),
        ablate(llama, some_neurons(llama), value=lacking),
    ):
        pass


def test_nested_values_the_inner_one_counts(llama):
    neurons, weights = some_neurons(llama), some_weights(llama)
    for selection in (neurons, weights):
        with ablate(llama, selection, value=Scale(0.5)):
            half = logits_of(llama)
            with ablate(llama, selection, value=Zero()):
                none = logits_of(llama)
            torch.testing.assert_close(logits_of(llama), half)
        with ablate(llama, selection):
            torch.testing.assert_close(logits_of(llama), none, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_an_ablation_that_changes_nothing_warns(llama, choose):
    selection = choose(llama)
    with pytest.warns(UserWarning, match="changed nothing"), ablate(llama, selection, value=Scale(1.0)):
        logits_of(llama)
    with pytest.warns(UserWarning, match="changed nothing"), ablate(llama, selection), ablate(llama, selection):
        logits_of(llama)


# Where


def test_prompt_and_response_positions_of_a_scored_batch(llama):
    encoded = [encode(llama.tokenizer, "hello there", ["well"], template="raw"),
               encode(llama.tokenizer, "a", ["b c d"], template="raw")]  # fmt: skip
    batch = collate(paths(encoded), device="cpu")
    every = some_neurons(llama, n=llama.cfg.d_mlp)
    for positions, masked in (("prompt", ~batch.is_answer), ("response", batch.is_answer), ("all", batch.real | True)):
        with ablate(llama, every, positions=positions), torch.inference_mode():
            seen = activations(llama, lambda: forward(llama, batch))[0]
        assert torch.equal((seen == 0).all(-1), masked)
    assert batch.is_answer.sum() == sum(len(one.answers[0]) for one in encoded)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_generation_ablated_in_the_prompt_or_in_the_answer_only(checkpoints, tokenizer, kind):
    folder = checkpoints["llama-gqa"]
    model = load_model(folder, device="cpu") if kind == "bridge" else as_hooked_transformer(folder, tokenizer)
    every = some_neurons(model, n=model.cfg.d_mlp)
    generate(model, ["hello"], max_new_tokens=1, template="raw")  # the cache is checked once, in passes of its own
    for positions in ("prompt", "response"):
        with ablate(model, every, positions=positions):
            seen = activations(model, lambda: generate(model, ["hello there"], max_new_tokens=4, template="raw"))
        assert len(seen) == 4
        silent = [bool((one == 0).all()) for one in seen]
        assert silent == [positions == "prompt", *[positions == "response"] * 3]


@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_prompt_and_response_together_are_all(llama, choose):
    batch = collate(paths([encode(llama.tokenizer, "hello", ["b c d"], template="raw")]), device="cpu")
    selection = choose(llama)
    with torch.inference_mode():
        with ablate(llama, selection):
            everywhere = forward(llama, batch)
        with ablate(llama, selection, positions="prompt"):
            prompt = forward(llama, batch)
    if choose is some_neurons:
        with ablate(llama, selection, positions="prompt"), ablate(llama, selection, positions="response"):
            torch.testing.assert_close(forward(llama, batch), everywhere, atol=1e-5, rtol=1e-5)
    n_prompt = int((~batch.is_answer).sum())
    torch.testing.assert_close(prompt[:, :n_prompt], everywhere[:, :n_prompt], atol=1e-5, rtol=1e-5)
    assert (prompt[:, n_prompt:] - everywhere[:, n_prompt:]).abs().max() > 1e-4


def test_positions_need_a_pass_that_knows_them(llama, untyped):
    with (
        ablate(llama, some_neurons(llama), positions="response"),
        pytest.raises(InputError, match="where answers begin"),
    ):
        logits_of(llama)
    with (
        pytest.raises(InputError, match="positions must be one of"),
        ablate(llama, some_neurons(llama), positions="end"),
    ):
        pass


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_hook_is_left_behind_whatever_happens(llama, scores):
    before, bank = n_hooks(llama), activation_bank(llama, TEXTS, n_rows=3)
    for value in (Zero(), Mean(scores), Noise(scores), Resample(bank), Scale(0.3)):
        with ablate(llama, some_neurons(llama), value=value):
            generate(llama, ["hello"], max_new_tokens=3)
            importance(llama, TEXTS, unit=("neuron", "weight"))
        with pytest.raises(KeyError), ablate(llama, some_neurons(llama)), ablate(llama, some_weights(llama)):
            raise KeyError
        assert n_hooks(llama) == before


def test_run_with_cache_sees_the_ablated_activations(llama):
    selection = some_neurons(llama)
    with ablate(llama, selection):
        logits, cache = llama.run_with_cache(IDS, return_type="logits")
        torch.testing.assert_close(logits, logits_of(llama))
    assert (cache[SITE.hook_name][..., selection.units[SITE]] == 0).all()


# Activation patching


OTHER = torch.tensor([[2, 71, 80, 90, 99, 3, 60, 61, 62], [2, 9, 8, 17, 6, 5, 4, 3, 33]])


def test_an_identity_patch_changes_nothing(llama):
    plain, selection = logits_of(llama), some_neurons(llama)
    for source in (IDS, neuron_cache(llama, selection, IDS), llama.run_with_cache(IDS)[1]):
        with patch_activations(llama, selection, source=source):
            assert torch.equal(logits_of(llama), plain)
    assert torch.equal(logits_of(llama), plain)


def test_no_positions_and_no_rows_are_refused(llama, untyped):
    for nowhere in ([], torch.arange(0)):
        with (
            pytest.raises(InputError, match="positions are empty"),
            patch_activations(llama, some_neurons(llama), source=IDS, positions=nowhere),
        ):
            pass
    for n_rows in (0, -1):
        with pytest.raises(InputError, match=f"n_rows must be at least 1, got {n_rows}"):
            activation_bank(llama, TEXTS, n_rows=n_rows)


def test_patched_neurons_are_those_of_the_source_and_no_others(llama):
    selection = some_neurons(llama)
    theirs = neuron_cache(llama, selection, OTHER)
    first = Site(0, "neurons")
    mine = activations(llama, lambda: logits_of(llama), first)[0]
    with patch_activations(llama, selection, source=OTHER, positions=[1, -1]):
        seen = activations(llama, lambda: logits_of(llama), first)[0]
    expected = mine.clone()
    units = selection.units[first]
    for place in (1, 8):
        expected[:, place, units] = theirs[first.hook_name][:, place, units]
    assert torch.equal(seen, expected)


def test_patching_every_neuron_at_all_places_brings_what_the_mlps_carry(llama):
    every = some_neurons(llama, n=llama.cfg.d_mlp)

    def metric(logits):
        return logits[:, -1, 5].sum() - logits[:, -1, 6].sum()

    found = patching(llama, every, clean=IDS, corrupted=OTHER, metric=metric)
    assert found.clean == pytest.approx(float(metric(logits_of(llama))))
    none = patching(llama, some_neurons(llama, n=1), clean=IDS, corrupted=OTHER, metric=metric, positions=[0])
    assert none.sufficient == pytest.approx(0, abs=1e-3) and none.necessary == pytest.approx(0, abs=1e-3)
    assert abs(found.sufficient) > 1e-2
    with pytest.raises(InputError, match="there is no difference to patch"):
        patching(llama, every, clean=IDS, corrupted=IDS, metric=metric)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"source": {}}, "the source has no blocks.0.mlp.hook_post"), ({"source": IDS[:, :4]}, "patch runs of one shape"),
     ({"source": IDS[:1]}, "patch runs of one shape"), ({"source": IDS, "positions": [9]}, "9 is not in the run"),
     ({"source": IDS, "positions": [1], "source_positions": [1, 2]}, "one position for each of positions")],
)  # fmt: skip
def test_a_source_that_does_not_fit_is_refused(llama, options, message):
    with pytest.raises(InputError, match=message), patch_activations(llama, some_neurons(llama), **options):
        logits_of(llama)


def test_weights_cannot_be_patched(llama):
    with (
        pytest.raises(InputError, match="no activation to patch"),
        patch_activations(llama, some_weights(llama), source=IDS),
    ):
        pass


def test_values_that_differ_have_other_fingerprints_and_equal_ones_the_same(llama, checkpoints, scores):
    other_model = load_model(checkpoints["llama"], device="cpu")

    def values() -> list[object]:
        made = [Zero(), Scale(0.5), Scale(0.25), Mean(scores), Mean(dataclasses.replace(scores, fingerprint="other"))]
        made += [Noise(scores), Noise(scores, scale=2.0), Noise(scores, seed=1), Restore(llama), Restore(other_model)]
        for numbers in (torch.ones(4), torch.arange(4.0)):
            made += [Resample({SITE: numbers.expand(2, 4)}), Project({SITE: numbers}), Given({SITE: numbers})]
            made.append(Multiply(Gates({SITE: numbers})))
        return [*made, Given({Site(0, "neurons"): torch.ones(4)}), Resample({SITE: torch.ones(2, 4)}, seed=1)]

    named = list(map(value_fingerprint, values()))
    assert len(set(named)) == len(named)
    assert named == list(map(value_fingerprint, values()))
