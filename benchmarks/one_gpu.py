"""What scoring a 7B-shaped model takes on one GPU: time and peak memory beside the plan's, and curves of cost.

    python benchmarks/one_gpu.py --out benchmarks/one_gpu.json

Weights are random (bfloat16): cost does not depend on them. The tokenizer and the texts are the demo model's and the
built-in ones. Each row is printed and written as soon as it is measured. A plain forward and backward pass with
parameter gradients over the same batches stands beside the 7B-shaped model's first row.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from scoring import forward_and_backward
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dean_interp import ScoringConfig, importance, load_behaviour, load_model
from dean_interp.models.demo import demo_model_folder
from dean_interp.models.load import HookedModel
from dean_interp.planning.scoring import plan
from dean_interp.scoring.preparation import prepare

BOTH = ("neuron", "weight")
SMALL = [(8, 2048, 5504), (16, 2048, 5504), (32, 2048, 5504)]
SEVEN_B = (32, 4096, 11008)
"""Layers, width, MLP width: Llama-2-7B's."""


def built(n_layers: int, width: int, d_mlp: int) -> HookedModel:
    """A random Llama on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=d_mlp, num_hidden_layers=n_layers, vocab_size=49152,
                         num_attention_heads=width // 128, num_key_value_heads=width // 128)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    return load_model(model, tokenizer=AutoTokenizer.from_pretrained(demo_model_folder()))


def seconds(run: Any) -> float:  # noqa: ANN401 - whatever is called
    """How long a call takes, the GPU's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(name: str, model: HookedModel, n_examples: int, unit: tuple[str, ...], plain: bool) -> dict[str, Any]:
    """One row: what scoring took, and what the plan said."""
    behaviour = load_behaviour("fairness", n_examples=n_examples)
    planned = plan(model, behaviour, unit=unit)
    how = planned.apply(ScoringConfig())
    torch.cuda.reset_peak_memory_stats()
    row = {
        "model": name, "unit": unit, "n_examples": n_examples, "n_tokens": planned.n_tokens,
        "seconds": seconds(lambda: importance(model, behaviour, unit=unit, config=how)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "planned_seconds": planned.seconds,
        "planned_gib": planned.peak_bytes / 2**30, "device": torch.cuda.get_device_name(),
    }  # fmt: skip
    if plain:
        rows = prepare(model, behaviour, how).rows
        row["plain_seconds"] = seconds(lambda: forward_and_backward(model, rows, parameters=True))
    return row


def main(out: Path = Path("benchmarks/one_gpu.json")) -> None:
    """Every row, the 7B-shaped model last."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and there is none")
    found = []
    for n_layers, width, d_mlp in [*SMALL, SEVEN_B]:
        model = built(n_layers, width, d_mlp)
        importance(model, load_behaviour("fairness", n_examples=8))  # warms up
        sizes = (32, 64, 128) if n_layers == 32 else (64,)
        for n_examples in sizes:
            for unit in (("neuron",), BOTH):
                plain = width == SEVEN_B[1] and not unit[1:] and n_examples == sizes[0]
                found.append(
                    measured(
                        name=f"{n_layers} layers of {width}", model=model, n_examples=n_examples, unit=unit, plain=plain
                    )
                )
                print(json.dumps(found[-1]), flush=True)
                out.write_text(json.dumps(found, indent=1) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
