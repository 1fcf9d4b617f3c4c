"""Tiny random models of many architectures, in memory: what scoring by hook points must be exact on."""

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dean_interp import load_model

D_MODEL, D_MLP, N_LAYERS, N_HEADS, N_CTX = 24, 40, 2, 4, 512
_COMMON = {"hidden_size": D_MODEL, "intermediate_size": D_MLP, "num_hidden_layers": N_LAYERS,
           "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT = {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}

BUILD: dict[str, tuple[str, str, dict]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 6}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "gemma-2 (norms around the block, tied, soft caps)": (
        "Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 6}),
    "gemma-3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 6}),
    "gpt-neox (parallel blocks, biases)": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON),
    "phi (parallel blocks, biases)": ("PhiConfig", "PhiForCausalLM", _COMMON),
    "phi-3 (joint qkv and gate)": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "gpt-j": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "opt (biases, relu)": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": D_MODEL, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX}),
    "llama, tied embeddings": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
}  # fmt: skip


def build(name: str, tokenizer: PreTrainedTokenizerBase) -> object:
    """A bridge on a tiny model of that architecture, with weights large enough that units matter."""
    config_name, model_name, settings = BUILD[name]
    config_class: Callable = getattr(hf, config_name)
    model_class: type[PreTrainedModel] = getattr(hf, model_name)
    torch.manual_seed(0)
    config = config_class(**settings, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    config.architectures = [model_name]
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters < 50_000, f"{name} has {n_parameters} parameters: no longer tiny"
    model.config._name_or_path = name
    return load_model(model, tokenizer=tokenizer)
