"""Edits: made, kept, written into models and checkpoints, taken back bit by bit, refused where they do not belong."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hooked import as_hooked_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from units import logits_of, plain_logits, some_neurons, some_weights

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    Selection,
    Site,
    ablate,
    importance,
    load_behaviour,
    load_model,
    measure,
)
from dean_interp.editing import checkpoint
from dean_interp.editing.apply import apply_edit, create_edit, create_gates_edit, edit_state, revert_edit
from dean_interp.editing.checkpoint import apply_edit_to_checkpoint, checkpoint_state, export, revert_edit_in_checkpoint
from dean_interp.editing.edit import compare, load_edit, stack
from dean_interp.editing.row_scaling import RowScaling
from dean_interp.editing.tensor_change import TensorChange
from dean_interp.editing.value_names import described_in_words
from dean_interp.editing.values import Mean, Noise, Project, Restore, Scale, Zero
from dean_interp.models.adapters import adapter_of
from dean_interp.models.matrices import weight, weight_sites
from dean_interp.selection.gates import Gates

TEXTS = Behaviour("texts", (Example("hello", {"response": "world"}), Example("one", {"response": "two three"})))
DTYPES = ("float32", "bfloat16", "float16")
seeded = settings(max_examples=12)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def folder(checkpoints):
    return checkpoints["llama-gqa"]


@pytest.fixture
def sharded(folder, tmp_path):
    """The same checkpoint in several files."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copy(folder / name, tmp_path / "sharded" / name)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


# In memory


def gates_of_some(model):
    """Gates of some neurons of every layer, one of them 0."""
    selection = some_neurons(model, n=5)
    multipliers = {site: torch.ones(n) for site, (n,) in selection.shapes.items()}
    for site, units in selection.units.items():
        multipliers[site][units] = torch.arange(len(units)) * 0.4
    return Gates(multipliers)


def edit_of(kind, model):
    if kind == "gates":
        return create_gates_edit(model, gates_of_some(model))
    if kind == "means":
        return create_edit(model, some_neurons(model), value=Mean(importance(model, TEXTS)))
    weights = some_weights(model, modules="attention")
    if kind == "weights":
        return create_edit(model, some_weights(model, modules="all"))
    return stack(create_edit(model, weights), create_gates_edit(model, gates_of_some(model)))


def interrupted_at(monkeypatch, number):
    """From here on the write of that number, from 0, is stopped when half of its tensor is written."""
    writes = []

    def stopped(write):
        def half(change, tensor):
            before = tensor.clone()
            write(change, tensor)
            writes.append(change)
            if len(writes) == number + 1:
                n_rows = len(tensor) // 2
                tensor[:n_rows] = before[:n_rows]
                raise KeyboardInterrupt

        return half

    for kind in (TensorChange, RowScaling):
        for name in ("write", "undo"):
            monkeypatch.setattr(kind, name, stopped(getattr(kind, name)))


@pytest.mark.parametrize("what", ["apply", "revert"])
@pytest.mark.parametrize("kind", ["weights", "means", "gates", "stack"])
def test_an_edit_that_is_interrupted_leaves_the_model_as_it_was_to_the_bit(checkpoints, kind, what, monkeypatch):
    model = load_model(checkpoints["gpt2" if kind == "means" else "llama-gqa"], device="cpu")
    edit = edit_of(kind, model)
    write = apply_edit if what == "apply" else revert_edit
    if what == "revert":
        apply_edit(model, edit)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert len(edit.changes) > 1
    for number in range(len(edit.changes)):
        with monkeypatch.context() as patched:
            interrupted_at(patched, number)
            with pytest.raises(KeyboardInterrupt):
                write(model, edit)
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), (number, name)
    write(model, edit)
    assert edit_state(model, edit) == ("edited" if what == "apply" else "base")


@pytest.mark.parametrize("number", [1, 4])
def test_an_export_that_is_interrupted_leaves_the_model_as_it_was(folder, tmp_path, number, monkeypatch):
    model = load_model(folder, device="cpu")
    edit = edit_of("gates", model)
    assert len(edit.changes) == 3
    interrupted_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        export(model, edit, tmp_path / "out")
    assert edit_state(model, edit) == "base" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [Zero(), Scale(0.5), Scale(-1.0)])
