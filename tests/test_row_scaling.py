"""Gates in a checkpoint: rows multiplied and rounded, at most one bit a number, and the same bytes back."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hooked import as_hooked_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from units import IDS, logits_of, some_neurons

from dean_interp import InputError, Site, ablate, load_model
from dean_interp.cli.main import main
from dean_interp.editing import tensor_change
from dean_interp.editing.ablation import gated
from dean_interp.editing.apply import apply_edit, create_edit, create_gates_edit, edit_state, revert_edit
from dean_interp.editing.checkpoint import apply_edit_to_checkpoint, checkpoint_state, export, revert_edit_in_checkpoint
from dean_interp.editing.edit import compare, load_edit, stack
from dean_interp.editing.edit_file import written_tensors
from dean_interp.editing.rounded_products import chosen, is_next, same_bits, scaled, sources
from dean_interp.editing.row_scaling import RowScaling
from dean_interp.editing.scaling_rows import row_scaling
from dean_interp.editing.values import Multiply
from dean_interp.models.matrices import neuron_sites, weight
from dean_interp.selection.gates import Gates, gates_of, load_gates

FORMATS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
HOSTILE = (0.0, -0.0, 1 + 1e-6, 1 - 1e-6, 0.5, 2.0, 1e-8, 1.9999999, -1.0, -0.7, 0.3, 1e-3, 7.0)
OUT = Site(0, "out")
thorough = settings(max_examples=200)


@pytest.fixture
def folder(checkpoints):
    return checkpoints["llama-gqa"]


def some_gates(model, *, seed=0, share=1.0, size=0.5):
    """Gates of every layer, of which a share differ from 1."""
    generator = torch.Generator().manual_seed(seed)
    multipliers = {}
    for site in neuron_sites(model):
        change = size * torch.randn(model.cfg.d_mlp, generator=generator)
        multipliers[site] = 1 + change * (torch.rand(model.cfg.d_mlp, generator=generator) < share)
    return Gates(multipliers, frozenset({"a prompt"}))


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def parameters_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def are_same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def numbers(dtype, n_rows, n_columns, *, seed=0, size=0.02):
    """Weights as models have them, with zeros of both signs, subnormal and large numbers among them."""
    tensor = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed)) * size
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor([0.0, -0.0, tiny, -tiny / 2, tiny / 8, 1.0, -2.0, 1000.0])
    tensor[:, : len(special)] = special
    return tensor.to(dtype)


def scaling_of(stored, multipliers, *, rows=None, is_transposed=False):
    rows = torch.arange(len(multipliers)) if rows is None else rows
    return row_scaling(stored, OUT, rows, torch.as_tensor(multipliers), is_transposed=is_transposed)


def is_same_change(first, second):
    pairs = zip(written_tensors(first).values(), written_tensors(second).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and (first.base, first.dtype) == (second.base, second.dtype)


# The arithmetic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_every_half_precision_number_a_normal_product_has_at_most_two_sources(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([2 * torch.rand(150, generator=generator), 1 + 0.01 * torch.randn(50, generator=generator)])
    for multipliers in torch.cat([drawn, -drawn[:20], torch.tensor(HOSTILE)]).split(50):
        old = every.expand(len(multipliers), -1).contiguous()
        new = scaled(old, multipliers)
        found = sources(new, multipliers)
        is_back = same_bits(chosen(found, is_next(old, found), dtype), old)
        is_normal = new.isfinite() & (new.float().abs() >= torch.finfo(dtype).tiny)
        assert is_normal.any() and is_back[is_normal].all()


@thorough
@given(st.data())
def test_a_normal_product_is_undone_to_the_bit_whatever_was_multiplied(data):
    dtype = data.draw(st.sampled_from(list(FORMATS)))
    n_bits = torch.finfo(dtype).bits
    bits = data.draw(st.lists(st.integers(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1), min_size=1, max_size=30))
    multiplier = data.draw(st.one_of(st.floats(-4, 4, width=32), st.floats(0.999, 1.001)))
    old, multipliers = torch.tensor([bits], dtype=FORMATS[dtype]).view(dtype), torch.tensor([multiplier])
    new = scaled(old, multipliers)
    found = sources(new, multipliers)
    is_back = same_bits(chosen(found, is_next(old, found), dtype), old)
    is_normal = new.isfinite() & (new.float().abs() >= torch.finfo(dtype).tiny)
    assert is_back[is_normal].all()


def test_at_the_borders_of_binades_float32_products_are_undone_too():
    powers = (2.0 ** torch.arange(-20, 20)).view(torch.int32)
    old = (powers[:, None] + torch.arange(-40, 40, dtype=torch.int32)).flatten().view(torch.float32)
    factors = torch.tensor([1.0, 2.0, 0.5, 1.5]).view(torch.int32)
    steps = (factors[:, None] + torch.arange(-100, 100, dtype=torch.int32)).flatten()
    multipliers = steps.view(torch.float32)
    old = old.expand(len(multipliers), -1).contiguous()
    found = sources(scaled(old, multipliers), multipliers)
    assert same_bits(chosen(found, is_next(old, found), torch.float32), old).all()


# One tensor


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_hostile_multipliers_give_the_same_bytes_back(dtype, is_transposed, monkeypatch):
    drawn = 2 * torch.rand(30, generator=torch.Generator().manual_seed(1))
    multipliers = torch.cat([torch.tensor(HOSTILE), drawn])
    out = numbers(dtype, 50, 37)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(2))[: len(multipliers)].sort().values
    stored = out.t().contiguous() if is_transposed else out
    before = stored.clone()
    scaling = scaling_of(stored, multipliers, rows=rows, is_transposed=is_transposed)
    assert scaling.dtype == dtype and scaling.state(stored) == "base" and same_bits(stored, before).all()
    scaling.write(stored)
    expected = (before.t() if is_transposed else before).clone()
    expected[rows] = (expected[rows].float() * multipliers[:, None]).to(dtype)
    assert same_bits(stored, expected.t() if is_transposed else expected).all()
    assert scaling.state(stored) == "edited"
    # In small pieces it is the same.
    monkeypatch.setattr(tensor_change, "_N_AT_ONCE", 150)
    again = scaling_of(before, multipliers, rows=rows, is_transposed=is_transposed)
    assert is_same_change(again, scaling) and scaling.state(stored) == "edited" and scaling.state(before) == "base"
    scaling.undo(stored)
    assert same_bits(stored, before).all()


@thorough
@given(
    dtype=st.sampled_from(list(FORMATS)),
    multipliers=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-42, 1e-39, 1e-7, 1e-4, 1.0, 1000.0]),
    is_transposed=st.booleans(),
)
def test_any_rows_come_back_to_the_bit(dtype, multipliers, seed, size, is_transposed):
    stored = numbers(dtype, 4, 24, seed=seed, size=size)
    stored = stored.t().contiguous() if is_transposed else stored
    before = stored.clone()
    scaling = scaling_of(stored, multipliers, is_transposed=is_transposed)
    scaling.write(stored)
    assert scaling.state(stored) in ("edited", "both")
    scaling.undo(stored)
    assert same_bits(stored, before).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("spread, most", [(0.05, 0.02), (0.3, 0.05)])
def test_a_dense_scaling_takes_far_less_than_a_bit_a_number(dtype, spread, most):
    generator = torch.Generator().manual_seed(0)
    out = (torch.randn(1000, 768, generator=generator) * 0.02).to(dtype)
    scaling = scaling_of(out, 1 + spread * torch.randn(1000, generator=generator), is_transposed=False)
    n_bytes = sum(tensor.nbytes for tensor in written_tensors(scaling).values())
    # 12 bytes a neuron are its index, its multiplier, and how many bits it has.
    assert scaling.bits.nbytes + scaling.kept_at.nbytes + scaling.kept.nbytes < most * len(scaling) < len(scaling) / 8
    assert n_bytes < (most + 12.5 / 768) * len(scaling)


@pytest.mark.parametrize("dtype", FORMATS)
def test_at_worst_a_normal_number_takes_one_bit(dtype):
    old = (1 + torch.rand(64, 768, generator=torch.Generator().manual_seed(0))).to(dtype)
    for multiplier in (0.51, 0.75, 0.99, 1.01, 1.99):
        scaling = scaling_of(old, torch.full((64,), multiplier))
        assert scaling.bits.nbytes <= 1.05 / 8 * len(scaling) and not len(scaling.kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaling_made_in_float32_is_that_of_the_half_precision_checkpoint(dtype):
    half = numbers(dtype, 20, 100)
    multipliers = 2 * torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole = half.float()
    scaling = scaling_of(whole, multipliers)
    assert is_same_change(scaling, scaling_of(half, multipliers))
    for tensor in (half, whole):
        before = tensor.clone()
        scaling.write(tensor)
        assert scaling.state(tensor) == "edited" and torch.equal(whole.to(dtype), half) == (tensor is whole)
        scaling.undo(tensor)
        assert same_bits(tensor, before).all()
        scaling.write(tensor)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert scaling.state(half.to(other)) == "other"


def test_what_was_changed_since_is_neither_base_nor_edited():
    stored = numbers(torch.float32, 20, 30)
    scaling = scaling_of(stored, torch.full((10,), 1.5), rows=torch.arange(0, 20, 2))
    for state in ("base", "edited"):
        assert scaling.state(stored) == state
        for place in ((4, 9), (5, 9)):
            damaged = stored.clone()
            damaged[place] += 1e-3
            assert scaling.state(damaged) == "other"
        sign = stored.clone()
        sign[2, 0] = -0.0
        assert scaling.state(sign) == "other" and scaling.state(stored.t()) == "other"
        scaling.write(stored)
    assert scaling.state(stored) == "other", "it was written twice"


def test_multipliers_that_change_nothing_leave_a_tensor_both():
    stored = numbers(torch.bfloat16, 4, 30)
    assert scaling_of(stored, torch.full((4,), 1 + 1e-6)).state(stored) == "both"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_product_that_is_too_large_for_the_format_is_refused(dtype):
    stored = torch.full((3, 8), torch.finfo(dtype).max / 2).to(dtype)
    scaling_of(stored, [1.0, 1.5, 1.9])
    with pytest.raises(InputError, match=r"3 times the row of neuron 7 at L0.out is not finite"):
        scaling_of(stored.repeat(3, 1), [1.0, 3.0], rows=torch.tensor([2, 7]))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_two_scalings_stacked_are_the_scaling_made_at_once(is_transposed):
    multipliers = torch.tensor([*HOSTILE, *HOSTILE])
    out = numbers(torch.float16, len(multipliers), 37)
    stored = out.t().contiguous() if is_transposed else out
    rows = torch.randperm(len(multipliers), generator=torch.Generator().manual_seed(0))
    parts = [part.sort().values for part in rows.split(11)]
    first, second, third = (
        scaling_of(stored, multipliers[part], rows=part, is_transposed=is_transposed) for part in parts
    )
    at_once = scaling_of(stored, multipliers, is_transposed=is_transposed)
    assert len(at_once.kept) and len(at_once.silenced) == 4
    assert is_same_change(first.stacked(second, "a").stacked(third, "a"), at_once)
    assert is_same_change(third.stacked(first.stacked(second, "a"), "a"), at_once)
    with pytest.raises(InputError, match="both edits multiply 11 rows of a"):
        first.stacked(first.stacked(second, "a"), "a")


# Models in memory


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_gates_edit_does_to_the_weights_what_the_hooks_did(checkpoints, share):
    for folder in checkpoints.values():
        model = load_model(folder, device="cpu")
        gates = some_gates(model, share=share)
        with gated(model, gates):
            expected = logits_of(model)
        edit = create_gates_edit(model, gates)
        apply_edit(model, edit)
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
        revert_edit(model, edit)
        selection, value = edit.hooked()
        assert isinstance(value, Multiply) and len(selection) == len(gates)
        with ablate(model, selection, value=value):
            torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_it_differs_from_the_hooks_by_rounding(folder, dtype):
    model = load_model(folder, device="cpu", dtype=dtype)
    gates = some_gates(model)
    with gated(model, gates):
        expected = logits_of(model).float()
    plain = logits_of(model).float()
    apply_edit(model, create_gates_edit(model, gates))
    difference = (logits_of(model).float() - expected).abs().max()
    assert difference < 2e-2 * expected.abs().max() < (plain - expected).abs().max()


@settings(max_examples=12)
@given(
    name=st.sampled_from(["gpt2", "llama", "llama-gqa", "qwen2"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 1000),
    share=st.sampled_from([1.0, 0.3]),
    size=st.sampled_from([1e-6, 0.05, 1.0]),
)
def test_apply_then_revert_is_the_identity_to_the_bit(checkpoints, name, dtype, seed, share, size):
    model = load_model(checkpoints[name], device="cpu", dtype=dtype)
    before = parameters_of(model)
    edit = create_gates_edit(model, some_gates(model, seed=seed, share=share, size=size).clipped(0.0, 2.0))
    if edit_state(model, edit) == "both":
        return
    apply_edit(model, edit)
    assert not are_same(before, model.parameters())
    revert_edit(model, edit)
    assert are_same(before, model.parameters())


def test_gates_that_silence_are_the_edit_that_silences(llama):
    selection = some_neurons(llama)
    before = parameters_of(llama)
    apply_edit(llama, edit := create_gates_edit(llama, gates_of(selection)))
    silenced = parameters_of(llama)
    revert_edit(llama, edit)
    apply_edit(llama, zero := create_edit(llama, selection))
    assert are_same(silenced, llama.parameters())
    revert_edit(llama, zero)
    assert are_same(before, llama.parameters())


def test_gates_of_weights_in_double_precision_are_refused(checkpoints, tokenizer):
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama-gqa"], dtype=torch.float64)
    model = load_model(plain, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"into weights of bfloat16, float16, float32, and these are torch\.float64"):
        create_gates_edit(model, some_gates(model, share=0.4))


def test_the_gates_come_back_from_their_edit(llama, tmp_path):
    gates = some_gates(llama, share=0.4)
    create_gates_edit(llama, gates).save(tmp_path / "edit.safetensors")
    edit = load_edit(tmp_path / "edit.safetensors")
    assert edit.gates.fingerprint == gates.fingerprint and edit.gates.prompt_hashes == gates.prompt_hashes
    assert edit.facts["value"] == f"Multiply({gates.fingerprint})"
    assert edit.facts["units"] == {str(site): n for site, n in gates.selection.counts().items()}
    with pytest.raises(InputError, match=r"sets numbers of model.layers.0.mlp.down_proj.weight, which no gates do"):
        _ = create_edit(llama, some_neurons(llama)).gates


def test_a_gates_edit_survives_its_file(llama, tmp_path):
    edit = create_gates_edit(llama, some_gates(llama).clipped(0.0, 3.0))
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.digest == edit.digest and again.facts == edit.facts and repr(again) == repr(edit)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "edit.safetensors").read_bytes()
    assert len(edit) == 3 * llama.cfg.d_mlp * llama.cfg.d_model


# Refused


def test_a_second_time_a_wrong_base_and_a_missing_edit_are_refused(checkpoints, folder):
    model = load_model(folder, device="cpu")
    edit = create_gates_edit(model, some_gates(model))
    with pytest.raises(InputError, match="does not hold this edit"):
        revert_edit(model, edit)
    apply_edit(model, edit)
    with pytest.raises(InputError, match="holds this edit already"):
        apply_edit(model, edit)
    for place in ((3, 4), (0, 0)):
        other = load_model(folder, device="cpu")
        with torch.no_grad():
            weight(other, Site(1, "out"))[place] += 1e-3
        before = parameters_of(other)
        with pytest.raises(InputError, match="neither the base of this edit nor its result"):
            apply_edit(other, edit)
        assert are_same(before, other.parameters())
    with pytest.raises(InputError, match="neither the base"):
        apply_edit(load_model(checkpoints["llama"], device="cpu"), edit)
    half = load_model(folder, device="cpu", dtype="bfloat16")
    with pytest.raises(InputError, match="another dtype"):
        apply_edit(half, edit)


def test_gates_that_cannot_be_an_edit_are_refused(llama):
    with pytest.raises(InputError, match="there is nothing to edit"):
        create_gates_edit(llama, some_gates(llama) * 0)
    with pytest.raises(InputError, match="not of this model"):
        create_gates_edit(llama, Gates({Site(0, "neurons"): torch.full((7,), 2.0)}))
    with pytest.raises(InputError, match=r"gates hold nothing for L0.neurons"):
        gates = Gates({Site(1, "neurons"): torch.full((llama.cfg.d_mlp,), 2.0)})
        create_edit(llama, some_neurons(llama), value=Multiply(gates))


def test_an_edit_that_was_changed_after_it_was_made_is_refused(llama, tmp_path):
    path = tmp_path / "edit.safetensors"
    create_gates_edit(llama, some_gates(llama)).save(path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for place in range(data, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="was changed after it was made"):
            load_edit(path)


def test_an_edit_whose_digest_was_made_to_fit_is_refused_all_the_same(llama, tmp_path, untyped):
    gates = some_gates(llama).clipped(0.0, 3.0)
    edit = create_gates_edit(llama, gates)
    name, change = next((name, change) for name, change in edit.changes.items() if len(change.silenced))
    at = change.rows
    bad = {
        "rows": [at + 1, -at, at.flip(0), at[1:], at[None]],
        "multipliers": [change.multipliers * torch.inf, change.multipliers[1:], change.multipliers.double()],
        "n_bits": [change.n_bits + 8, -change.n_bits, change.n_bits[1:], change.n_bits + 1000],
        "bits": [change.bits[8:], change.bits.to(torch.int8), change.bits[None]],
        "kept_at": [torch.tensor([5]), torch.tensor([-1]), torch.tensor([2**40])],
        "kept": [torch.ones(3), torch.zeros(0, dtype=torch.float16)],
        "silenced": [change.silenced[1:], change.silenced * torch.nan, change.silenced.half(), change.silenced[0]],
        "shape": [(0, 24), (2**40, 2**40), (24, 39), (23, 40), (960,)],
        "site": [Site(0, "in"), Site(0, "neurons")],
    }
    for field, values in bad.items():
        for value in values:
            changed = dataclasses.replace(change, **{field: value})
            dataclasses.replace(edit, changes={name: changed}).save(tmp_path / "edit")
            with pytest.raises(InputError, match="is damaged"):
                load_edit(tmp_path / "edit")


def test_wrong_bits_in_an_edit_whose_digest_fits_do_not_reach_a_model(folder):
    model = load_model(folder, device="cpu")
    edit = create_gates_edit(model, some_gates(model))
    (name, change), *_ = edit.changes.items()
    for field in ("bits", "multipliers"):
        wrong = getattr(change, field).clone()
        wrong[0] = wrong[0] ^ 128 if field == "bits" else wrong[0] * 1.001
        changes = {**edit.changes, name: dataclasses.replace(change, **{field: wrong})}
        apply_edit(model, edit)
        edited = parameters_of(model)
        with pytest.raises(InputError, match="neither the base"):
            revert_edit(model, dataclasses.replace(edit, changes=changes))
        assert are_same(edited, model.parameters())
        revert_edit(model, edit)


# Stacks and comparisons


def test_gates_edits_stack_where_they_share_no_row(llama):
    gates = some_gates(llama)
    even, odd = {}, {}
    for site, multiplier in gates.multipliers.items():
        is_even = torch.arange(len(multiplier)) % 2 == 0
        even[site] = torch.where(is_even, multiplier, torch.ones(()))
        odd[site] = torch.where(is_even, torch.ones(()), multiplier)
    first, second = create_gates_edit(llama, Gates(even)), create_gates_edit(llama, Gates(odd))
    stacked = stack(first, second)
    before = parameters_of(llama)
    with gated(llama, gates):
        expected = logits_of(llama)
    apply_edit(llama, stacked)
    torch.testing.assert_close(logits_of(llama), expected, atol=1e-4, rtol=1e-4)
    revert_edit(llama, stacked)
    assert are_same(before, llama.parameters()) and stacked.gates.fingerprint == gates.fingerprint
    with pytest.raises(InputError, match=r"both edits multiply 20 rows of model.layers.0.mlp.down_proj.weight"):
        stack(stacked, first)
    apply_edit(llama, first)
    with pytest.raises(InputError, match="the edits are of different models"):
        stack(first, create_gates_edit(llama, Gates(odd)))
    revert_edit(llama, first)


def test_gates_stack_with_other_edits_of_other_tensors_alone(llama):
    first_layer = Gates({Site(0, "neurons"): some_gates(llama).multipliers[Site(0, "neurons")]})
    gating = create_gates_edit(llama, first_layer)
    selection = some_neurons(llama)
    with pytest.raises(InputError, match=r"one edit sets numbers of .*, the other multiplies rows of it"):
        stack(gating, create_edit(llama, selection))
    later = dataclasses.replace(
        selection, units={**selection.units, Site(0, "neurons"): torch.zeros(0, dtype=torch.int64)}
    )
    both = stack(gating, create_edit(llama, later))
    before = parameters_of(llama)
    with gated(llama, first_layer), ablate(llama, later):
        expected = logits_of(llama)
    apply_edit(llama, both)
    torch.testing.assert_close(logits_of(llama), expected, atol=1e-4, rtol=1e-4)
    revert_edit(llama, both)
    assert are_same(before, llama.parameters())
    with pytest.raises(InputError, match="sets numbers and multiplies rows"):
        both.hooked()


def test_a_comparison_of_gates_counts_rows(llama):
    site = Site(0, "neurons")
    one, two = torch.ones(llama.cfg.d_mlp), torch.ones(llama.cfg.d_mlp)
    one[:5], two[3:10], two[3] = 1.5, 1.5, 0.5
    first, second = create_gates_edit(llama, Gates({site: one})), create_gates_edit(llama, Gates({site: two}))
    (counts,) = compare(first, second).values()
    assert counts == {"alike": 1, "different": 1, "first_only": 3, "second_only": 5}


# Checkpoint folders


def test_a_checkpoint_gets_gates_without_being_loaded_and_reverts_to_the_same_bytes(checkpoints, tmp_path):
    for name, folder in checkpoints.items():
        model = load_model(folder, device="cpu")
        gates, before = some_gates(model), contents(folder)
        edit, out = create_gates_edit(model, gates), tmp_path / name
        apply_edit_to_checkpoint(folder, edit, out)
        with gated(model, gates):
            expected = logits_of(model)
        plain = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
        with torch.inference_mode():
            assert (plain(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (checkpoint_state(folder, edit), checkpoint_state(out, edit)) == ("base", "edited")
        with pytest.raises(InputError, match="holds this edit already"):
            apply_edit_to_checkpoint(out, edit, tmp_path / "twice")
        revert_edit_in_checkpoint(out, edit, tmp_path / f"{name} reverted")
        assert contents(tmp_path / f"{name} reverted") == before == contents(folder) != contents(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gates_made_on_the_model_in_float32_fit_a_checkpoint_of_half_precision(folder, tmp_path, dtype):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, half)
    model = load_model(half, device="cpu", dtype="float32")
    edit = create_gates_edit(model, some_gates(model).clipped(0.0, 2.0))
    apply_edit_to_checkpoint(half, edit, tmp_path / "edited")
    assert checkpoint_state(tmp_path / "edited", edit) == "edited"
    apply_edit(model, edit)
    written = load_model(tmp_path / "edited", device="cpu", dtype="float32")
    assert are_same(model.parameters(), written.parameters()), "the edit in memory is the edit that ships"
    revert_edit_in_checkpoint(tmp_path / "edited", edit, tmp_path / "reverted")
    assert contents(tmp_path / "reverted") == contents(half)


def test_a_sharded_checkpoint_reverts_to_the_same_bytes(folder, tmp_path):
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    model = load_model(folder, device="cpu")
    edit = create_gates_edit(model, some_gates(model))
    apply_edit_to_checkpoint(sharded, edit, tmp_path / "edited")
    revert_edit_in_checkpoint(tmp_path / "edited", edit, tmp_path / "reverted")
    assert contents(tmp_path / "reverted") == contents(sharded) != contents(tmp_path / "edited")


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(folder, tmp_path):
    model = load_model(folder, device="cpu")
    edit = create_gates_edit(model, some_gates(model))
    edited = tmp_path / "edited"
    apply_edit_to_checkpoint(folder, edit, edited)
    tensors = load_file(edited / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][7, 7] *= 1.001
    save_file(tensors, edited / "model.safetensors", {"format": "pt"})
    for write in (apply_edit_to_checkpoint, revert_edit_in_checkpoint):
        with pytest.raises(InputError, match="neither the base of this edit nor its result"):
            write(edited, edit, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


def test_a_disk_that_is_full_half_way_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    model = load_model(folder, device="cpu")
    edit, write, n_written = create_gates_edit(model, some_gates(model)), RowScaling.write, []

    def full(scaling, tensor):
        if n_written:
            raise OSError(28, "No space left on device")
        n_written.append(1)
        write(scaling, tensor)

    monkeypatch.setattr(RowScaling, "write", full)
    with pytest.raises(InputError, match="No space left on device; nothing was kept"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert n_written and list(tmp_path.iterdir()) == []


_SLOW_WRITE = """
import sys, time
from dean_interp.editing.checkpoint import apply_edit_to_checkpoint
from dean_interp.editing.edit import load_edit
from dean_interp.editing.row_scaling import RowScaling

