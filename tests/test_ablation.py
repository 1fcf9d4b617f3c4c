import pytest
import torch
from conftest import unchecked
from hooked import as_hooked_transformer
from units import IDS, logits_of, some_neurons, some_weights

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Selection,
    Site,
    ablate,
    generate,
    importance,
    load_behaviour,
    load_model,
)
from dean_interp.editing.values import Mean
from dean_interp.models.matrices import weight

pytestmark = pytest.mark.hooks


def with_zeroed_rows(folder, selection):
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        for site, indices in selection.units.items():
            weight(model, Site(site.layer, "out"))[indices] = 0
    return model


def test_hook_ablation_equals_zeroing_the_rows_of_w_out(checkpoints):
    for folder in checkpoints.values():
        model = load_model(folder, device="cpu")
        selection = some_neurons(model)
        plain = logits_of(model)
        with ablate(model, selection):
            ablated = logits_of(model)
        torch.testing.assert_close(ablated, logits_of(with_zeroed_rows(folder, selection)), atol=1e-5, rtol=1e-5)
        assert (ablated - plain).abs().max() > 1e-3


def with_zeroed_weights(folder, selection):
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        for site in selection.units:
            weight(model, site)[selection.mask(site)] = 0
    return model


@pytest.mark.parametrize("n", [1, 30, 700])
def test_weight_ablation_equals_zeroing_the_weights(checkpoints, n):
    for folder in checkpoints.values():
        model = load_model(folder, device="cpu")
        selection = some_weights(model, n=n)
        plain = logits_of(model)
        with ablate(model, selection):
            ablated = logits_of(model)
        torch.testing.assert_close(ablated, logits_of(with_zeroed_weights(folder, selection)), atol=1e-4, rtol=1e-4)
        assert (ablated - plain).abs().max() > 1e-3
        assert torch.equal(logits_of(model), plain)


def test_generation_under_weight_ablation_equals_generation_with_zeroed_weights(checkpoints):
    folder = checkpoints["llama-gqa"]
    model = load_model(folder, device="cpu")
    selection, prompts = some_weights(model, n=300), ["hello", "a longer one than that"]
    plain = generate(model, prompts, max_new_tokens=16)
    with ablate(model, selection):
        ablated = generate(model, prompts, max_new_tokens=16)
    assert ablated == generate(with_zeroed_weights(folder, selection), prompts, max_new_tokens=16)
    assert ablated != plain


def test_nested_weight_ablations_take_no_weight_out_twice(llama):
    plain, one, two = logits_of(llama), some_weights(llama, seed=1, n=400), some_weights(llama, seed=2, n=400)
    assert len(one & two) > 0
    with ablate(llama, one):
        only_one = logits_of(llama)
        with ablate(llama, two):
            both = logits_of(llama)
        assert torch.equal(logits_of(llama), only_one)
    with ablate(llama, one | two):
        torch.testing.assert_close(logits_of(llama), both, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits_of(llama), plain)


