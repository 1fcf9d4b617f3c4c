"""A tiny model in which one neuron is built to serve two behaviours: it must be found, and nothing else blamed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dean_interp import (
    Behaviour,
    Example,
    Scoring,
    Site,
    ablate,
    coupling,
    importance,
    load_model,
    measure,
    random_like,
)
from dean_interp.circuits.neuron import strongest_neurons
from dean_interp.selection.controls import named_controls, strata

pytestmark = pytest.mark.hooks

D_MODEL, D_MLP, LAYER = 24, 40, 1
SHARED, ONLY_F, ONLY_P, ONLY_G = 7, 11, 13, 17  # the planted neurons of layer 1
WORDS = ("does", "may", "the", "old", "flat", "owner", "ask", "two", "more", "about", "it", "now")


@pytest.fixture(scope="module")
def planted(tokenizer):
    """No attention: what follows a byte depends on that byte alone. After f or p, Y is safe and N unsafe; after g, O.

    Neuron 7 reads f and p and writes Y minus N. Neurons 11 and 13 read one of the two and write a little of it; neuron
    17 reads g and writes O.
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
            (SHARED, (0, 1), 3, 2.0), (ONLY_F, (0,), 3, 0.3), (ONLY_P, (1,), 3, 0.3), (ONLY_G, (2,), 4, 2.0),
        ):  # fmt: skip
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight[neuron] = 0
                weight[neuron, list(axes)] = 1.0
            mlp.down_proj.weight[:, neuron] = 0
            mlp.down_proj.weight[writes, neuron] = strength
    return load_model(model, tokenizer=tokenizer)


def behaviour(letter, start, n=24):
    """Prompts of a few words; every answer begins with the behaviour's letter, which both answers share."""
    examples = []
    for i in range(start, start + n):
        prompt = " ".join(WORDS[(i * 5 + k * (i % 7 + 1)) % len(WORDS)] for k in range(3 + i % 4)) + f" {i}?"
        answers = {"response": "gO"} if letter == "g" else {"safe": f"{letter}Y", "unsafe": f"{letter}N"}
        examples.append(Example(prompt, answers))
    return Behaviour({"f": "fairness", "p": "privacy", "g": "general"}[letter], tuple(examples))


@pytest.fixture(scope="module")
def scores(planted):
    return [importance(planted, behaviour(letter, 0), how=Scoring(template="raw")) for letter in "fpg"]


@pytest.fixture(scope="module")
def found(scores):
    return coupling(*scores, fraction=0.075)  # three neurons a layer


@pytest.fixture(scope="module")
def tests():
    return [behaviour(letter, 500) for letter in "fpg"]


def margins(model, tests):
    measured = measure(model, tests, template="raw")
    return [float(measured[name].margin.mean()) for name in ("fairness", "privacy")], measured["general"].perplexity


def test_the_shared_neuron_is_found_and_the_single_minded_ones_are_not(scores, found):
    assert strongest_neurons(found.coupled, scores[0], scores[1], n_neurons=1) == [(Site(LAYER, "neurons"), SHARED)]
    chosen = found.coupled.units[Site(LAYER, "neurons")].tolist()
    assert not {ONLY_F, ONLY_P, ONLY_G} & set(chosen)


def test_silencing_it_takes_both_behaviours_away_and_leaves_general_ability(planted, found, tests):
    before, perplexity = margins(planted, tests)
    with ablate(planted, found.coupled):
        after, perplexity_after = margins(planted, tests)
    for had, has in zip(before, after, strict=True):
        assert had > 0.5 and has < 0.35 * had
    assert perplexity_after == pytest.approx(perplexity, rel=0.1)


def test_matched_random_controls_leave_both_behaviours_unmoved(planted, scores, found, tests):
    before, _ = margins(planted, tests)
    matched = strata(planted, scores)
    for seed in range(10):
        control = random_like(found.coupled, matched, seed=seed)
        if set(control.units[Site(LAYER, "neurons")].tolist()) & {ONLY_F, ONLY_P}:
            continue  # a draw may hit a neuron that was planted for one of them
        with ablate(planted, control):
            after, _ = margins(planted, tests)
        assert after == pytest.approx(before, abs=0.15 * min(before))


def test_top_of_one_behaviour_moves_that_one_alone(planted, scores, found, tests):
    before, _ = margins(planted, tests)
    controls = named_controls(found, *scores)
    assert ONLY_F in controls["fairness only"].units[Site(LAYER, "neurons")]
    with ablate(planted, controls["fairness only"]):
        after, _ = margins(planted, tests)
    assert after[0] < before[0] - 0.05
    assert after[1] == pytest.approx(before[1], abs=0.05)
