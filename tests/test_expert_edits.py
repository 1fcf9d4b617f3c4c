"""Edits of mixtures: one matrix an expert, in memory and in folders of every form, taken back bit by bit."""

import dataclasses
import json

import pytest
import torch
from mixtures import D_EXPERT, D_MODEL, EACH, FAMILIES, IDS, N_EXPERTS, config_of, mixture, save_mixture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dean_interp import InputError, Selection, load_model
from dean_interp.cli.main import main
from dean_interp.data.examples import Behaviour, Example
from dean_interp.editing.ablation import ablate, gated
from dean_interp.editing.apply import apply_edit, create_edit, create_gates_edit, edit_state, revert_edit
from dean_interp.editing.checkpoint import (
    apply_edit_to_checkpoint,
    checkpoint_state,
    export,
    revert_edit_in_checkpoint,
    tensor_states,
)
from dean_interp.editing.edit import compare, load_edit, stack
from dean_interp.editing.edit_at_dose import at_dose
from dean_interp.editing.matching import places_of
from dean_interp.editing.values import Mean, Restore, Scale, Zero
from dean_interp.models.experts import RoutedExperts
from dean_interp.models.matrices import shape, weight, weight_sites
from dean_interp.models.own_matrices import entries, own_matrices
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_shapes
from dean_interp.scoring.importance import importance
from dean_interp.selection.gates import Gates


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
def gpt_oss(tokenizer, tmp_path_factory):
    """The folder of the family that stores stacks, `gate` and `in` neuron by neuron."""
    return save_mixture("gpt_oss", tokenizer, tmp_path_factory.mktemp("gpt_oss") / "folder")


@pytest.fixture(scope="module")
def qwen3(tokenizer, tmp_path_factory):
    """A folder of a family that stores experts one by one."""
    return save_mixture("qwen3_moe", tokenizer, tmp_path_factory.mktemp("qwen3") / "folder")


def logits_of(model):
    with torch.inference_mode():
        return model(IDS, return_type="logits")