def test_ablations_closed_in_another_order_leave_nothing_behind(llama):
    one, two = some_weights(llama, seed=1, n=400), some_weights(llama, seed=2, n=400)
    with ablate(llama, one):
        expected = logits_of(llama)
    first, second = ablate(llama, one), ablate(llama, two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with ablate(llama, one):
        assert torch.equal(logits_of(llama), expected)


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_nothing_is_scored_while_weights_are_silenced_by_hooks(llama, unit):
    privacy = load_behaviour("privacy", n_examples=2)
    with ablate(llama, some_weights(llama)), pytest.raises(InputError, match=r"write the edit into the model \(`apply"):
        importance(llama, privacy, unit=unit)
    with ablate(llama, some_neurons(llama)):
        importance(llama, privacy, unit="neuron")


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_neurons_and_weights_nest_in_either_order(checkpoints, tokenizer, kind):
    """A weight of a silenced neuron has nothing left to take out, whichever ablation was opened first."""
    folder = checkpoints["llama-gqa"]
    model = load_model(folder, device="cpu") if kind == "bridge" else as_hooked_transformer(folder, tokenizer)
    neurons, weights = some_neurons(model, n=20), some_weights(model, n=400)
    with ablate(model, neurons), ablate(model, weights):
        inner = logits_of(model)
    with ablate(model, weights), ablate(model, neurons):
        outer = logits_of(model)
    torch.testing.assert_close(inner, outer, atol=1e-4, rtol=1e-4)
    zeroed = with_zeroed_weights(folder, weights)
    with ablate(zeroed, neurons):
        torch.testing.assert_close(outer, logits_of(zeroed), atol=2e-4, rtol=1e-3)


def test_weights_have_no_means_to_put_in_place(llama):
    scores = importance(llama, Behaviour("b", (Example("hello", {"response": "world"}),)))
    with (
        pytest.raises(InputError, match="weights have no activation"),
        ablate(llama, some_weights(llama), value=Mean(scores)),
    ):
        pass


def test_generation_under_ablation_equals_generation_with_zeroed_rows(checkpoints):
    folder = checkpoints["llama-gqa"]
    model = load_model(folder, device="cpu")
    selection = some_neurons(model, n=20)
    plain = generate(model, ["hello"], max_new_tokens=16)
    with ablate(model, selection):
        ablated = generate(model, ["hello"], max_new_tokens=16)
    assert ablated == generate(with_zeroed_rows(folder, selection), ["hello"], max_new_tokens=16)
    assert ablated != plain
    assert generate(model, ["hello"], max_new_tokens=16) == plain


def test_the_model_is_restored_after_an_exception(llama):
    plain = logits_of(llama)
    with pytest.raises(KeyError), ablate(llama, some_neurons(llama)):
        raise KeyError
    assert torch.equal(logits_of(llama), plain)


def test_ablations_nest_and_undo_one_by_one(llama):
    plain, one, two = logits_of(llama), some_neurons(llama, seed=1), some_neurons(llama, seed=2)
    with ablate(llama, one):
        only_one = logits_of(llama)
        with ablate(llama, two):
            both = logits_of(llama)
        torch.testing.assert_close(logits_of(llama), only_one)
    with ablate(llama, one | two):
        torch.testing.assert_close(logits_of(llama), both)
    assert torch.equal(logits_of(llama), plain)


def test_mean_ablation_puts_the_stored_means_in_place_whatever_the_batch(llama):
    behaviour = Behaviour("b", (Example("hello", {"response": "world"}), Example("one", {"response": "two three"})))
    scores, selection = importance(llama, behaviour), some_neurons(llama)
    seen = []
    with (
        ablate(llama, selection, value=Mean(scores)),
        llama.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda a, hook: seen.append(a) or None)]),
    ):
        logits_of(llama)
    site = Site(1, "neurons")
    chosen = selection.units[site]
    expected = scores.activation_mean[site][chosen].expand(*IDS.shape, -1)
    torch.testing.assert_close(seen[0][..., chosen], expected)
    assert (seen[0][..., ~selection.mask(site)].std(0) > 0).any()


def test_weights_are_never_touched(llama):
    before = [parameter.clone() for parameter in llama.parameters()]
    with ablate(llama, some_neurons(llama)):
        logits_of(llama)
        assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), before, strict=True))


def test_an_empty_selection_and_one_of_another_model_are_refused(llama):
    full = some_neurons(llama)
    with pytest.raises(InputError, match="the selection is empty"), ablate(llama, full - full):
        pass
    said = r"the selection must be a Selection, such as couple\(...\).coupled or load_selection\(file\); got 'coupled'"
    with unchecked(), pytest.raises(InputError, match=said), ablate(llama, "coupled"):
        pass
    other = Selection({Site(0, "neurons"): torch.tensor([1])}, {Site(0, "neurons"): (99,)})
    with pytest.raises(InputError, match=r"not of this model: .* 3 layers of 40 neurons"), ablate(llama, other):
        pass


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_a_hooked_transformer_of_the_same_weights_is_ablated_alike(checkpoints, tokenizer, name, choose):
    hooked, bridge = as_hooked_transformer(checkpoints[name], tokenizer), load_model(checkpoints[name], device="cpu")
    selection = choose(bridge)
    with ablate(hooked, selection), ablate(bridge, selection):
        torch.testing.assert_close(logits_of(hooked), logits_of(bridge), atol=2e-4, rtol=1e-3)