@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_an_applied_edit_does_to_the_weights_what_the_hooks_did(checkpoints, choose, value):
    for folder in checkpoints.values():
        model = load_model(folder, device="cpu")
        selection = choose(model)
        with ablate(model, selection, value=value):
            expected = logits_of(model)
        edit = create_edit(model, selection, value=value)
        apply_edit(model, edit)
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
        revert_edit(model, edit)
        again, given = edit.hooked()
        with ablate(model, again, value=given):
            torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


def test_attention_weights_are_edited_alike(llama):
    selection = some_weights(llama, modules="all")
    with ablate(llama, selection):
        expected = logits_of(llama)
    edit = create_edit(llama, selection)
    apply_edit(llama, edit)
    torch.testing.assert_close(logits_of(llama), expected, atol=1e-4, rtol=1e-4)
    revert_edit(llama, edit)


@seeded
@given(
    name=st.sampled_from(["gpt2", "llama", "llama-gqa", "qwen2"]),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 30),
    seed=st.integers(0, 1000),
    alpha=st.floats(-2, 2, width=32),
    weights=st.booleans(),
)
def test_apply_then_revert_is_the_identity_to_the_bit(checkpoints, name, dtype, n, seed, alpha, weights):
    model = load_model(checkpoints[name], device="cpu", dtype=dtype)
    before = [parameter.clone() for parameter in model.parameters()]
    selection = (some_weights if weights else some_neurons)(model, n=n, seed=seed)
    edit = create_edit(model, selection, value=Scale(alpha))
    assert edit_state(model, edit) == ("both" if alpha == 1 else "base")
    apply_edit(model, edit)
    changed = sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))
    assert changed <= len(edit)
    revert_edit(model, edit)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_edit_survives_its_file_and_is_small(llama, tmp_path):
    edit = create_edit(llama, some_weights(llama, n=3))
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.digest == edit.digest and again.facts == edit.facts and repr(again) == repr(edit)
    assert edit.facts["units"] and edit.facts["value"] == "Zero" and edit.facts["versions"]["torch"]
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "edit.safetensors").read_bytes()
    assert (tmp_path / "edit.safetensors").stat().st_size < 10_000


def test_means_go_into_the_bias_where_there_is_one(checkpoints):
    gpt2 = load_model(checkpoints["gpt2"], device="cpu")
    scores, selection = importance(gpt2, TEXTS), some_neurons(gpt2)
    with ablate(gpt2, selection, value=Mean(scores)):
        expected = logits_of(gpt2)
    edit = create_edit(gpt2, selection, value=Mean(scores))
    before = [parameter.clone() for parameter in gpt2.parameters()]
    apply_edit(gpt2, edit)
    torch.testing.assert_close(logits_of(gpt2), expected, atol=1e-4, rtol=1e-4)
    revert_edit(gpt2, edit)
    assert all(torch.equal(a, b) for a, b in zip(before, gpt2.parameters(), strict=True))
    with pytest.raises(InputError, match="changes biases"):
        edit.hooked()


def test_means_without_a_bias_are_refused(llama):
    scores = importance(llama, TEXTS)
    with pytest.raises(InputError, match="writes the means into the bias of 'out', which"):
        create_edit(llama, some_neurons(llama), value=Mean(scores))


@pytest.mark.parametrize("make", [Noise, lambda scores: Project({})])
def test_what_weights_cannot_do_is_refused(llama, make):
    with pytest.raises(InputError, match="weights cannot do what"):
        create_edit(llama, some_neurons(llama), value=make(importance(llama, TEXTS)))


