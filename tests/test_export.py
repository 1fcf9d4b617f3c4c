"""What is exported, or saved after `load_model`, is the model that `transformers` knows, on every architecture."""

import json
import subprocess

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from units import logits_of, plain_logits, some_neurons, some_weights

from dean_interp import InputError, ablate, load_model
from dean_interp.editing.apply import apply_edit, create_edit, revert_edit
from dean_interp.editing.checkpoint import checkpoint_state, export
from dean_interp.models.matrices import weight
from dean_interp.models.sites import Site

_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
BUILT = {
    "falcon (a key each head)": lambda n: hf.FalconForCausalLM(
        hf.FalconConfig(**_SIZES, vocab_size=n, multi_query=False)
    ),
    "gpt-neox": lambda n: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES, intermediate_size=40, vocab_size=n)),
    "bloom": lambda n: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=24, n_layer=2, n_head=4, vocab_size=n)),
    "phi-3": lambda n: hf.Phi3ForCausalLM(
        hf.Phi3Config(**_SIZES, intermediate_size=40, num_key_value_heads=2, vocab_size=n, pad_token_id=0)
    ),
    "gpt-bigcode": lambda n: hf.GPTBigCodeForCausalLM(
        hf.GPTBigCodeConfig(n_embd=24, n_inner=40, n_layer=2, n_head=4, vocab_size=n)
    ),
    "glm": lambda n: hf.GlmForCausalLM(
        hf.GlmConfig(**_SIZES, intermediate_size=40, num_key_value_heads=2, head_dim=8, vocab_size=n, pad_token_id=0)
    ),
    "gemma, tied": lambda n: hf.GemmaForCausalLM(
        hf.GemmaConfig(**_SIZES, intermediate_size=40, num_key_value_heads=2, head_dim=6, vocab_size=n)
    ),
}


def built(name, tokenizer):
    torch.manual_seed(0)
    plain = BUILT[name](len(tokenizer)).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    plain.config.architectures = [type(plain).__name__]
    plain.set_attn_implementation("eager")
    return plain


@pytest.mark.parametrize("name", BUILT)
def test_an_export_has_the_hooked_logits_and_the_names_of_a_plain_one(name, tokenizer, tmp_path):
    plain = built(name, tokenizer)
    plain.save_pretrained(tmp_path / "plain")
    model = load_model(plain, tokenizer=tokenizer)
    selection = some_neurons(model)
    edit = create_edit(model, selection)
    export(model, edit, tmp_path / "out", n_new_tokens=2)
    with ablate(model, selection):
        torch.testing.assert_close(plain_logits(tmp_path / "out"), logits_of(model), atol=1e-5, rtol=1e-4)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "out"))
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == edit.changes.keys()
    assert checkpoint_state(tmp_path / "plain", edit) == "base"


@pytest.mark.parametrize("name", BUILT)
def test_a_model_in_memory_can_be_saved_after_it_was_wrapped(name, tokenizer, tmp_path):
    plain = built(name, tokenizer)
    plain.save_pretrained(tmp_path / "before", max_shard_size="20KB")
    model = load_model(plain, tokenizer=tokenizer)
    plain.save_pretrained(tmp_path / "after", max_shard_size="20KB")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes(), file.name
    edit = create_edit(model, some_neurons(model))
    apply_edit(model, edit)
    plain.save_pretrained(tmp_path / "edited")
    assert checkpoint_state(tmp_path / "edited", edit) == "edited"
    revert_edit(model, edit)


def test_a_part_of_a_joint_tensor_that_was_changed_is_not_lost_without_a_word(tokenizer, tmp_path):
    plain = built("gpt-neox", tokenizer)
    model = load_model(plain, tokenizer=tokenizer)
    with torch.no_grad():
        weight(model, Site(1, "q")).add_(0.1)
    with pytest.raises(InputError, match="split off a joint tensor of the checkpoint were changed"):
        plain.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("name", "modules", "part"), [("phi-3", "mlp", "gate"), ("gpt-neox", "all", "q")])
def test_no_edit_is_made_of_a_part_of_a_joint_tensor(name, modules, part, tokenizer):
    model = load_model(built(name, tokenizer), tokenizer=tokenizer)
    with pytest.raises(InputError, match=f"keeps '{part}' of layer 0 in one tensor with other matrices"):
        create_edit(model, some_weights(model, modules=modules))


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"temperature": 0.6, "top_k": 7}, {"num_beams": 1, "length_penalty": 2.0}]
)
def test_generation_settings_that_transformers_reads_and_does_not_write_are_exported(settings, tokenizer, tmp_path):
    plain = built("gemma, tied", tokenizer)
    for name, value in settings.items():
        setattr(plain.generation_config, name, value)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        plain.generation_config.save_pretrained(tmp_path / "no")
    model = load_model(plain, tokenizer=tokenizer)
    export(model, create_edit(model, some_neurons(model)), tmp_path / "out", n_new_tokens=2)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.items() <= written.items()
    again = hf.GenerationConfig.from_pretrained(tmp_path / "out")
    assert again.to_diff_dict() == plain.generation_config.to_diff_dict()


def test_a_multimodal_model_is_wrapped_without_installing_anything(tokenizer, tmp_path, monkeypatch):
    """TransformerLens runs pip where the processor of images cannot be loaded."""
    text = {**_SIZES, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=259,
                             boi_token_index=258, eoi_token_index=257)  # fmt: skip
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    commands = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: commands.append(command))
    model = load_model(tmp_path / "base", device="cpu")
    assert not commands and hf.AutoProcessor.from_pretrained.__name__ == "from_pretrained"
    edit = create_edit(model, some_neurons(model))
    export(model, edit, tmp_path / "out", n_new_tokens=2)
    assert checkpoint_state(tmp_path / "out", edit) == "edited"