def plain_logits(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
    with torch.inference_mode():
        return plain(IDS).logits


def close(one, other, tolerance=1e-6):
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def parameters_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def are_same(before, model):
    return all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def some_neurons(model, n=25, seed=0):
    return drawn(neuron_shapes(model), n, seed)


def some_weights(model, n=60, seed=0, modules="mlp"):
    return drawn({site: shape(model, site) for site in weight_sites(model, modules)}, n, seed)


def drawn(shapes, n, seed):
    """Some units of every site."""
    generator, units = torch.Generator().manual_seed(seed), {}
    for site, size in shapes.items():
        units[site] = torch.randperm(torch.Size(size).numel(), generator=generator)[:n].sort().values
    return Selection(units, shapes, frozenset({"a prompt"}))


def some_gates(model, seed=0):
    """Gates of every neuron, some of them 0, of all sites."""
    generator, multipliers = torch.Generator().manual_seed(seed), {}
    for site, (width,) in neuron_shapes(model).items():
        gate = 0.5 + torch.rand(width, generator=generator)
        multipliers[site] = gate * (torch.rand(width, generator=generator) > 0.1)
    return Gates(multipliers, frozenset({"a prompt"}))


def made(model, kind):
    """An edit of a kind, and the logits of the same change by hooks."""
    if kind == "gates":
        gates = some_gates(model)
        with gated(model, gates):
            return create_gates_edit(model, gates), logits_of(model)
    selection, value = (some_neurons(model), Zero()) if kind == "neurons" else (some_weights(model), Scale(-0.5))
    with ablate(model, selection, value=value):
        return create_edit(model, selection, value=value), logits_of(model)


KINDS = ("neurons", "weights", "gates")


# --- in memory


@pytest.mark.parametrize("kind", KINDS)
def test_an_applied_edit_gives_the_logits_of_the_hooks_and_is_taken_back_to_the_bit(model, kind):
    original, before = logits_of(model), parameters_of(model)
    edit, by_hooks = made(model, kind)
    assert edit_state(model, edit) == "base"
    apply_edit(model, edit)
    assert edit_state(model, edit) == "edited"
    assert close(logits_of(model), by_hooks) and not close(by_hooks, original, 1e-3)
    with pytest.raises(InputError, match="holds this edit already"):
        apply_edit(model, edit)
    revert_edit(model, edit)
    assert are_same(before, model)
    with pytest.raises(InputError, match="does not hold this edit"):
        revert_edit(model, edit)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_the_same_change_by_hooks(model, kind):
    edit, by_hooks = made(model, kind)
    selection, value = edit.hooked()
    assert selection.shapes.keys() <= {*neuron_shapes(model), *weight_sites(model)}
    with ablate(model, selection, value=value):
        assert close(logits_of(model), by_hooks)
    with at_dose(model, edit, 1.0):
        assert close(logits_of(model), by_hooks)
    if kind == "gates":
        for site, gate in some_gates(model).multipliers.items():
            assert torch.equal(edit.gates.multipliers[site], gate)


def test_a_change_is_of_one_expert_and_of_its_own_rows(family, model):
    """Neurons 3 of expert 2 and 0 of expert 5: two tensors, `d_model` numbers each, and these become 0."""
    units = torch.tensor([2 * D_EXPERT + 3, 5 * D_EXPERT])
    edit = create_edit(model, Selection({EACH: units}, {EACH: neuron_shapes(model)[EACH]}))
    assert [name.rpartition(".")[2] for name in edit.changes] == ["down_proj[2]", "down_proj[5]"]
    assert [change.expert for change in edit.changes.values()] == [2, 5]
    stored = model.blocks[1].mlp.original_component.experts.down_proj
    is_turned = family == "gpt_oss"
    for change, neuron in zip(edit.changes.values(), (3, 0), strict=True):
        assert change.shape == ((D_EXPERT, D_MODEL) if is_turned else (D_MODEL, D_EXPERT))
        assert change.is_transposed != is_turned and len(change) == D_MODEL and not change.new.any()
        own = stored[change.expert]
        assert torch.equal(change.old, own[neuron] if is_turned else own[:, neuron])


def test_gate_and_in_of_one_stack_have_names_of_their_own(model):
    edit, _ = made(model, "weights")
    names = [name for name in edit.changes if "gate_up_proj[3]" in name]
    assert {name.rpartition("]")[2] for name in names} == {".gate", ".in"}
    assert len(edit.changes) == len({(change.site, change.expert) for change in edit.changes.values()})


def test_own_matrices_are_views_of_what_is_shown_as_one_wide_matrix(model):
    for site in weight_sites(model):
        wide, own = weight(model, site), own_matrices(model, site)
        units = torch.randperm(wide.numel(), generator=torch.Generator().manual_seed(0))[:300].sort().values
        assert torch.equal(entries(model, site, units), wide.flatten()[units])
        experts = range(N_EXPERTS) if site.is_of_experts else [None]
        matrices = [own.of(expert) for expert in experts]
        assert torch.equal(torch.cat(matrices, 0 if site == site.neurons.out else 1), wide)
        for matrix in matrices:
            assert matrix.untyped_storage().data_ptr() == own.values.untyped_storage().data_ptr()


def test_no_stack_is_copied_for_an_edit_of_neurons(model, monkeypatch):
    as_matrix = RoutedExperts.as_matrix

    def watched(experts, part):
        def copied(stored):
            assert stored.is_meta, "a stack was copied"
            return as_matrix(experts, part)(stored)

        return copied

    monkeypatch.setattr(RoutedExperts, "as_matrix", watched)
    for edit in (create_edit(model, some_neurons(model)), create_gates_edit(model, some_gates(model))):
        apply_edit(model, edit)
        revert_edit(model, edit)


def test_weights_of_attention_and_of_experts_are_edited_together(model, family):
    if family == "deepseek_v3":
        pytest.skip("its attention has other matrices than q, k and v")
    selection = some_weights(model, modules="all")
    with ablate(model, selection):
        by_hooks = logits_of(model)
    edit = create_edit(model, selection)
    apply_edit(model, edit)
    assert close(logits_of(model), by_hooks)
    revert_edit(model, edit)


def test_means_of_experts_are_refused(model):
    texts = Behaviour("texts", (Example("hello", {"response": "world"}),))
    scores = importance(model, texts)
    selection = Selection({EACH: torch.tensor([3])}, {EACH: neuron_shapes(model)[EACH]})
    with pytest.raises(InputError, match="reach only the tokens that are sent to their expert"):
        create_edit(model, selection, value=Mean(scores))


def test_neurons_of_another_mixture_are_restored(model, family, tokenizer):
    other = load_model(mixture(family, len(tokenizer), seed=1), tokenizer=tokenizer)
    # What is added to neurons is not restored, so it must be the same.
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.data = mine.detach().clone() if mine.ndim < 2 or mine.shape == (N_EXPERTS, 2 * D_EXPERT) else theirs.data
    selection = some_neurons(model, n=5)
    before = parameters_of(model)
    with ablate(model, selection, value=Restore(other)):
        by_hooks = logits_of(model)
    edit = create_edit(model, selection, value=Restore(other))
    apply_edit(model, edit)
    assert close(logits_of(model), by_hooks)
    for site, units in selection.units.items():
        assert torch.equal(weight(model, site.out)[units], weight(other, site.out)[units])
    revert_edit(model, edit)
    assert are_same(before, model)


# --- in folders


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_folder_gives_plain_transformers_the_logits_of_the_hooks(model, folder, tmp_path, kind):
    edit, by_hooks = made(model, kind)
    base = contents(folder)
    apply_edit_to_checkpoint(folder, edit, tmp_path / "edited")
    assert close(plain_logits(tmp_path / "edited"), by_hooks)
    assert (checkpoint_state(folder, edit), checkpoint_state(tmp_path / "edited", edit)) == ("base", "edited")
    revert_edit_in_checkpoint(tmp_path / "edited", edit, tmp_path / "again")
    assert contents(tmp_path / "again") == base == contents(folder)
    with pytest.raises(InputError, match="holds this edit already"):
        apply_edit_to_checkpoint(tmp_path / "edited", edit, tmp_path / "twice")


def test_nothing_but_the_chosen_numbers_changes_in_a_folder(model, folder, tmp_path):
    edit, _ = made(model, "weights")
    apply_edit_to_checkpoint(folder, edit, tmp_path / "edited")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "edited" / "model.safetensors")
    n_changed = sum(int((before[name] != after[name]).sum()) for name in before)
    assert n_changed == len(edit) == sum(len(units) for units in some_weights(model).units.values())


