"""The files that are edited are the files that are loaded, whatever else lies in a checkpoint folder."""

import json
import logging
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from units import IDS, logits_of, plain_logits, some_neurons, some_weights

from dean_interp import InputError, ablate, load_model
from dean_interp.editing.apply import create_edit
from dean_interp.editing.checkpoint import apply_edit_to_checkpoint, checkpoint_state, revert_edit_in_checkpoint
from dean_interp.editing.checkpoint_files import weight_files

WEIGHTS = "model.safetensors"


def edit_and_expected(folder):
    model = load_model(folder, device="cpu")
    with ablate(model, some_neurons(model)):
        return create_edit(model, some_neurons(model)), logits_of(model)


def renamed(folder, rename):
    """Other names for the tensors of a folder's one file."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of the grouped-query Llama's folder, for tests to change."""
    return shutil.copytree(checkpoints["llama-gqa"], tmp_path / "base")


@pytest.fixture
def stale(folder):
    """A folder with the checkpoint in one file, and shards of another model beside it, with an index."""
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder))
    other.save_pretrained(folder / "shards", max_shard_size="20KB")
    for file in (folder / "shards").glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "shards")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


# Which file


def test_one_file_wins_over_shards_beside_it_in_the_edit_as_in_transformers(stale, tmp_path, caplog):
    edit, expected = edit_and_expected(stale)
    apply_edit_to_checkpoint(stale, edit, tmp_path / "out")
    torch.testing.assert_close(plain_logits(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    assert [file.name for file in (tmp_path / "out").glob("model*")] == [WEIGHTS]
    assert "model.safetensors.index.json" in caplog.text and "model-00001-of-" in caplog.text
    revert_edit_in_checkpoint(tmp_path / "out", edit, tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (stale / WEIGHTS).read_bytes()


def test_the_state_of_a_folder_is_that_of_the_file_that_is_loaded(stale, tmp_path):
    edit, _ = edit_and_expected(stale)
    apply_edit_to_checkpoint(stale, edit, tmp_path / "out")
    shutil.copy(stale / WEIGHTS, tmp_path / "unedited")
    assert checkpoint_state(stale, edit) == "base"
    shutil.copy(tmp_path / "out" / WEIGHTS, stale)
    assert checkpoint_state(stale, edit) == "edited"
    (stale / WEIGHTS).unlink()
    assert checkpoint_state(stale, edit) == "other"


def test_weights_that_the_configuration_names_are_the_ones_that_are_edited(folder, tmp_path):
    edit, expected = edit_and_expected(folder)
    (folder / WEIGHTS).rename(folder / "mine.safetensors")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder)
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "mine.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    torch.testing.assert_close(plain_logits(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    assert not (tmp_path / "out" / WEIGHTS).exists()
    for name in ("../base/mine.safetensors", "/etc/passwd", "mine.bin", "gone.safetensors"):
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(InputError):
            weight_files(folder)


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "flax_model.msgpack",
        "tf_model.h5",
        "model-q4.GGUF",
        "last.ckpt",
        "pytorch_model.bin.index.json",
        "model.safetensors.bak",
        "rust_model.ot",
        ".git/lfs/objects/ab/cd/abcd",
    ],
)
def test_weights_that_are_not_loaded_are_left_out_by_name(folder, tmp_path, caplog, name):
    edit, _ = edit_and_expected(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"the model as it was")
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists() and name in caplog.text