write = RowScaling.write
def slowly(scaling, tensor):
    write(scaling, tensor)
    print("written", flush=True)
    time.sleep(30)
RowScaling.write = slowly
apply_edit_to_checkpoint(sys.argv[2], load_edit(sys.argv[1]), sys.argv[3])
"""


def test_a_kill_half_way_leaves_the_old_checkpoint_and_the_next_run_the_new_one(folder, tmp_path):
    model = load_model(folder, device="cpu")
    edit, before, out = create_gates_edit(model, some_gates(model)), contents(folder), tmp_path / "out"
    edit.save(tmp_path / "edit.safetensors")
    command = [sys.executable, "-c", _SLOW_WRITE, str(tmp_path / "edit.safetensors"), str(folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "written\n"
        time.sleep(0.2)
        running.send_signal(signal.SIGKILL)
    assert not out.exists() and contents(folder) == before
    apply_edit_to_checkpoint(folder, edit, out)
    assert checkpoint_state(out, edit) == "edited" and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_the_edit_and_the_model_stays_as_it_was(folder, tmp_path, dtype):
    half = load_model(folder, device="cpu", dtype=dtype)
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), half.parameters(), strict=True):
            mine.copy_(theirs)
    before = parameters_of(model)
    edit = create_gates_edit(model, some_gates(model))
    assert edit.equals_hooks == (dtype == "float32")
    said = export(model, edit, tmp_path / "out", n_new_tokens=4)
    assert said["largest_difference"] <= 1e-5 * said["largest_logit"]
    assert are_same(before, model.parameters()) and checkpoint_state(tmp_path / "out", edit) == "edited"


@pytest.mark.hooks
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_gates_edit_fits_a_hooked_transformer_of_the_same_weights(checkpoints, tokenizer, name):
    hooked, bridge = as_hooked_transformer(checkpoints[name], tokenizer), load_model(checkpoints[name], device="cpu")
    before, gates = parameters_of(hooked), some_gates(bridge)
    edit = create_gates_edit(bridge, gates)
    apply_edit(hooked, edit)
    with gated(bridge, gates):
        torch.testing.assert_close(logits_of(hooked), logits_of(bridge), atol=2e-4, rtol=1e-3)
    revert_edit(hooked, edit)
    assert are_same(before, hooked.parameters())


# The command


def said(capsys, *command):
    assert main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_takes_a_gates_file_from_edit_to_checkpoint_and_back(folder, tmp_path, capsys):
    model = ["--model", folder, "--device", "cpu"]
    tiny = load_model(folder, device="cpu")
    gates, path, edit = some_gates(tiny), tmp_path / "gates.safetensors", tmp_path / "edit.safetensors"
    gates.save(path)
    made = said(capsys, "edit", "create", path, "--out", edit, *model)
    assert made["value"] == f"Multiply({gates.fingerprint})" and made["numbers"] == 3 * 40 * 24
    assert load_edit(edit).gates.fingerprint == load_gates(path).fingerprint
    assert said(capsys, "edit", "show", edit)["digest"] == made["digest"]
    assert said(capsys, "edit", "verify", edit, folder)["state"] == "base"
    said(capsys, "edit", "apply", edit, folder, "--out", tmp_path / "edited")
    assert said(capsys, "edit", "verify", edit, tmp_path / "edited")["state"] == "edited"
    said(capsys, "edit", "revert", edit, tmp_path / "edited", "--out", tmp_path / "reverted")
    assert contents(tmp_path / "reverted") == contents(folder)
    assert said(capsys, "edit", "diff", edit, edit)["in_all"]["alike"] == 3 * 40
    exported = said(capsys, "edit", "export", edit, "--out", tmp_path / "exported", *model)
    assert exported["largest_difference"] <= 1e-5 * exported["largest_logit"]
    assert main(["edit", "stack", str(edit), str(edit), "--out", str(tmp_path / "both.safetensors")]) == 2
    assert "cannot be stacked" in capsys.readouterr().err
    assert main(["edit", "create", str(path), "--value", "0.5", "--out", str(edit), *map(str, model)]) == 2
    assert "gates, which say by how much" in capsys.readouterr().err
