"""Scores neurons and weights of a random model of a billion parameters, within the memory that was predicted.

python benchmarks/one_billion.py          (about 13 GiB; two CPU cores: a few minutes)
"""

import time

import torch
from scoring import peak_bytes  # beside this file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dean_interp import ScoringConfig, importance, load_behaviour, load_model
from dean_interp.models.demo import demo_model_folder
from dean_interp.planning.scoring import plan


def main() -> None:
    """Print the plan, then what was measured."""
    torch.set_num_threads(2)
    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config._name_or_path = "a random Llama"
    plain = LlamaForCausalLM(config).eval()
    model = load_model(plain, tokenizer=AutoTokenizer.from_pretrained(demo_model_folder()))
    behaviour = load_behaviour("fairness", n_examples=4)
    units = ("neuron", "weight")
    planned = plan(model, behaviour, unit=units)
    print(
        f"{sum(each.numel() for each in plain.parameters()) / 1e9:.2f} billion parameters\nplan: {planned}", flush=True
    )
    began = time.monotonic()
    peak = peak_bytes(lambda: importance(model, behaviour, unit=units, config=planned.apply(ScoringConfig())))
    seconds = time.monotonic() - began
    print(f"measured: peak {peak / 2**30:.2f} GiB, {peak / planned.peak_bytes:.2f} of the prediction; "
          f"{seconds / planned.seconds:.2f} of the predicted time")  # fmt: skip


if __name__ == "__main__":
    main()
