"""A tiny mixture in which one neuron of a rarely routed expert is built to serve two behaviours.

As `planted_coupling`, with eight experts a layer, of which a byte is sent to two. The router sends f and p to expert 5,
other bytes hardly ever.
"""

import torch
from planted_coupling import D_MODEL, LAYER
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

D_EXPERT, N_EXPERTS = 20, 8
RARE, COMMON = 5, 2
SHARED, ONLY_F, ONLY_P = RARE * D_EXPERT + 7, RARE * D_EXPERT + 11, RARE * D_EXPERT + 13
ONLY_G = COMMON * D_EXPERT + 17


def planted_mixture(tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    """After f or p, Y is safe and N unsafe; after g, O. The neurons that say so are in expert 5, and for g in 2."""
    torch.manual_seed(1)
    config = MixtralConfig(hidden_size=D_MODEL, intermediate_size=D_EXPERT, num_hidden_layers=3, num_attention_heads=2,
                           num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=256,
                           num_local_experts=N_EXPERTS, num_experts_per_tok=2)  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    f, p, g, y, n, o = (tokenizer(letter).input_ids[0] for letter in "fpgYNO")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.gate_up_proj.normal_(std=0.04)
            layer.mlp.experts.down_proj.normal_(std=0.04)
            layer.mlp.gate.weight.normal_(std=2.0)
        embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, :6] = 0
        for axis, letter in enumerate((f, p, g)):
            embed[letter] = 0
            embed[letter, axis], embed[letter, 5] = 1, 5
        unembed[:, 3:6] = 0
        unembed[y, 3], unembed[n, 3], unembed[o, 4] = 1.0, -1.0, 2.0
        router, experts = model.model.layers[LAYER].mlp.gate.weight, model.model.layers[LAYER].mlp.experts
        router[:, :6] = 0
        router[RARE] = 0  # what is no letter is sent there only where nearly all others are below 0
        router[RARE, :2], router[COMMON, 2] = 5.0, 5.0
        for unit, axes, writes, strength in (
            (SHARED, (0, 1), 3, 2.0), (ONLY_F, (0,), 3, 0.3), (ONLY_P, (1,), 3, 0.3), (ONLY_G, (2,), 4, 2.0),
        ):  # fmt: skip
            expert, neuron = divmod(unit, D_EXPERT)
            for row in (neuron, D_EXPERT + neuron):  # gate, then up
                experts.gate_up_proj[expert, row] = 0
                experts.gate_up_proj[expert, row, list(axes)] = 1.0
            experts.down_proj[expert, :, neuron] = 0
            experts.down_proj[expert, writes, neuron] = strength
    return model
