"""The same tiny weights as a `HookedTransformer`, where the installed TransformerLens has one."""

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from dean_interp.models.hooked_model import hooked_transformer_class
from dean_interp.models.load import load_model


def as_hooked_transformer(folder, tokenizer, *, fold_ln=False, center_writing_weights=False):
    """A `HookedTransformer` with the weights of a GPT-2-like or Llama-like checkpoint; skips on TransformerLens 4."""
    hooked = hooked_transformer_class()
    if hooked is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    gpt2 = folder.name.startswith("gpt2")
    plain = (GPT2LMHeadModel if gpt2 else LlamaForCausalLM).from_pretrained(folder).eval()
    c = plain.config
    shape = {"n_layers": c.num_hidden_layers, "d_model": c.hidden_size, "n_heads": c.num_attention_heads,
             "d_head": c.hidden_size // c.num_attention_heads, "d_vocab": c.vocab_size, "n_ctx": 1024,
             "device": "cpu"}  # fmt: skip
    if gpt2:
        cfg = HookedTransformerConfig(**shape, d_mlp=c.n_inner, act_fn="gelu_new", eps=c.layer_norm_epsilon,
                                      normalization_type="LN", original_architecture="GPT2LMHeadModel")  # fmt: skip
    else:
        cfg = HookedTransformerConfig(**shape, d_mlp=c.intermediate_size, act_fn="silu", eps=c.rms_norm_eps,
                                      normalization_type="RMS", gated_mlp=True, positional_embedding_type="rotary",
                                      rotary_dim=shape["d_head"], rotary_adjacent_pairs=False, final_rms=True,
                                      rotary_base=int(c.rope_parameters["rope_theta"]),
                                      n_key_value_heads=c.num_key_value_heads,
                                      original_architecture="LlamaForCausalLM")  # fmt: skip
    weights = (convert_gpt2_weights if gpt2 else convert_llama_weights)(plain, cfg)
    model = hooked(cfg, tokenizer=None, move_to_device=False)
    model.load_and_process_state_dict(
        weights,
        fold_ln=fold_ln,
        center_writing_weights=center_writing_weights,
        center_unembed=False,
        fold_value_biases=False,
    )
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    return load_model(model, tokenizer=tokenizer)
