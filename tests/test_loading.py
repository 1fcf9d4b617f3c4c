"""The model that is measured is the model on disk: what is not is refused in one line, before any work."""

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, MinistralConfig

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    ModelConfig,
    ScoringConfig,
    Selection,
    Site,
    create_edit,
    generate,
    importance,
    load_model,
)
from dean_interp.cli.edits import EditedModel
from dean_interp.models.load import model_fingerprint

pytestmark = [
    pytest.mark.hooks,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # of peft
]
RAW = ScoringConfig(template="raw")


@pytest.fixture
def behaviour():
    return Behaviour("first", (Example("one", {"safe": "yes", "unsafe": "no"}),))


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of the grouped-query Llama's folder, to be spoilt."""
    shutil.copytree(checkpoints["llama-gqa"], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints["llama-gqa"])


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def saved_adapter(plain, folder, **settings):
    """A folder with an adapter that changes something, and the base with it merged."""
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 16, "target_modules": ["down_proj", "q_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**(options | settings)))
    adapted.save_pretrained(folder)
    return adapted


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_tensor_is_named(folder):
    rewritten(folder, lambda tensors: tensors.pop("model.layers.2.input_layernorm.weight"))
    with pytest.raises(InputError, match=r"1 tensor is missing \(model\.layers\.2\.input_layernorm\.weight\)") as error:
        load_model(folder, device="cpu")
    one_line(error)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.down_proj.weight_scale", "model.layers.3.x"]
)
def test_a_tensor_that_the_model_would_leave_out_is_named(folder, name):
    rewritten(folder, lambda tensors: tensors.update({name: torch.ones(24)}))
    with pytest.raises(InputError, match=rf"1 tensor is unknown to it \({name}\)"):
        load_model(folder, device="cpu")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(7, 24)}))
    with pytest.raises(InputError, match=r"lm_head\.weight: \(7, 24\) on disk, \(260, 24\) in the model"):
        load_model(folder, device="cpu")


def test_a_checkpoint_of_the_trunk_alone_has_no_head_to_measure(folder, plain):
    plain.model.save_pretrained(folder)
    plain.config.architectures = ["LlamaForCausalLM"]
    plain.config.save_pretrained(folder)
    with pytest.raises(InputError, match=r"1 tensor is missing \(lm_head\.weight\)"):
        load_model(folder, device="cpu")


def test_what_lies_beside_the_text_model_may_be_left_out(folder, checkpoints):
    beside = ["mtp.layers.0.fc.weight", "visual.blocks.0.attn.bias", "model.vision_tower.x", "v_head.summary.weight",
              "score.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]  # fmt: skip
    rewritten(folder, lambda tensors: tensors.update({name: torch.ones(2) for name in beside}))
    loaded = load_model(folder, device="cpu")
    assert model_fingerprint(loaded) == model_fingerprint(load_model(checkpoints["llama-gqa"], device="cpu"))


def test_layers_that_predict_further_tokens_may_be_left_out_where_the_configuration_says_so(folder):
    rewritten(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(2)}))
    with pytest.raises(InputError, match="unknown to it"):
        load_model(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load_model(folder, device="cpu")


def test_a_tied_head_need_not_be_on_disk_and_an_old_mask_may_be(checkpoints, tmp_path):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "gpt2")
    rewritten(tmp_path / "gpt2", lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    assert "lm_head.weight" not in load_file(tmp_path / "gpt2" / "model.safetensors")
    load_model(tmp_path / "gpt2", device="cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_told_from_the_file(folder, file):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=rf"{file} is a pointer in place of the file.*git lfs pull"):
        load_model(folder, device="cpu")


def test_a_gguf_file_that_is_none_or_is_cut_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path / "cache"))
    pointer, cut = b"version https://git-lfs.github.com/spec/v1\n", b"GGUF\x03\0\0\0" + b"\x05\0\0\0\0\0\0\0" * 2
    for content, said in (
        (pointer, "a pointer in place of the file"),
        (cut, "cannot load the model"),
        (b"", "cannot load the model"),
    ):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(InputError, match=said) as error:
            load_model(tmp_path / "m.gguf")
        one_line(error)


