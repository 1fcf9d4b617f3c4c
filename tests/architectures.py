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
# four of the six numbers of a head
_ROTARY_PART = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 2 / 3}
_GPT = {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}

BUILD: dict[str, tuple[str, str, dict]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 6}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "gemma-2 (norms around the block, tied, soft caps)": (
        "Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 6}),
    "gemma-3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 6}),
    "gpt-neox (parallel blocks, biases)": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON),
    "phi (parallel blocks, biases)": ("PhiConfig", "PhiForCausalLM", {**_COMMON, "rope_parameters": _ROTARY_PART}),
    "phi-3 (joint qkv and gate)": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "gpt-j": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "opt (biases, relu)": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": D_MODEL, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX}),
    "llama, tied embeddings": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
}  # fmt: skip


# A feed-forward width that is no multiple of the model's, and no power of two, by each family's own field.
_WIDE = {**_COMMON, "intermediate_size": 37}
_WIDE_GROUPED = {**_GROUPED, "intermediate_size": 37}
_WIDE_HEADS = {**_WIDE_GROUPED, "head_dim": 6}
_WIDE_GPT = {**_GPT, "n_inner": 37}

FURTHER: dict[str, tuple[str, str, dict]] = {
    "apertus": ("ApertusConfig", "ApertusForCausalLM", _WIDE_GROUPED),
    "arcee": ("ArceeConfig", "ArceeForCausalLM", _WIDE_GROUPED),
    "bitnet (a norm before out)": ("BitNetConfig", "BitNetForCausalLM", _WIDE_GROUPED),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**_WIDE_GPT, "rotary_dim": 4}),
    "cohere": ("CohereConfig", "CohereForCausalLM", _WIDE_GROUPED),
    "cohere 2": ("Cohere2Config", "Cohere2ForCausalLM", _WIDE_HEADS),
    "ernie 4.5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", _WIDE_HEADS),
    "exaone 4": ("Exaone4Config", "Exaone4ForCausalLM", _WIDE_GROUPED),
    "falcon": ("FalconConfig", "FalconForCausalLM", {
        "hidden_size": D_MODEL, "ffn_hidden_size": 37, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS}),
    "falcon h1 (a state space beside attention)": ("FalconH1Config", "FalconH1ForCausalLM", {
        **_WIDE_HEADS, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4,
        "mamba_chunk_size": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _WIDE_HEADS),
    "glm": ("GlmConfig", "GlmForCausalLM", {**_WIDE_HEADS, "pad_token_id": 0}),
    "glm 4": ("Glm4Config", "Glm4ForCausalLM", {**_WIDE_HEADS, "pad_token_id": 0}),
    "gpt-2, the width unset": ("GPT2Config", "GPT2LMHeadModel", {**_GPT, "n_inner": None}),
    "gpt-bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _WIDE_GPT),
    "gpt-neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {
        **_WIDE, "num_layers": N_LAYERS, "num_heads": N_HEADS, "attention_types": [[["global", "local"], 1]]}),
    "gpt-neo, the width unset": ("GPTNeoConfig", "GPTNeoForCausalLM", {
        "hidden_size": D_MODEL, "num_layers": N_LAYERS, "num_heads": N_HEADS, "max_position_embeddings": N_CTX,
        "attention_types": [[["global", "local"], 1]]}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _WIDE_GROUPED),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", _WIDE_HEADS),
    "jais 2": ("Jais2Config", "Jais2ForCausalLM", _WIDE_GROUPED),
    "lfm 2 (a width that is rounded)": ("Lfm2Config", "Lfm2ForCausalLM", {
        **_WIDE_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "pad_token_id": 0}),
    "llama, biases": ("LlamaConfig", "LlamaForCausalLM", {**_WIDE_GROUPED, "mlp_bias": True, "attention_bias": True}),
    "ministral 3": ("Ministral3Config", "Ministral3ForCausalLM", _WIDE_HEADS),
    "modernbert decoder": ("ModernBertDecoderConfig", "ModernBertDecoderForCausalLM", {**_WIDE, "pad_token_id": 0}),
    "mpt": ("MptConfig", "MptForCausalLM", {
        "d_model": D_MODEL, "n_heads": N_HEADS, "n_layers": N_LAYERS, "expansion_ratio": 3, "max_seq_len": N_CTX}),
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", _WIDE_GROUPED),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", _WIDE_GROUPED),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _WIDE_GROUPED),
    "olmo 2": ("Olmo2Config", "Olmo2ForCausalLM", _WIDE_GROUPED),
    "olmo 3": ("Olmo3Config", "Olmo3ForCausalLM", _WIDE_GROUPED),
    "opt, a wide feed-forward": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": D_MODEL, "ffn_dim": 37, "word_embed_proj_dim": D_MODEL, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX}),
    "opt, narrow embeddings and norms behind": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": D_MODEL, "ffn_dim": 37, "word_embed_proj_dim": 10, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX, "do_layer_norm_before": False}),
    "seed-oss": ("SeedOssConfig", "SeedOssForCausalLM", _WIDE_HEADS),
    "smollm 3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_WIDE_GROUPED, "pad_token_id": 0}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {
        **_WIDE_GROUPED, "rope_parameters": _ROTARY_PART}),
    "stablelm, parallel blocks": ("StableLmConfig", "StableLmForCausalLM", {
        **_WIDE_GROUPED, "rope_parameters": _ROTARY_PART, "use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder 2": ("Starcoder2Config", "Starcoder2ForCausalLM", _WIDE_GROUPED),
    "openai-gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {
        "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}),
    "xglm": ("XGLMConfig", "XGLMForCausalLM", {
        "d_model": D_MODEL, "ffn_dim": 37, "num_layers": N_LAYERS, "attention_heads": N_HEADS,
        "max_position_embeddings": N_CTX}),
    "vaultgemma": ("VaultGemmaConfig", "VaultGemmaForCausalLM", _WIDE_HEADS),
}  # fmt: skip
"""Every other dense text family that boots, small."""

WRONG: dict[str, tuple[str, str, dict]] = {
    "falcon, grouped queries": ("FalconConfig", "FalconForCausalLM", {
        "hidden_size": D_MODEL, "ffn_hidden_size": 37, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
        "num_kv_heads": 2, "new_decoder_architecture": True, "multi_query": False}),
    "falcon, grouped queries and said to have one": ("FalconConfig", "FalconForCausalLM", {
        "hidden_size": D_MODEL, "ffn_hidden_size": 37, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
        "num_kv_heads": 2, "new_decoder_architecture": True}),
    "stablelm, an odd part of each head rotated": ("StableLmConfig", "StableLmForCausalLM", _WIDE_GROUPED),
}  # fmt: skip
"""What TransformerLens 4.3 takes apart wrongly."""


def build_plain(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A tiny model of that architecture, with weights large enough that units matter."""
    config_name, model_name, settings = (BUILD | FURTHER | WRONG)[name]
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
    return model


def build(name: str, tokenizer: PreTrainedTokenizerBase) -> object:
    """A bridge on it."""
    return load_model(build_plain(name, tokenizer), tokenizer=tokenizer)
