"""Gates: multipliers of neurons, their algebra, and that hooks apply them as scaled weights would."""

import pytest
import torch

from dean_interp import InputError, Selection, Site, ablate, generate, load_model
from dean_interp.editing.ablation import gated
from dean_interp.models.matrices import neuron_sites, weight
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.selection.gates import Gates, gates_of, load_gates

pytestmark = pytest.mark.hooks


def some_gates(model, *, seed=0, share=1.0):
    generator = torch.Generator().manual_seed(seed)
    multipliers = {}
    for site in neuron_sites(model):
        change = 0.5 * torch.randn(model.cfg.d_mlp, generator=generator)
        multipliers[site] = 1 + change * (torch.rand(model.cfg.d_mlp, generator=generator) < share)
    return Gates(multipliers)


def logits_of(model, text="hello there"):
    tokens = torch.tensor([native_tokenizer(model)(text).input_ids])
    with torch.inference_mode():
        return model(tokens, return_type="logits")


def with_scaled_rows(folder, gates):
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        for site, multiplier in gates.multipliers.items():
            weight(model, Site(site.layer, "out")).mul_(multiplier[:, None])
    return model


def test_gates_by_hooks_are_scaled_rows_of_out(checkpoints):
    for name, folder in checkpoints.items():
        model = load_model(folder, device="cpu")
        for share in (1.0, 0.2):
            gates = some_gates(model, share=share)
            with gated(model, gates):
                by_hooks = logits_of(model)
            torch.testing.assert_close(by_hooks, logits_of(with_scaled_rows(folder, gates)), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(by_hooks, logits_of(model), atol=1e-2), name


def test_generation_with_a_cache_is_that_of_scaled_rows(checkpoints):
    model = load_model(checkpoints["llama-gqa"], device="cpu")
    gates = some_gates(model)
    plain = generate(model, ["hello"], max_new_tokens=16)
    with gated(model, gates):
        edited = generate(model, ["hello"], max_new_tokens=16)
    assert edited == generate(with_scaled_rows(checkpoints["llama-gqa"], gates), ["hello"], max_new_tokens=16) != plain
    assert generate(model, ["hello"], max_new_tokens=16) == plain


def test_nested_gates_multiply_and_the_model_is_restored_after_an_exception(llama):
    first, second = some_gates(llama, seed=1), some_gates(llama, seed=2, share=0.3)
    plain = logits_of(llama)
    product = Gates({site: first.multipliers[site] * second.multipliers[site] for site in first.multipliers})
    with gated(llama, product):
        at_once = logits_of(llama)
    with gated(llama, first), gated(llama, second):
        torch.testing.assert_close(logits_of(llama), at_once, atol=1e-5, rtol=1e-4)
    with pytest.raises(KeyError), gated(llama, first):
        raise KeyError
    assert torch.equal(logits_of(llama), plain)


def test_a_users_hook_and_run_with_cache_see_the_gated_activation(llama):
    gates, name = some_gates(llama), "blocks.1.mlp.hook_post"
    tokens = torch.tensor([native_tokenizer(llama)("hello").input_ids])
    seen = []
    with torch.inference_mode():
        _, plain = llama.run_with_cache(tokens)
        with gated(llama, gates), llama.hooks(fwd_hooks=[(name, lambda activation, hook: seen.append(activation))]):
            llama(tokens)
        with gated(llama, gates):
            _, cache = llama.run_with_cache(tokens)
    first = "blocks.0.mlp.hook_post"
    expected = plain[first] * gates.multipliers[Site(0, "neurons")]
    torch.testing.assert_close(cache[first], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cache[name], seen[0])


def test_a_silenced_selection_is_the_special_case(llama):
    units = {site: torch.tensor([3, 7]) for site in neuron_sites(llama)}
    selection = Selection(units, {site: (llama.cfg.d_mlp,) for site in units})
    with ablate(llama, selection):
        silenced = logits_of(llama)
    with gated(llama, gates_of(selection)):
        torch.testing.assert_close(logits_of(llama), silenced, atol=1e-6, rtol=1e-5)
    assert gates_of(selection).selection.fingerprint == selection.fingerprint


def test_the_algebra_is_that_of_changes():
    site, other = Site(0, "neurons"), Site(1, "neurons")
    first = Gates({site: torch.tensor([1.5, 1.0, 0.0]), other: torch.tensor([1.0, 0.8, 1.0])})
    second = Gates({site: torch.tensor([1.25, 1.0, 1.0]), other: torch.tensor([1.0, 1.0, 2.0])})
    assert len(first) == 3 and len(first * 0) == 0 and first.largest_change == 1.0
    torch.testing.assert_close((first * 0.5).multipliers[site], torch.tensor([1.25, 1.0, 0.5]))
    torch.testing.assert_close((-first).multipliers[site], torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close((first + second).multipliers[site], torch.tensor([1.75, 1.0, 0.0]))
    assert len(first - first) == 0
    assert first.strongest(1).selection.units[site].tolist() == [2] and len(first.strongest(1)) == 1
    assert len(first.strongest(2)) == 2 and (first * 3).clipped(0, 2).largest_change == 1.0
    table = first.to_pandas()
    assert table["layer"].tolist() == [0, 0, 1] and table["index"].tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="of one model"):
        first + Gates({site: torch.ones(3)})


def test_gates_come_back_from_their_file_and_other_files_are_refused(llama, tmp_path):
    gates = some_gates(llama)
    path = tmp_path / "gates.safetensors"
    gates.save(path)
    assert load_gates(path).fingerprint == gates.fingerprint
    (gates * 1).selection.save(tmp_path / "selection.safetensors")
    with pytest.raises(InputError, match=r"selection.*load_selection"):
        load_gates(tmp_path / "selection.safetensors")
    with pytest.raises(InputError, match="not finite"):
        Gates({Site(0, "neurons"): torch.tensor([float("nan")])})


def test_gates_that_change_nothing_are_refused(llama):
    none = some_gates(llama) * 0
    with pytest.raises(InputError, match="nothing to ablate"), gated(llama, none):
        pass