def test_restoring_neurons_of_another_checkpoint_is_an_edit(folder):
    base, tuned = load_model(folder, device="cpu"), load_model(folder, device="cpu")
    with torch.no_grad():
        for site in weight_sites(tuned):
            weight(tuned, site).add_(0.05)
    every = some_neurons(tuned, n=tuned.cfg.d_mlp)
    apply_edit(tuned, create_edit(tuned, every, value=Restore(base)))
    torch.testing.assert_close(logits_of(tuned), logits_of(base))


def test_weights_that_are_zero_already_do_not_confuse_an_edit(folder):
    model = load_model(folder, device="cpu")
    selection = some_weights(model)
    with torch.no_grad():
        weight(model, Site(1, "out"))[selection.mask(Site(1, "out"))] = 0
    before = [parameter.clone() for parameter in model.parameters()]
    edit = create_edit(model, selection)
    assert edit_state(model, edit) == "base"
    apply_edit(model, edit)
    assert edit_state(model, edit) == "edited"
    revert_edit(model, edit)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Refused


def test_a_second_time_a_wrong_base_and_a_missing_edit_are_refused(checkpoints, folder):
    model = load_model(folder, device="cpu")
    edit = create_edit(model, some_weights(model))
    with pytest.raises(InputError, match="does not hold this edit"):
        revert_edit(model, edit)
    apply_edit(model, edit)
    with pytest.raises(InputError, match="holds this edit already"):
        apply_edit(model, edit)
    other = load_model(folder, device="cpu")
    with torch.no_grad():
        weight(other, Site(1, "out"))[3, 4] += 1e-3
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(InputError, match="neither the base of this edit nor its result"):
        apply_edit(other, edit)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    with pytest.raises(InputError, match="neither the base"):
        apply_edit(load_model(checkpoints["llama"], device="cpu"), edit)


def test_an_edit_that_was_changed_after_it_was_made_is_refused(llama, tmp_path):
    path = tmp_path / "edit.safetensors"
    create_edit(llama, some_weights(llama)).save(path)
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 40 * 4 * 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="was changed after it was made"):
            load_edit(path)
    path.write_bytes(whole[:-7])
    with pytest.raises(InputError, match="damaged"):
        load_edit(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="is not a edit file"):
        load_edit(path)


def test_numbers_that_no_file_of_an_edit_may_hold_are_refused_when_it_is_made(llama):
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="alpha must be a finite number"):
            Scale(alpha)
    for choose in (some_neurons, some_weights):
        with pytest.raises(InputError, match=r"the new weights of L0\..* are not finite in torch.float32"):
            create_edit(llama, choose(llama), value=Scale(1e40))


def test_means_of_scores_that_have_none_are_refused(checkpoints):
    gpt2 = load_model(checkpoints["gpt2"], device="cpu")
    scores = importance(gpt2, TEXTS, unit="weight")
    with pytest.raises(InputError, match=r"the scores of .* hold nothing for L0\.neurons"):
        create_edit(gpt2, some_neurons(gpt2), value=Mean(scores))


def test_an_edit_is_not_written_into_a_copy_of_a_matrix(llama, monkeypatch):
    """As of a HookedTransformer, which keeps the heads of attention along an axis of their own."""
    edit = create_edit(llama, some_weights(llama))
    adapter = type(adapter_of(llama))
    own_parameter = adapter.parameter

    def parameter_with_copies(self, site):
        stored, as_matrix = own_parameter(self, site)
        return stored, lambda values: as_matrix(values).clone()

    monkeypatch.setattr(adapter, "parameter", parameter_with_copies)
    before = [stored.clone() for stored in llama.parameters()]
    with pytest.raises(InputError, match=r"L0\.gate of this .* is kept in another layout"):
        apply_edit(llama, edit)
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters(), strict=True))


# Stacks and comparisons


def test_edits_of_one_base_stack_and_conflicts_are_refused(folder):
    model = load_model(folder, device="cpu")
    one, two = some_weights(model, seed=1, n=200), some_weights(model, seed=2, n=200)
    stacked = stack(create_edit(model, one), create_edit(model, two))
    assert len(stacked) == len(one | two)
    with ablate(model, one | two):
        expected = logits_of(model)
    apply_edit(model, stacked)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
    revert_edit(model, stacked)
    half = create_edit(model, two, value=Scale(0.5))
    with pytest.raises(InputError, match="different values: they cannot be stacked"):
        stack(stacked, half)
    apply_edit(model, half)
    with pytest.raises(InputError, match="the edits are of different models"):
        stack(create_edit(model, one), stacked)


