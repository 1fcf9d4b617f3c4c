"""Tiny mixtures of experts of six families, random, as folders: what tests of experts work on.

Among them: experts in stacks and stored one by one, transposed and not, biases, an interleaved `gate` and `in`, dense
layers among sparse ones, an expert of every token, attention of three kinds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from dean_interp.models.sites import Site

N_LAYERS, D_MODEL, D_EXPERT, N_EXPERTS = 3, 24, 20, 8
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")
EACH = Site(1, "experts", N_EXPERTS)
"""A site of routed experts that every family has."""
IDS = torch.tensor([[2, 70, 80, 90, 100, 3, 60, 61, 62], [2, 9, 8, 7, 6, 5, 4, 3, 33]])
"""Two texts of nine tokens."""


def config_of(family: str, n_vocab: int) -> PretrainedConfig:
    """The configuration of one family's tiny model."""
    common = {
        "vocab_size": n_vocab, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    make: dict[str, Callable[[], PretrainedConfig]] = {
        "mixtral": lambda: MixtralConfig(**common, intermediate_size=D_EXPERT, num_local_experts=N_EXPERTS),
        "olmoe": lambda: OlmoeConfig(**common, intermediate_size=D_EXPERT, num_experts=N_EXPERTS),
        # every second layer is dense
        "qwen2_moe": lambda: Qwen2MoeConfig(
            **common, intermediate_size=40, moe_intermediate_size=D_EXPERT, shared_expert_intermediate_size=28,
            num_experts=N_EXPERTS, decoder_sparse_step=2,
        ),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common, head_dim=8, intermediate_size=40, moe_intermediate_size=D_EXPERT, num_experts=N_EXPERTS,
            mlp_only_layers=[0],
        ),
        "gpt_oss": lambda: GptOssConfig(
            **common, head_dim=8, intermediate_size=D_EXPERT, num_local_experts=N_EXPERTS, sliding_window=64,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "deepseek_v3": lambda: DeepseekV3Config(
            **common | {"num_key_value_heads": 4}, intermediate_size=40, moe_intermediate_size=D_EXPERT,
            n_routed_experts=N_EXPERTS, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=None,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        ),
    }  # fmt: skip
    config = make[family]()
    assert config.num_experts_per_tok == 2
    return config


def mixture(family: str, n_vocab: int, *, seed: int = 0, sizes: Mapping[str, int] | None = None) -> PreTrainedModel:
    """A random model of a family, with weights large enough that routing and neurons matter; `sizes` replaces some."""
    torch.manual_seed(seed)
    config = config_of(family, n_vocab)
    config.update(sizes or {})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def save_mixture(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """The same as a checkpoint folder."""
    mixture(family, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
