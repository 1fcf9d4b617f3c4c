"""What it costs that most of a model's layers are offloaded: scoring beside the same model all on it.

    python benchmarks/offloaded.py

A random Llama in bfloat16 is saved, loaded whole, and loaded with a quarter of its layers on the device (a GPU where
there is one), half in host memory (without a GPU: on the device, too) and the last quarter on disk. Prints a row of
seconds and, on a GPU, peak memory for each unit, and ends with the largest difference of scores between the two.
"""

import json
import tempfile
from functools import partial

import torch
import tyro
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dean_interp import Scores, ScoringConfig, importance, load_behaviour, load_model
from dean_interp.models.demo import demo_model_folder
from dean_interp.planning.stopwatch import timed

HOW = ScoringConfig(template="raw", batch_tokens=2048)
UNITS = ("neuron", "weight")


def saved(folder: str, n_layers: int, width: int, d_mlp: int) -> None:
    """A random Llama with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=d_mlp, num_hidden_layers=n_layers, vocab_size=49152,
                         num_attention_heads=width // 64, num_key_value_heads=width // 64)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_folder()).save_pretrained(folder)


def placed(n_layers: int) -> dict[str, str | int]:
    """Where each module lies when most are away."""
    device = 0 if torch.cuda.is_available() else "cpu"
    quarters = [device, "cpu", "cpu", "disk"]
    outer = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(outer, device) | {f"model.layers.{i}": quarters[4 * i // n_layers] for i in range(n_layers)}


def measured(folder: str, device: object, said: str, n_examples: int) -> list[Scores]:
    """The scores of each unit; prints what they took."""
    model = load_model(folder, device=device, dtype="bfloat16")
    behaviour, found = load_behaviour("privacy", n_examples=n_examples), []
    importance(model, load_behaviour("privacy", n_examples=2), config=HOW)  # warms up
    for unit in UNITS:
        row: dict[str, object] = {"model": said, "unit": unit}
        if torch.cuda.is_available():
            row["held_gib"] = torch.cuda.memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        score = partial(importance, model, behaviour, unit=unit, config=HOW)
        row["seconds"] = timed(lambda score=score: found.append(score()), device=str(model.cfg.device)).wall
        if torch.cuda.is_available():
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps(row), flush=True)
    return found


def main(layers: int = 16, width: int = 2048, d_mlp: int = 5632, examples: int = 24) -> None:
    """Both models, then how far their scores are apart."""
    with tempfile.TemporaryDirectory() as folder:
        saved(folder, layers, width, d_mlp)
        whole = measured(folder, "cuda" if torch.cuda.is_available() else "cpu", "whole", examples)
        offloaded = measured(folder, placed(layers), "offloaded", examples)
    differences = [(now[site].cpu() - then[site].cpu()).abs().max() / then[site].abs().max()
                   for then, now in zip(whole, offloaded, strict=True) for site in then.values]  # fmt: skip
    print(f"largest difference of scores, of the largest of their site: {float(max(differences)):.1e}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