def test_a_stack_says_what_both_edits_change_and_passes_for_neither(llama):
    neurons = [some_neurons(llama, seed=seed, n=5) for seed in (1, 2)]
    assert 0 < len(neurons[0] & neurons[1]) < 15
    first, second = (create_edit(llama, selection) for selection in neurons)
    stacked = stack(first, second)
    assert stacked.facts["units"] == {str(site): n for site, n in (neurons[0] | neurons[1]).counts().items()}
    for edit in (first, second):
        assert stacked.facts["selection"] != edit.facts["selection"]
    assert stacked.facts["value"] == "Zero" and stack(first, first).facts["selection"] == first.facts["selection"]
    # Weights beside neurons, some of each known to an earlier stack.
    weights = [some_weights(llama, seed=seed, n=200) for seed in (1, 2)]
    neurons_at = {site.out for site in neurons[0].units}
    others = [Selection({s: u[:0] if s in neurons_at else u for s, u in w.units.items()}, w.shapes) for w in weights]
    halved = [create_edit(llama, selection, value=Scale(0.5)) for selection in others]
    both = stack(stacked, stack(*halved))
    n_weights = {str(site): n for site, n in (others[0] | others[1]).counts().items() if n}
    assert both.facts["units"] == stacked.facts["units"] | n_weights
    assert both.facts["value"] == "Zero and Scale(0.5)"
    assert described_in_words(both.facts["value"]) == "in part set to 0 and in part scaled by 0.5"


def test_prompts_that_an_edit_was_made_from_are_refused_while_it_is_in_the_model(checkpoints):
    model = load_model(checkpoints["gpt2"], device="cpu")
    privacy = dataclasses.replace(load_behaviour("privacy", n_examples=4), split=None)
    selection = dataclasses.replace(some_neurons(model), prompt_hashes=privacy.prompt_hashes)
    edit = create_edit(model, selection)
    measure(model, [privacy])
    apply_edit(model, edit)
    with pytest.raises(InputError, match="4 of the 4 prompts of 'privacy' were scored"):
        measure(model, [privacy])
    revert_edit(model, edit)
    measure(model, [privacy])


def test_a_comparison_counts_what_is_shared(llama):
    one, two = some_weights(llama, seed=1, n=200), some_weights(llama, seed=2, n=200)
    first, second = create_edit(llama, one), create_edit(llama, two)
    found = compare(first, second)
    assert sum(row["alike"] for row in found.values()) == len(one & two) > 0
    assert sum(row["first_only"] for row in found.values()) == len(one - two)
    assert sum(row["different"] for row in found.values()) == 0
    scaled = compare(first, create_edit(llama, one, value=Scale(0.5)))
    assert sum(row["different"] for row in scaled.values()) == len(one)


# Checkpoint folders


@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_a_checkpoint_is_edited_without_loading_it_and_gives_the_hooked_logits(checkpoints, tmp_path, choose):
    for name, folder in checkpoints.items():
        model = load_model(folder, device="cpu")
        selection = choose(model)
        edit, before, out = create_edit(model, selection), contents(folder), tmp_path / name
        apply_edit_to_checkpoint(folder, edit, out)
        with ablate(model, selection):
            expected = logits_of(model)
        found = plain_logits(out)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        assert contents(folder) == before
        assert (checkpoint_state(folder, edit), checkpoint_state(out, edit)) == ("base", "edited")