def turned(tensors):
    """The same checkpoint with stacks as their transposes, as some multimodal mixtures store them."""
    return {name: tensor.mT.contiguous() if tensor.ndim == 3 else tensor for name, tensor in tensors.items()}


def rewritten(folder, out, change):
    """A copy of a folder with other tensors in its file."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    return out


def test_stacks_and_single_experts_take_the_same_edit(model, folder, tmp_path):
    """`save_pretrained` writes experts as the family does, or as they are in memory; an edit fits both."""
    edit, by_hooks = made(model, "weights")
    stacks = tmp_path / "stacks"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(stacks, save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in load_file(stacks / "model.safetensors").values())
    # As they are in memory, and as their transposes, which this loader does not read: they are turned back for it.
    apply_edit_to_checkpoint(stacks, edit, tmp_path / "edited")
    assert close(plain_logits(tmp_path / "edited"), by_hooks)
    other_way = rewritten(stacks, tmp_path / "other way", turned)
    apply_edit_to_checkpoint(other_way, edit, tmp_path / "other way edited")
    back = rewritten(tmp_path / "other way edited", tmp_path / "back", turned)
    assert contents(back) == contents(tmp_path / "edited")
    for form, edited in ((stacks, "edited"), (other_way, "other way edited")):
        revert_edit_in_checkpoint(tmp_path / edited, edit, tmp_path / f"{edited} again")
        assert contents(tmp_path / f"{edited} again") == contents(form)


def test_experts_in_many_files_are_found(model, folder, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    edit, by_hooks = made(model, "gates")
    apply_edit_to_checkpoint(tmp_path / "sharded", edit, tmp_path / "edited")
    assert close(plain_logits(tmp_path / "edited"), by_hooks)


@pytest.fixture(scope="module")
def half(family, tokenizer, tmp_path_factory):
    """A folder in bfloat16. Its experts have 16 neurons: plain transformers needs a multiple of 8 there."""
    config = config_of(family, len(tokenizer))
    name = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    setattr(config, name, 16)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    folder = tmp_path_factory.mktemp("half") / family
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_edit_of_the_model_in_float32_fits_a_checkpoint_in_bfloat16(half, tmp_path):
    wide, narrow = (load_model(half, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    base, before = contents(half), parameters_of(narrow)
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    for kind in KINDS:
        edit, by_hooks = made(wide, kind)
        apply_edit_to_checkpoint(half, edit, tmp_path / kind)
        revert_edit_in_checkpoint(tmp_path / kind, edit, tmp_path / f"{kind} again")
        assert contents(tmp_path / f"{kind} again") == base
        # The products of gates, and halves of weights, are rounded where they are stored.
        assert close(plain_logits(tmp_path / kind), by_hooks, 1e-6 if kind == "neurons" else 3e-2)
        apply_edit(narrow, edit)
        edited = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype="bfloat16").parameters()
        assert are_same(list(edited), narrow.original_model)
        revert_edit(narrow, edit)
        assert are_same(before, narrow)


def test_an_export_has_the_logits_of_the_hooks(model, tmp_path):
    before = parameters_of(model)
    edit, by_hooks = made(model, "weights")
    check = export(model, edit, tmp_path / "exported", n_new_tokens=2)
    assert check["largest_difference"] <= 1e-6 * check["largest_logit"]
    assert close(plain_logits(tmp_path / "exported"), by_hooks)
    assert checkpoint_state(tmp_path / "exported", edit) == "edited"
    assert are_same(before, model)


# --- refused


def test_other_bases_are_refused_and_nothing_is_written(model, family, folder, tokenizer, tmp_path):
    mixture(family, len(tokenizer), seed=1).save_pretrained(tmp_path / "other")
    other = load_model(folder, device="cpu")
    with torch.no_grad():
        other.blocks[1].mlp.original_component.experts.down_proj[1, 0, 0] += 1e-3
    before = parameters_of(other)
    for kind in KINDS:
        edit, _ = made(model, kind)
        with pytest.raises(InputError, match="neither the base of this edit nor its result"):
            apply_edit_to_checkpoint(tmp_path / "other", edit, tmp_path / "edited")
        with pytest.raises(InputError, match="neither the base of this edit nor its result"):
            apply_edit(other, edit)
        assert are_same(before, other) and not (tmp_path / "edited").exists()


def test_one_other_expert_is_told(qwen3, tmp_path):
    """The edit changes experts 2 and 5 of layer 1. A folder whose expert 5 is another is refused; expert 4 may be."""
    model = load_model(qwen3, device="cpu")
    units = torch.tensor([2 * D_EXPERT + 3, 5 * D_EXPERT])
    edit = create_edit(model, Selection({EACH: units}, {EACH: neuron_shapes(model)[EACH]}))

    def other(expert):
        def change(tensors):
            tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"][1, 1] += 1
            return tensors

        return change

    assert checkpoint_state(rewritten(qwen3, tmp_path / "4", other(4)), edit) == "base"
    states = tensor_states(rewritten(qwen3, tmp_path / "5", other(5)), edit)
    assert list(states.values()) == ["base", "other"]


def test_models_without_these_experts_are_refused(qwen3, tokenizer, tmp_path, llama):
    edit, _ = made(load_model(qwen3, device="cpu"), "neurons")
    with pytest.raises(InputError, match="keeps no separate matrix 'out' in layer 0"):
        apply_edit(load_model(mixture("olmoe", len(tokenizer)), tokenizer=tokenizer), edit)
    experts_only = dataclasses.replace(edit, changes={n: c for n, c in edit.changes.items() if c.expert is not None})
    with pytest.raises(InputError, match="has no routed experts"):
        apply_edit(llama, experts_only)
    config = config_of("qwen3_moe", len(tokenizer))
    config.num_experts = 4
    torch.manual_seed(0)
    fewer = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(InputError, match=r"has 4 routed experts, and no L\d\.experts\.out:8"):
        apply_edit(load_model(fewer, tokenizer=tokenizer), experts_only)
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(InputError, match=r"has no tensor .*experts.down_proj\[\d\]|neither the base"):
        apply_edit_to_checkpoint(tmp_path / "fewer", experts_only, tmp_path / "edited")


def test_an_expert_that_is_stored_twice_is_refused(qwen3, tmp_path):
    edit, _ = made(load_model(qwen3, device="cpu"), "gates")

    def doubled(tensors):
        name = "model.layers.1.mlp.experts.{}.down_proj.weight"
        stacked = torch.stack([tensors[name.format(expert)] for expert in range(N_EXPERTS)])
        return {**tensors, "model.layers.1.mlp.experts.down_proj": stacked}

    with pytest.raises(InputError, match=r"twice, as .*experts.0.down_proj.weight and as .*experts.down_proj\[0\]"):
        checkpoint_state(rewritten(qwen3, tmp_path / "twice", doubled), edit)


def test_experts_in_a_format_that_edits_are_not_written_into_are_named(qwen3, tmp_path):
    edit, _ = made(load_model(qwen3, device="cpu"), "neurons")

    def in_8_bits(tensors):
        of_experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        return {**tensors, **{name: tensor.to(torch.float8_e4m3fn) for name, tensor in of_experts.items()}}

    with pytest.raises(InputError, match=r"experts\.\d\.down_proj\.weight holds F8_E4M3"):
        checkpoint_state(rewritten(qwen3, tmp_path / "8 bits", in_8_bits), edit)


# --- places


def test_a_place_is_the_experts_own_tensor_or_its_part_of_the_stack(gpt_oss, qwen3):
    edit, _ = made(load_model(gpt_oss, device="cpu"), "weights")
    for name, place in places_of(gpt_oss, edit).items():
        expert = edit.changes[name].expert
        if expert is not None:
            halves = {"experts.gate": slice(0, None, 2), "experts.in": slice(1, None, 2)}
            half = halves.get(edit.changes[name].site.part)
            assert place.index == ((expert,) if half is None else (expert, slice(None), half))
            assert place.name == name.partition("[")[0] and not place.is_turned
    edit, _ = made(load_model(qwen3, device="cpu"), "weights")
    for name, place in places_of(qwen3, edit).items():
        change = edit.changes[name]
        part = {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}[change.site.part.removeprefix("experts.")]
        of_expert = f"experts.{change.expert}." if change.expert is not None else ""
        assert place.name == f"model.layers.{change.site.layer}.mlp.{of_expert}{part}.weight"
        assert place.index == () and not place.is_turned


# --- edit files


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_survives_its_file(gpt_oss, tmp_path, kind):
    model = load_model(gpt_oss, device="cpu")
    edit, _ = made(model, kind)
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.digest == edit.digest and again.facts == edit.facts and again.changes.keys() == edit.changes.keys()
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "edit.safetensors").read_bytes()
    apply_edit(model, again)
    revert_edit(model, again)


def test_files_of_dense_models_say_nothing_of_experts(llama, tmp_path):
    selection = drawn(neuron_shapes(llama), 3, 0)
    for edit in (create_edit(llama, selection), create_gates_edit(llama, some_gates(llama))):
        edit.save(tmp_path / "edit.safetensors")
        assert b"expert" not in (tmp_path / "edit.safetensors").read_bytes()


def test_bad_content_is_refused_though_its_digest_fits(qwen3, tmp_path):
    model = load_model(qwen3, device="cpu")
    dense = Site(0, "out")
    for kind in KINDS:
        edit, _ = made(model, kind)
        name = next(name for name in edit.changes if name.endswith("down_proj[3]"))
        other = next(other for other in edit.changes if other.endswith("down_proj[4]"))
        change = edit.changes[name]
        bad = [{"expert": wrong} for wrong in (-1, N_EXPERTS, None, 4)]
        bad += [{"site": site} for site in (dense, EACH, Site(1, "experts.out", 3), Site(1, "shared.out"))]
        bad += [{"shape": change.shape[::-1]}, {"is_transposed": not change.is_transposed}]
        for facts in bad:
            changed = {**edit.changes, name: dataclasses.replace(change, **facts)}
            dataclasses.replace(edit, changes=changed).save(tmp_path / "edit")
            with pytest.raises(InputError, match="is damaged"):
                load_edit(tmp_path / "edit")
        assert edit.changes[other].expert == 4
        alone = {name: dataclasses.replace(change, expert=4)}
        dataclasses.replace(edit, changes=alone).save(tmp_path / "edit")
        with pytest.raises(InputError, match="neither the base"):
            apply_edit(model, load_edit(tmp_path / "edit"))


def test_edits_of_one_base_stack_and_conflicts_are_refused(qwen3):
    model = load_model(qwen3, device="cpu")
    width = (N_EXPERTS * D_EXPERT,)
    neurons = torch.arange(N_EXPERTS * D_EXPERT)
    first, second = (Selection({EACH: neurons[neurons % 3 == rest]}, {EACH: width}) for rest in (0, 1))
    both = stack(create_edit(model, first), create_edit(model, second))
    with ablate(model, first | second):
        by_hooks = logits_of(model)
    before = parameters_of(model)
    apply_edit(model, both)
    assert close(logits_of(model), by_hooks)
    revert_edit(model, both)
    assert are_same(before, model) and len(both.changes) == N_EXPERTS
    with pytest.raises(InputError, match=r"numbers of .*down_proj\[0\] to different values"):
        stack(create_edit(model, first), create_edit(model, first, value=Scale(2.0)))
    counts = compare(create_edit(model, first), both)
    assert sum(by_kind["alike"] for by_kind in counts.values()) == len(create_edit(model, first))
    multipliers = 1 + torch.rand(N_EXPERTS * D_EXPERT, generator=torch.Generator().manual_seed(0))
    gates = [Gates({EACH: torch.where(neurons % 3 == rest, multipliers, 1.0)}) for rest in (0, 1)]
    stacked = stack(*[create_gates_edit(model, gate) for gate in gates])
    with gated(model, gates[0]), gated(model, gates[1]):
        by_hooks = logits_of(model)
    apply_edit(model, stacked)
    assert close(logits_of(model), by_hooks)
    revert_edit(model, stacked)
    assert are_same(before, model)


# --- the command


def test_the_command_edits_a_mixture_and_takes_it_back(qwen3, tmp_path, capsys):
    model = load_model(qwen3, device="cpu")
    selection, gates = some_neurons(model), some_gates(model)
    selection.save(tmp_path / "units.safetensors")
    gates.save(tmp_path / "gates.safetensors")
    for units, ablation in (("units", ablate(model, selection)), ("gates", gated(model, gates))):
        with ablation:
            by_hooks = logits_of(model)
        edit = str(tmp_path / f"{units} edit.safetensors")
        options = ["--model", str(qwen3), "--device", "cpu"]
        assert not main(["edit", "create", str(tmp_path / f"{units}.safetensors"), "--out", edit, *options])
        capsys.readouterr()
        assert not main(["edit", "show", edit])
        assert (
            f"{len(selection if units == 'units' else gates.selection)} neurons of Qwen3Moe" in capsys.readouterr().out
        )
        edited = str(tmp_path / f"{units} edited")
        assert not main(["edit", "apply", edit, str(qwen3), "--out", edited])
        assert close(plain_logits(edited), by_hooks)
        capsys.readouterr()
        assert not main(["--json", "edit", "verify", edit, edited])
        assert json.loads(capsys.readouterr().out)["state"] == "edited"
        assert not main(["edit", "revert", edit, edited, "--out", str(tmp_path / f"{units} again")])
        assert contents(tmp_path / f"{units} again") == contents(qwen3)
        assert not main(["edit", "diff", edit, edit])
        assert "down_proj[3]" in capsys.readouterr().out
        assert not main(["edit", "export", edit, "--out", str(tmp_path / f"{units} exported"), *options])
        assert close(plain_logits(tmp_path / f"{units} exported"), by_hooks)
