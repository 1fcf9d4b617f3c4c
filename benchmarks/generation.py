"""What answers cost: beside `transformers`' own batched `generate` on the same weights, and with units silenced.

Both answer the same prompts greedily, padded on the left, in one batch, in float32. Ours passes through hook points;
`transformers` runs in its default attention (`sdpa`).
"""

import torch
from figures import REPEATS, Figure, interleaved
from passes import N_LAYERS, hooked, like_demo
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp import Selection, ablate, generate, load_behaviour, top_fraction
from dean_interp.models.demo import demo_model_folder
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.scoring.methods import random

N_PROMPTS, N_NEW = 8, 24
FRACTIONS: dict[Unit, float] = {"neuron": 0.01, "weight": 1e-4}


def figures(n_layers: int = N_LAYERS) -> list[Figure]:
    """Answers of so many layers of the demo model's widths: two models of the same weights."""
    model, plain = hooked(like_demo(n_layers)), like_demo(n_layers)
    plain.set_attn_implementation("sdpa")
    behaviour = load_behaviour("fairness", n_examples=N_PROMPTS, split="test")
    prompts = behaviour.prompts
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder(), padding_side="left")
    found = [
        Figure(
            name="answering / transformers' own generate",
            limit=1.0,
            bound="the plain model's steps",
            ratios=lambda: interleaved(
                lambda: generate(model, prompts, max_new_tokens=N_NEW), lambda: plainly(plain, tokenizer, prompts)
            ),
        )
    ]
    for unit, fraction in FRACTIONS.items():
        chosen = top_fraction(random(model, behaviour, unit=unit), fraction)
        found.append(
            Figure(
                name=f"answering with the top {fraction:g} of {unit}s silenced / without",
                limit=1.0,
                bound="the same steps",
                ratios=lambda chosen=chosen: silenced(model, chosen, prompts),
            )
        )
    return found


def silenced(model: HookedModel, chosen: Selection, prompts: list[str]) -> list[float]:
    """Answers under an ablation beside answers of the model as it is."""

    def ablated() -> None:
        with ablate(model, chosen):
            answered()

    def answered() -> None:
        generate(model, prompts, max_new_tokens=N_NEW)

    return interleaved(ablated, answered, repeats=REPEATS)


def plainly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> None:
    """Batched greedy answers as transformers' documentation shows them."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        model.generate(**given, max_new_tokens=N_NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
