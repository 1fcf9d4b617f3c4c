"""A tiny model in which one neuron is built to serve two behaviours, and the behaviours' examples."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dean_interp import Behaviour, Example, measure

D_MODEL, D_MLP, LAYER = 24, 40, 1
SHARED, ONLY_F, ONLY_P, ONLY_G = 7, 11, 13, 17  # the planted neurons of layer 1
WORDS = ("does", "may", "the", "old", "flat", "owner", "ask", "two", "more", "about", "it", "now")


def planted_model(tokenizer: PreTrainedTokenizerFast, *, shared: float = 2.0) -> LlamaForCausalLM:
    """No attention: what follows a byte depends on that byte alone. After f or p, Y is safe and N unsafe; after g, O.

    Neuron 7 reads f and p and writes `shared` times Y minus N. Neurons 11 and 13 read one of the two and write a little
    of it; neuron 17 reads g and writes O.
    """
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=3, num_attention_heads=2,
                         vocab_size=len(tokenizer), max_position_embeddings=256)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    f, p, g, y, n, o = (tokenizer(letter).input_ids[0] for letter in "fpgYNO")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, :6] = 0
        for axis, letter in enumerate((f, p, g)):
            embed[letter] = 0
            embed[letter, axis], embed[letter, 5] = 1, 5  # the large part keeps the norm, and so the logits, steady
        unembed[:, 3:6] = 0
        unembed[y, 3], unembed[n, 3], unembed[o, 4] = 1.0, -1.0, 2.0
        mlp = model.model.layers[LAYER].mlp
        for neuron, axes, writes, strength in (
            (SHARED, (0, 1), 3, shared), (ONLY_F, (0,), 3, 0.3), (ONLY_P, (1,), 3, 0.3), (ONLY_G, (2,), 4, 2.0),
        ):  # fmt: skip
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight[neuron] = 0
                weight[neuron, list(axes)] = 1.0
            mlp.down_proj.weight[:, neuron] = 0
            mlp.down_proj.weight[writes, neuron] = strength
    return model


def behaviour(letter, start, n=24):
    """Prompts of a few words; every answer begins with the behaviour's letter, which both answers share."""
    examples = []
    for i in range(start, start + n):
        prompt = " ".join(WORDS[(i * 5 + k * (i % 7 + 1)) % len(WORDS)] for k in range(3 + i % 4)) + f" {i}?"
        answers = {"response": "gO"} if letter == "g" else {"safe": f"{letter}Y", "unsafe": f"{letter}N"}
        examples.append(Example(prompt, answers))
    return Behaviour({"f": "fairness", "p": "privacy", "g": "general"}[letter], tuple(examples))


def margins(model, tests):
    """The mean margins of fairness and privacy, and the perplexity of general text."""
    measured = measure(model, tests, template="raw")
    return [float(measured[name].margin.mean()) for name in ("fairness", "privacy")], measured["general"].perplexity