def test_what_holds_no_weights_comes_along_without_a_word(folder, tmp_path, caplog):
    edit, _ = edit_and_expected(folder)
    names = ["README.pt.md", "tokenizer.model", "original/params.json", ".gitattributes", "preprocessor_config.json"]
    (folder / "original").mkdir()
    for name in names:
        (folder / name).write_text("kept")
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == "kept" for name in names)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_links_as_in_the_cache_of_the_hub_become_files(folder, tmp_path):
    edit, expected = edit_and_expected(folder)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(f"../blobs/{i}")
    before = [blob.read_bytes() for blob in sorted((tmp_path / "blobs").iterdir())]
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    torch.testing.assert_close(plain_logits(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    assert [blob.read_bytes() for blob in sorted((tmp_path / "blobs").iterdir())] == before


def test_a_folder_that_is_a_link_comes_along_as_a_folder_of_files(folder, tmp_path, caplog):
    edit, _ = edit_and_expected(folder)
    for name in ("elsewhere/deep/params.json", "elsewhere/old.bin", "blobs/one"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "elsewhere" / "linked.txt").symlink_to(tmp_path / "blobs" / "one")
    (folder / "original").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    made = tmp_path / "out" / "original"
    assert (made / "deep" / "params.json").read_text() == "elsewhere/deep/params.json"
    assert (made / "linked.txt").read_text() == "blobs/one"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not (made / "old.bin").exists() and "original/old.bin" in caplog.text
    revert_edit_in_checkpoint(tmp_path / "out", edit, tmp_path / "back")
    assert (tmp_path / "back" / "original" / "deep" / "params.json").is_file()


def test_a_link_that_leads_back_to_a_folder_around_it_is_passed_over(folder, tmp_path):
    edit, _ = edit_and_expected(folder)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("kept")
    (folder / "original" / "back").symlink_to(folder, target_is_directory=True)
    (folder / "itself").symlink_to(".", target_is_directory=True)
    names = {path.name for path in folder.iterdir()}
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names - {"itself"}
    assert [path.name for path in (tmp_path / "out" / "original").iterdir()] == ["params.json"]


# What is refused


def test_a_folder_without_safetensors_says_what_to_do(folder, tmp_path):
    edit, _ = edit_and_expected(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"but pytorch_model\.bin: .*edit export"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "out")


def test_an_index_that_names_what_is_not_there_is_refused(folder, tmp_path):
    edit, _ = edit_and_expected(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(tensors, folder / first, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, first)}
    changed = next(iter(edit.changes))

    def refused(content, message):
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            apply_edit_to_checkpoint(folder, edit, tmp_path / "out")

    lost = {"weight_map": index["weight_map"] | {"lm_head.weight": second}}
    refused(lost, f"has no '{second}', which model.safetensors.index.json names")
    save_file({"other": torch.zeros(1)}, folder / second, {"format": "pt"})
    refused({"weight_map": index["weight_map"] | {changed: second}}, f"says that {changed} is in {second}")
    save_file({changed: tensors[changed]}, folder / second, {"format": "pt"})
    refused(lost, f"holds {changed} twice, in {first} and in {second}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_numbers_that_an_edit_would_round_are_refused_by_name(folder, tmp_path, dtype):
    edit, _ = edit_and_expected(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"down_proj\.weight holds F(64|8_E4M3) in .*F32, F16, BF16"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "out")


def test_shards_that_ranks_saved_are_refused(folder, tmp_path):
    """`transformers` reads them in place of everything else."""
    edit, _ = edit_and_expected(folder)
    shutil.copy(folder / WEIGHTS, folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="shards of single ranks"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "out")


# Other names


def wrapped_llava(n_vocab):
    text = hf.LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, vocab_size=n_vocab, bos_token_id=0, eos_token_id=1)  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision)).eval()


def test_a_tensor_that_the_loader_renames_is_found(tokenizer, tmp_path):
    """The vision tower has layers of the same numbers and shapes."""
    torch.manual_seed(0)
    wrapped_llava(len(tokenizer)).save_pretrained(tmp_path / "base")
    plain = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = load_model(plain, tokenizer=tokenizer)
    edit = create_edit(model, some_weights(model))
    assert not edit.changes.keys() & load_file(tmp_path / "base" / WEIGHTS).keys()
    apply_edit_to_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    with ablate(model, some_weights(model)):
        expected = logits_of(model)
    edited = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    torch.testing.assert_close(edited(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
    revert_edit_in_checkpoint(tmp_path / "out", edit, tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "base" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: name.replace(".mlp.", ".feed_forward.").replace("_proj", ""),
    ],
    ids=["without the name of the body", "other names within a layer"],
)
def test_a_tensor_of_another_name_is_known_by_what_it_holds(folder, tmp_path, rename):
    edit, _ = edit_and_expected(folder)
    renamed(folder, rename)
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    assert checkpoint_state(tmp_path / "out", edit) == "edited"
    changed = {rename(name) for name in edit.changes}
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed


def test_a_tensor_that_is_there_under_two_names_is_refused(folder, tmp_path):
    edit, _ = edit_and_expected(folder)
    tensors = load_file(folder / WEIGHTS)
    copies = {name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | copies, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="which of them is loaded is not sure"):
        apply_edit_to_checkpoint(folder, edit, tmp_path / "out")


def test_of_two_tensors_of_one_name_the_one_with_the_edits_base_is_edited(folder, tmp_path):
    edit, _ = edit_and_expected(folder)
    tensors = load_file(folder / WEIGHTS)
    others = {name.replace("model.", "vision."): tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors | others, folder / WEIGHTS, {"format": "pt"})
    apply_edit_to_checkpoint(folder, edit, tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(others[name], after[name]) for name in others if name not in tensors)
    assert checkpoint_state(tmp_path / "out", edit) == "edited"
