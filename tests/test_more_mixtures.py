"""Every other mixture that TransformerLens knows works exactly, or is refused in a line that says why."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dean_interp import InputError, generate, importance, load_model
from dean_interp.data.examples import Behaviour, Example
from dean_interp.editing.ablation import ablate
from dean_interp.information.activations import read_activations
from dean_interp.models.matrices import neuron_sites, parameter, weight_sites
from dean_interp.scoring.preparation import ScoringConfig
from tests.test_experts import IDS, chosen, close, logits_of, zero_rows

COMMON = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_experts_per_tok": 2,
    "intermediate_size": 20,
}  # fmt: skip
HEADS = {"head_dim": 8}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROUTED = {"moe_intermediate_size": 20, "n_routed_experts": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 28, "num_experts": 8,
    "moe_intermediate_size": 20,
}  # fmt: skip
SPARSE, SHARED = ["L0.experts:8", "L1.experts:8"], ["L0.experts:8", "L0.shared", "L1.experts:8", "L1.shared"]
MIXED, MIXED_SHARED = ["L0.neurons", "L1.experts:8"], ["L0.neurons", "L1.experts:8", "L1.shared"]
TYPES = ["sliding_attention", "full_attention"]

WORK = {
    "GraniteMoe": ({"num_local_experts": 8}, SPARSE),
    "FlexOlmo": ({"num_experts": 8}, SPARSE),
    "MiniMaxM2": (HEADS | {"num_local_experts": 8}, SPARSE),
    "Glm4MoeLite": (LATENT | ROUTED | {"mlp_layer_types": ["dense", "sparse"]}, MIXED_SHARED),
    "GlmMoeDsa": (LATENT | ROUTED | {"mlp_layer_types": ["dense", "sparse"]}, MIXED_SHARED),
    "DeepseekV2": (LATENT | ROUTED | {"first_k_dense_replace": 1, "n_shared_experts": 1}, MIXED_SHARED),
    "DeepseekV4": (ROUTED, SHARED),
    "Ernie4_5_Moe": (
        {"moe_intermediate_size": 20, "moe_num_experts": 8, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        MIXED_SHARED,
    ),
    "Lfm2Moe": (
        {"moe_intermediate_size": 20, "num_experts": 8, "num_dense_layers": 1,
         "layer_types": ["conv", "full_attention"]},
        MIXED,
    ),
    "Jamba": (
        {"num_experts": 8, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
         "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        MIXED,
    ),
    "Qwen3Next": (HEADS | LINEAR, SHARED),
    "Qwen3_5Moe": (HEADS | LINEAR, SHARED),
    "Afmoe": (
        HEADS | {"moe_intermediate_size": 20, "num_experts": 8, "num_shared_experts": 1, "num_dense_layers": 1,
                 "layer_types": TYPES},
        MIXED_SHARED,
    ),
    "Laguna": (
        HEADS | {"moe_intermediate_size": 20, "num_experts": 8, "shared_expert_intermediate_size": 28}, MIXED_SHARED
    ),
    "Gemma4": (
        HEADS | {"global_head_dim": 8, "moe_intermediate_size": 20, "num_experts": 8, "top_k_experts": 2,
                 "enable_moe_block": True, "layer_types": TYPES, "hidden_size_per_layer_input": 0,
                 "num_kv_shared_layers": 0},
        ["L0.neurons", "L0.experts:8", "L1.neurons", "L1.experts:8"],
    ),
}  # fmt: skip
REFUSED = {
    "Glm4Moe": (
        HEADS | ROUTED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "the shared expert of layer 1 of .* is a Glm4MoeMLP that TransformerLens does not take apart",
    ),
    "GraniteMoeHybrid": (
        {"num_local_experts": 8, "shared_intermediate_size": 28, "layer_types": ["full_attention"] * 2,
         "mamba_n_heads": 6, "mamba_d_head": 8},
        "layer 0 of .* has experts in a .*, where TransformerLens shows no MLP",
    ),
    "NemotronH": (
        HEADS | ROUTED | {"moe_shared_expert_intermediate_size": 28, "layers_block_type": ["attention", "moe"],
                          "mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 1},
        "layer 1 of .* has experts in a .*, where TransformerLens shows no MLP",
    ),
    "Llama4Text": (
        HEADS | {"intermediate_size_mlp": 40, "num_local_experts": 8, "interleave_moe_layer_step": 1,
                 "num_experts_per_tok": 1},
        "layer 0 of .* experts do not go through the experts interface of transformers",
    ),
    "JetMoe": (
        {"num_attention_heads": 4, "kv_channels": 8, "num_local_experts": 4},
        "layer 0 of .* experts do not go through the experts interface of transformers",
    ),
    "Phimoe": ({"num_local_experts": 8}, "is a PhimoeForCausalLM, which TransformerLens .* does not know"),
}  # fmt: skip
ANSWERS = {"safe": "I will not.", "unsafe": "It is 3."}
SHORT = Behaviour(
    "fairness",
    tuple(Example(prompt, ANSWERS) for prompt in ("Who won?", "Tell me more", "Why?")),
    "safe",
    "calibration",
)


def built(family, settings, n_vocab):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}TextConfig" if family in ("Qwen3_5Moe", "Gemma4") else f"{family}Config")
    given = COMMON | settings | {"vocab_size": n_vocab}
    if family == "Ernie4_5_Moe":
        given["moe_k"] = given.pop("num_experts_per_tok")
    model = AutoModelForCausalLM.from_config(kind(**given), attn_implementation="eager").eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.15)
    return model


# TransformerLens 4.3 passes GlmMoeDsa's cache by a name that transformers 5.24 has renamed and takes until 5.40.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", WORK)
def test_a_mixture_is_scored_and_silenced_exactly(family, tokenizer):
    settings, sites = WORK[family]
    plain = built(family, settings, len(tokenizer))
    with torch.inference_mode():
        expected = plain(IDS, use_cache=False).logits
    model = load_model(plain, tokenizer=tokenizer)
    assert close(logits_of(model), expected, expected)
    assert [str(site) for site in neuron_sites(model)] == sites
    # Nothing of an MLP is left out but what routes.
    covered = {id(parameter(model, site)[0]) for site in weight_sites(model)}
    for long_name, weights in model.original_model.named_parameters():
        name = long_name.replace("_original_component.", "")
        is_of_mlp = any(word in name for word in ("mlp", "moe", "expert", "feed_forward"))
        routes = any(word in name for word in ("router", "mlp.gate.", "forward.gate.", "expert_gate."))
        assert not is_of_mlp or weights.dim() < 2 or id(weights) in covered or routes, name
    # Hook gradients are compared with the parameters' own before a pass.
    scores = importance(model, SHORT, unit=("neuron", "weight"), config=ScoringConfig(template="raw"))
    assert all(scores[site].isfinite().all() and scores[site].any() for site in neuron_sites(model))
    selection = chosen(model)
    with ablate(model, selection):
        by_hook = logits_of(model)
    for site, units in selection.units.items():
        zero_rows(model, site, units)
    assert close(by_hook, logits_of(model), by_hook)
    assert not close(by_hook, expected, by_hook, 1e-3)


def test_what_needs_a_residual_stream_says_so_where_none_is_shown(tokenizer):
    model = load_model(built("DeepseekV4", WORK["DeepseekV4"][0], len(tokenizer)), tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"generation needs .*: blocks\.0\.hook_resid_pre is missing, the first of 1"):
        generate(model, ["Who won?"], max_new_tokens=2, template="raw")
    with pytest.raises(InputError, match=r"residual stream needs .*: blocks\.0\.hook_resid_post is missing, the first"):
        read_activations(model, [SHORT], chosen(model), template="raw", residual=True)


@pytest.mark.parametrize("family", REFUSED)
def test_a_mixture_whose_neurons_cannot_be_hooked_is_refused_in_a_line(family, tokenizer):
    settings, why = REFUSED[family]
    with pytest.raises(InputError, match=why) as refused:
        load_model(built(family, settings, len(tokenizer)), tokenizer=tokenizer)
    assert "\n" not in str(refused.value)
