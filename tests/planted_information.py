"""Tiny models whose true answer is known: whether silencing some neurons decouples two sets of later neurons.

Attention is uniform, so every position holds the mean of the letters before it. In layer 0 the `shared` neurons carry
one cause to the fairness neurons and to the privacy neurons of layer 1; the `private` neurons carry one cause to the
fairness neurons and another to the privacy neurons; `others` carry further private causes. The output reads both kinds
alike. Silencing `shared` decouples the two behaviours. Silencing `private` does as much damage and decouples nothing.
"""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dean_interp import Behaviour, Example, Selection, Site, load_model
from dean_interp.models.load import HookedModel

D_MODEL, D_MLP, N_READ = 64, 64, 8
SHARED, PRIVATE, OTHERS = range(0, 4), range(4, 8), range(8, 40)
FAIRNESS, PRIVACY = range(0, N_READ), range(N_READ, 2 * N_READ)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# dimensions of the residual stream: what letters say, then what layer 0 writes
STEADY, CAUSE, OF_FAIRNESS, OF_PRIVACY, OWN, OF_OTHERS = 0, 1, 2, 3, range(4, 20), range(20, 26)
WRITTEN, TO_FAIRNESS, TO_PRIVACY, FURTHER = 36, 37, 38, range(39, 45)


@dataclass(frozen=True)
class Planted:
    """A model, its two sets of later neurons, and what may be silenced."""

    model: HookedModel
    fairness: Selection
    privacy: Selection
    shared: Selection
    private: Selection
    controls: list[Selection]
    behaviours: list[Behaviour]
    calibration: list[Behaviour]


def planted(tokenizer: PreTrainedTokenizerFast, seed: int, *, n_prompts: int = 64, n_controls: int = 19) -> Planted:
    """Everything about one draw."""
    drawn = torch.Generator().manual_seed(seed)
    model = _model(tokenizer, drawn)
    return Planted(
        model,
        neurons(1, FAIRNESS),
        neurons(1, PRIVACY),
        neurons(0, SHARED),
        neurons(0, PRIVATE),
        [neurons(0, sorted(_some(OTHERS, 4, drawn))) for _ in range(n_controls)],
        [_behaviour(name, n_prompts, drawn) for name in ("fairness", "privacy")],
        [_behaviour(name, n_prompts, drawn) for name in ("fairness", "privacy")],
    )


def neurons(layer: int, which: range | list[int]) -> Selection:
    """Neurons of one layer of the two."""
    units = {Site(i, "neurons"): torch.tensor(list(which) if i == layer else [], dtype=torch.int64) for i in (0, 1)}
    return Selection(units, {site: (D_MLP,) for site in units})


def _model(tokenizer: PreTrainedTokenizerFast, drawn: torch.Generator) -> HookedModel:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=2, num_attention_heads=2,
                    vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        embed = model.model.embed_tokens.weight
        embed[:, STEADY] = 20  # keeps the norm, and opens every gate
        for letter, told in zip(LETTERS, _uncorrelated(drawn), strict=True):
            embed[tokenizer(letter).input_ids[0], CAUSE : OF_OTHERS[-1] + 1] = told
        for letter, sign in (("Y", 1), ("N", -1)):  # the last letter of safe and of unsafe answers
            embed[tokenizer(letter).input_ids[0], CAUSE] = 2.0 * sign
        first, second = model.model.layers
        first.self_attn.v_proj.weight.copy_(torch.eye(D_MODEL))
        first.self_attn.o_proj.weight.copy_(3 * torch.eye(D_MODEL))
        first.self_attn.o_proj.weight[STEADY] = 0
        for layer in (first, second):
            layer.mlp.gate_proj.weight[:, STEADY] = 1
        up, down = first.mlp.up_proj.weight, first.mlp.down_proj.weight
        for neuron in SHARED:
            up[neuron, CAUSE], down[WRITTEN, neuron] = 1, 0.3
        for i, neuron in enumerate(PRIVATE):
            side, to = ((OF_FAIRNESS, TO_FAIRNESS), (OF_PRIVACY, TO_PRIVACY))[i % 2]
            up[neuron, side], down[to, neuron] = 1, 0.42
        for i, neuron in enumerate(OTHERS):
            up[neuron, OF_OTHERS[i % 6]], down[FURTHER[i % 6], neuron] = 1, 0.3
        up = second.mlp.up_proj.weight
        for which, private, further in ((FAIRNESS, TO_FAIRNESS, FURTHER[:3]), (PRIVACY, TO_PRIVACY, FURTHER[3:])):
            for neuron in which:
                up[neuron, WRITTEN], up[neuron, private] = 1, 0.7
                up[neuron, list(further)] = 0.5 * torch.randn(3, generator=drawn)
                up[neuron, OWN[neuron]] = 1.0
        for neuron in range(2 * N_READ, D_MLP):  # read by nobody
            up[neuron, OWN[neuron % len(OWN)]] = 1.0
        unembed = model.lm_head.weight
        for letter, sign in (("Y", 1.0), ("N", -1.0)):  # shared and private causes weigh the same in the output
            unembed[tokenizer(letter).input_ids[0], [WRITTEN, TO_FAIRNESS, TO_PRIVACY]] = sign
            unembed[tokenizer(letter).input_ids[0], list(FURTHER)] = sign * torch.randn(len(FURTHER), generator=drawn)
    return load_model(model, tokenizer=tokenizer)


def _uncorrelated(drawn: torch.Generator) -> torch.Tensor:
    """What each of 26 letters says in 25 ways that tell nothing of each other."""
    values = torch.randn(len(LETTERS), len(LETTERS) - 1, generator=drawn)
    return torch.linalg.qr(values - values.mean(0)).Q * len(LETTERS) ** 0.5


def _behaviour(name: str, n: int, drawn: torch.Generator) -> Behaviour:
    examples = []
    for _ in range(n):
        prompt, safe, unsafe = (
            "".join(LETTERS[i] for i in torch.randint(26, (k,), generator=drawn)) for k in (9, 3, 3)
        )
        examples.append(Example(prompt, {"safe": f"{safe}Y", "unsafe": f"{unsafe}N"}))
    return Behaviour(name, tuple(examples))


def _some(of: range, n: int, drawn: torch.Generator) -> list[int]:
    return [of[i] for i in torch.randperm(len(of), generator=drawn)[:n].tolist()]