def test_a_sharded_checkpoint_reverts_to_the_same_bytes(folder, sharded, tmp_path):
    model = load_model(folder, device="cpu")
    edit = create_edit(model, some_weights(model))
    apply_edit_to_checkpoint(sharded, edit, tmp_path / "edited")
    assert contents(tmp_path / "edited") != contents(sharded)
    revert_edit_in_checkpoint(tmp_path / "edited", edit, tmp_path / "reverted")
    assert contents(tmp_path / "reverted") == contents(sharded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_of_the_model_in_float32_fits_a_checkpoint_of_half_precision(folder, tmp_path, dtype):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(half)
    shutil.copy(folder / "tokenizer.json", half)
    shutil.copy(folder / "tokenizer_config.json", half)
    model = load_model(half, device="cpu", dtype="float32")
    edit = create_edit(model, some_weights(model), value=Scale(0.3))
    apply_edit_to_checkpoint(half, edit, tmp_path / "edited")
    assert checkpoint_state(tmp_path / "edited", edit) == "edited"
    revert_edit_in_checkpoint(tmp_path / "edited", edit, tmp_path / "reverted")
    assert contents(tmp_path / "reverted") == contents(half)


def test_a_checkpoint_without_the_name_of_its_body_is_found(checkpoints, tmp_path):
    """As GPT-2's own checkpoint, which says `h.0.mlp.c_proj.weight`."""
    bare = tmp_path / "bare"
    shutil.copytree(checkpoints["gpt2"], bare)
    tensors = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
              bare / "model.safetensors", {"format": "pt"})  # fmt: skip
    model = load_model(checkpoints["gpt2"], device="cpu")
    edit = create_edit(model, some_neurons(model))
    apply_edit_to_checkpoint(bare, edit, tmp_path / "edited")
    with ablate(model, some_neurons(model)):
        torch.testing.assert_close(plain_logits(tmp_path / "edited"), logits_of(model), atol=1e-5, rtol=1e-4)


def test_subfolders_come_along_and_weights_in_other_forms_do_not(folder, tmp_path, caplog):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("kept")
    (source / "pytorch_model.bin").write_bytes(b"the same weights, not edited")
    model = load_model(folder, device="cpu")
    apply_edit_to_checkpoint(source, create_edit(model, some_weights(model)), tmp_path / "out")
    assert (tmp_path / "out" / "extra" / "notes.txt").read_text() == "kept"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists() and "pytorch_model.bin" in caplog.text


