"""Sizes come from what is hooked: every architecture goes all the way from scores to an edited checkpoint folder."""

import pytest
import torch
import transformers
from architectures import BUILD, FURTHER, WRONG, build_plain
from packaging.version import Version
from transformers import AutoModelForCausalLM

from dean_interp import (
    Behaviour,
    Example,
    InputError,
    ScoringConfig,
    Selection,
    Site,
    ablate,
    apply_edit_to_checkpoint,
    couple,
    create_edit,
    importance,
    load_model,
)
from dean_interp.models.hooked_model import hooked_transformer_class
from dean_interp.models.matrices import weight
from dean_interp.models.sizes import neuron_counts, site_shape

pytestmark = pytest.mark.hooks

_TEXTS = {
    "first": ["a fair one. ", "all are equal. "],
    "second": ["keep it shut. ", "it is hers. "],
    "general": ["water boils. ", "ten is even. "],
}


def behaviours():
    sets = []
    for name, answers in _TEXTS.items():
        examples = [Example(f"{name} {i}", {"safe": answer, "unsafe": "no"}) for i, answer in enumerate(answers)]
        sets.append(Behaviour(name, tuple(examples)))
    return sets


JOINT = ("phi-3 (joint qkv and gate)", "glm", "glm 4")
"""Their checkpoints hold `gate` and `in` as one tensor, which an edit of single weights does not reach."""
WRONG_IN_3 = ("cohere", "cohere 2", "hunyuan")
"""What TransformerLens 3.9 takes apart wrongly, and 4 does not."""
CODEGEN_MOVED = Version(transformers.__version__) >= Version("5.24")
"""Where TransformerLens (to 4.3) looks for positions in CodeGen's attention, there are none any more."""


@pytest.mark.parametrize("name", [*BUILD, *FURTHER])
def test_an_architecture_goes_from_scores_to_an_edited_folder_that_gives_the_ablated_logits(name, tokenizer, tmp_path):
    if name in WRONG_IN_3 and hooked_transformer_class() is not None:
        with pytest.raises(InputError, match="makes another model of"):
            load_model(build_plain(name, tokenizer), tokenizer=tokenizer)
        return
    if name == "codegen" and CODEGEN_MOVED:
        with pytest.raises(InputError, match=r"cannot take '.*' apart"):
            load_model(build_plain(name, tokenizer), tokenizer=tokenizer)
        return
    build_plain(name, tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokens = load_model(tmp_path / "base", device="cpu"), torch.arange(5, 25)[None]
    config = ScoringConfig(template="raw")
    scores = [importance(model, each, unit=("neuron", "weight"), config=config, keep=0.3) for each in behaviours()]
    for site, values in scores[0].values.items():
        if site.unit == "neuron":
            assert values.shape == site_shape(model, site)
    for unit in ("neuron",) if name in JOINT else ("neuron", "weight"):
        coupled = couple(*(each.of(unit) for each in scores), fraction=0.3).coupled
        assert len(coupled)
        with torch.inference_mode(), ablate(model, coupled):
            expected = model(tokens, return_type="logits")
        edited = tmp_path / unit
        apply_edit_to_checkpoint(tmp_path / "base", create_edit(model, coupled), edited)
        plain = AutoModelForCausalLM.from_pretrained(edited, attn_implementation="eager").eval()
        with torch.inference_mode():
            torch.testing.assert_close(plain(tokens).logits, expected, atol=1e-4, rtol=1e-4)
            assert (model(tokens, return_type="logits") - expected).abs().max() > 1e-3, "the edit changes something"


@pytest.mark.parametrize("name", list(WRONG))
def test_a_model_of_which_transformer_lens_makes_another_one_is_refused(name, tokenizer):
    with pytest.raises(InputError, match=r"makes another model of|cannot take"):
        load_model(build_plain(name, tokenizer), tokenizer=tokenizer)


def test_a_width_is_that_of_each_layer_whatever_the_configuration_says(tokenizer):
    plain = build_plain("mistral", tokenizer)
    d_model, wide = plain.config.hidden_size, 53
    for name, shape in {"gate_proj": (d_model, wide), "up_proj": (d_model, wide), "down_proj": (wide, d_model)}.items():
        setattr(plain.model.layers[1].mlp, name, torch.nn.Linear(*shape, bias=False))
    model = load_model(plain, tokenizer=tokenizer)
    assert neuron_counts(model) == [plain.config.intermediate_size, wide]
    (scores, *_) = [importance(model, each, config=ScoringConfig(template="raw")) for each in behaviours()]
    last = Site(1, "neurons")
    assert scores[last].shape == (wide,)
    lone = Selection({last: torch.tensor([wide - 1])}, {last: (wide,)})
    with torch.inference_mode(), ablate(model, lone):
        silenced = model(torch.arange(5, 15)[None])
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight[:, wide - 1] = 0
        torch.testing.assert_close(silenced, model(torch.arange(5, 15)[None]))


def test_a_layer_without_attention_has_no_matrices_of_attention(tokenizer):
    model = load_model(build_plain("lfm 2 (a width that is rounded)", tokenizer), tokenizer=tokenizer)
    scores = importance(model, behaviours()[0], unit="weight", config=ScoringConfig(modules="attention"))
    assert [str(site) for site in scores.values] == ["L1.k", "L1.o", "L1.q", "L1.v"]
    assert all(scores[site].any() for site in scores.values)
    with pytest.raises(InputError, match="keeps no separate matrix 'q' in layer 0's attention"):
        weight(model, Site(0, "q"))