def test_a_folder_without_a_model_says_what_it_lacks(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty' holds no model, since it has no config\.json"):
        load_model(tmp_path / "empty")
    folder.rename(tmp_path / "empty" / "checkpoint-500")
    with pytest.raises(InputError, match="it holds checkpoint-500: name one of them"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "checkpoint-500" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot load the model .*model\.safetensors") as error:
        load_model(tmp_path / "empty" / "checkpoint-500")
    one_line(error)


def test_an_adapter_is_merged_where_it_is_asked_for(checkpoints, plain, tmp_path):
    merged = saved_adapter(plain, tmp_path / "adapter").merge_and_unload()
    model = load_model(checkpoints["llama-gqa"], adapter=tmp_path / "adapter", device="cpu")
    tokens = torch.arange(4, 30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), merged(tokens).logits, atol=1e-4, rtol=1e-4)
        assert (model(tokens) - plain(tokens).logits).abs().max() > 0.01
    assert "adapter" in model.cfg.model_name
    assert model_fingerprint(model) != model_fingerprint(load_model(checkpoints["llama-gqa"], device="cpu"))
    by_settings = ModelConfig(str(checkpoints["llama-gqa"]), adapter=str(tmp_path / "adapter"), device="cpu").load()
    of_edits = EditedModel(str(checkpoints["llama-gqa"]), adapter=str(tmp_path / "adapter"), device="cpu").load()
    assert model_fingerprint(by_settings) == model_fingerprint(of_edits) == model_fingerprint(model)


def test_an_adapter_that_is_not_merged_is_refused_with_what_to_do(checkpoints, plain, tokenizer, tmp_path):
    adapted = saved_adapter(plain, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter .* with adapter="):
        load_model(tmp_path / "adapter")
    with pytest.raises(InputError, match="merge_and_unload"):
        load_model(adapted, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"not merged .*merge_and_unload.*adapter="):
        load_model(adapted.base_model.model, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"no adapter: it has no adapter_config\.json"):
        load_model(checkpoints["llama-gqa"], adapter=checkpoints["gpt2"], device="cpu")


def test_an_adapter_of_another_model_or_of_no_weights_is_refused(checkpoints, plain, tmp_path):
    saved_adapter(plain, tmp_path / "adapter")
    with pytest.raises(InputError, match="does not fit"):
        load_model(checkpoints["gpt2"], adapter=tmp_path / "adapter", device="cpu")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 of its tensors are missing"):
        load_model(checkpoints["llama-gqa"], adapter=tmp_path / "adapter", device="cpu")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(plain, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match=r"PROMPT_TUNING, .* cannot be merged"):
        load_model(checkpoints["llama-gqa"], adapter=tmp_path / "prompt", device="cpu")


class _Scaled(nn.Linear):
    """What somebody's own package puts in place of a linear map."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _own_class(mlp):
    mlp.down_proj.__class__ = _Scaled


def _own_forward(mlp):
    mlp.down_proj.forward = lambda input: nn.functional.linear(input, 2 * mlp.down_proj.weight)


def _quantised(mlp):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(mlp, Int8WeightOnlyConfig())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda mlp: parametrizations.weight_norm(mlp.down_proj), "is parametrised"),
        (lambda mlp: prune.random_unstructured(mlp.down_proj, "weight", amount=0.5), "computes its weight from"),
        (lambda mlp: mlp.down_proj.compile(), "is compiled"),
        (_own_class, "_Scaled"),
        (_own_forward, "a forward of its own"),
        (_quantised, r"holds a \w*Tensor"),
    ],
)
def test_layers_that_are_not_plain_are_neither_scored_nor_edited(plain, tokenizer, behaviour, spoil, said):
    spoil(plain.model.layers[1].mlp)
    model = load_model(plain, tokenizer=tokenizer)
    for unit in ("neuron", "weight"):
        with pytest.raises(InputError, match=said):
            importance(model, behaviour, unit=unit, config=RAW)
    selection = Selection({Site(1, "out"): torch.tensor([3])}, {Site(1, "out"): (40, 24)})
    with pytest.raises(InputError, match=said):
        create_edit(model, selection)


def test_what_wraps_a_model_is_named_with_what_to_give_instead(plain, tokenizer):
    with pytest.raises(InputError, match=r"a DataParallel wraps another model: give that one, its \.module"):
        load_model(nn.DataParallel(plain), tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"OptimizedModule wraps .* its \._orig_mod"):
        load_model(torch.compile(plain), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_that_predicts_no_token_is_refused_whatever_its_configuration_says(plain, tokenizer, kind):
    headless = kind.from_config(plain.config)
    headless.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(InputError, match="predicts no next token"):
        load_model(headless, tokenizer=tokenizer)


def test_a_model_without_weights_computes_nothing(checkpoints, behaviour):
    model = load_model(checkpoints["llama-gqa"], device="meta")
    with pytest.raises(InputError, match="on the device 'meta'"):
        importance(model, behaviour, config=RAW)
    with pytest.raises(InputError, match="on the device 'meta'"):
        generate(model, ["hello"])
    with pytest.raises(InputError, match="on the device 'meta'"):
        model_fingerprint(model)


def test_a_model_that_transformer_lens_does_not_know_is_refused_before_its_weights_are_read(folder):
    config = MinistralConfig(architectures=["MinistralForCausalLM"])
    config.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"is a MinistralForCausalLM, which TransformerLens \S+ does not know"):
        load_model(folder, device="cpu")


def test_a_tokenizer_with_tokens_that_have_no_embedding_is_refused_where_texts_need_them(plain, tokenizer, behaviour):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<image>"], special_tokens=True)
    # a token that no text need hold is no fault of the model, until a text holds it
    model = load_model(plain, tokenizer=larger)
    importance(model, behaviour, config=RAW)
    with pytest.raises(InputError, match=r"a text holds the token number 260, and .* has 260"):
        generate(model, ["what is on <image>?"])
    larger.chat_template = "{% for m in messages %}<image>{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"the tokenizer has tokens that .* \('<image>' is number 260"):
        load_model(plain, tokenizer=larger)