def test_checkpoints_that_cannot_take_an_edit_are_refused_and_nothing_is_written(checkpoints, folder, tmp_path):
    model = load_model(folder, device="cpu")
    edit, out = create_edit(model, some_weights(model)), tmp_path / "out"
    apply_edit_to_checkpoint(folder, edit, tmp_path / "edited")
    (tmp_path / "pickled").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for source, message in ((tmp_path / "edited", "holds this edit already"),
                            (checkpoints["llama"], "neither the base"),
                            (checkpoints["gpt2"], "has no tensor model.layers.0"), (tmp_path / "none", "no checkpoint"),
                            (tmp_path / "pickled", "has no model.safetensors"), (broken, "is damaged")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            apply_edit_to_checkpoint(source, edit, out)
    with pytest.raises(InputError, match="an edited checkpoint is written to a new folder"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "edited")
    with pytest.raises(InputError, match="no folder"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "nowhere" / "out")
    with pytest.raises(InputError, match="does not hold this edit"):
        revert_edit_in_checkpoint(folder, edit, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "edited", "pickled"]


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    model = load_model(folder, device="cpu")

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left on device; nothing was kept"):
        apply_edit_to_checkpoint(folder, create_edit(model, some_weights(model)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_SLOW_COPY = """
import shutil, sys, time
from dean_interp.editing import checkpoint
from dean_interp.editing.edit import load_edit

copy = shutil.copyfile
def slowly(source, target):
    copy(source, target)
    print("copied", flush=True)
    time.sleep(60)
checkpoint.shutil.copyfile = slowly
checkpoint.apply_edit_to_checkpoint(sys.argv[2], load_edit(sys.argv[1]), sys.argv[3])
"""


def test_a_kill_leaves_the_old_checkpoint_and_the_next_run_the_new_one(folder, sharded, tmp_path):
    model = load_model(folder, device="cpu")
    edit, before, out = create_edit(model, some_weights(model)), contents(sharded), tmp_path / "out"
    edit.save(tmp_path / "edit.safetensors")
    command = [sys.executable, "-c", _SLOW_COPY, str(tmp_path / "edit.safetensors"), str(sharded), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "copied\n"
        time.sleep(0.2)
        running.send_signal(signal.SIGKILL)
    assert not out.exists() and contents(sharded) == before
    assert (tmp_path / "out.part").is_dir()
    apply_edit_to_checkpoint(sharded, edit, out)
    assert checkpoint_state(out, edit) == "edited" and not (tmp_path / "out.part").exists()


def test_an_export_loads_in_plain_transformers_and_the_model_stays_as_it_was(folder, tmp_path):
    model = load_model(folder, device="cpu")
    selection, before = some_neurons(model), [parameter.clone() for parameter in model.parameters()]
    edit = create_edit(model, selection)
    said = export(model, edit, tmp_path / "out", n_new_tokens=4)
    assert said["largest_difference"] <= 1e-5 * said["largest_logit"] and isinstance(said["answer"], str)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert checkpoint_state(tmp_path / "out", edit) == "edited"
    again = load_model(tmp_path / "out", device="cpu")
    with ablate(model, selection):
        torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="is written to a new folder"):
        export(model, edit, tmp_path / "out")


def test_an_export_that_does_not_do_what_the_hooks_do_is_thrown_away(folder, tmp_path, monkeypatch):
    model = load_model(folder, device="cpu")
    edit = create_edit(model, some_neurons(model))
    monkeypatch.setattr(checkpoint, "_logits", lambda model, prompt: torch.zeros(1, prompt.shape[1], 260))
    with pytest.raises(RuntimeError, match="nothing was kept"):
        export(model, edit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [] and edit_state(model, edit) == "base"


def test_an_export_whose_logits_are_no_numbers_is_not_kept(folder, tmp_path, monkeypatch):
    model = load_model(folder, device="cpu")
    edit = create_edit(model, some_neurons(model))
    monkeypatch.setattr(checkpoint, "_hooked_logits", lambda *given: checkpoint._logits(model, given[2]) * torch.nan)
    monkeypatch.setattr(torch.Tensor, "argmax", lambda tensor: torch.tensor(0))
    with pytest.raises(RuntimeError, match="differ by nan"):
        export(model, edit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [] and edit_state(model, edit) == "base"


@pytest.mark.hooks
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_an_edit_fits_a_hooked_transformer_of_the_same_weights(checkpoints, tokenizer, name):
    hooked, bridge = as_hooked_transformer(checkpoints[name], tokenizer), load_model(checkpoints[name], device="cpu")
    before = [parameter.clone() for parameter in hooked.parameters()]
    for choose in (some_neurons, some_weights):
        edit = create_edit(bridge, choose(bridge))
        apply_edit(hooked, edit)
        with ablate(bridge, choose(bridge)):
            torch.testing.assert_close(logits_of(hooked), logits_of(bridge), atol=2e-4, rtol=1e-3)
        revert_edit(hooked, edit)
        assert all(torch.equal(a, b) for a, b in zip(before, hooked.parameters(), strict=True))
    with pytest.raises(InputError, match="load the model without hooked_transformer"):
        create_edit(hooked, some_neurons(hooked))


@pytest.mark.slow
def test_the_demo_model_exported_reproduces_the_hooked_results(demo_model, tmp_path):
    selection = some_neurons(demo_model, n=10)
    edit = create_edit(demo_model, selection)
    edit.save(tmp_path / "edit.safetensors")
    said = export(demo_model, edit, tmp_path / "out")
    assert said["largest_difference"] <= 1e-5 * said["largest_logit"]
    assert len(str(said["answer"]).split()) > 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_an_edit_of_paper_size_takes_tens_of_kilobytes(demo_model, tmp_path):
    create_edit(demo_model, some_weights(demo_model, n=12)).save(tmp_path / "edit.safetensors")
    assert (tmp_path / "edit.safetensors").stat().st_size < 60_000
