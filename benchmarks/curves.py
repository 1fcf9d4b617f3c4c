"""What scoring costs against tokens, layers and width, and how near the forecast comes that reads no weight.

    python benchmarks/curves.py --out benchmarks/curves.json

Random Llamas on two CPU threads, both units, one thing varied at a time. Prints a row as soon as it is measured:
seconds (the least of three runs), memory of the largest batch by `planning.scoring`, which watches passes, and by
`planning.study`, which runs none. Draws the curves beside `--out`, and ends with the slope of cost in the upper half
over that in the lower (1: linear), and a row for the demo model.
"""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dean_interp import ScoringConfig, importance, load_behaviour, load_model
from dean_interp.files import write_text
from dean_interp.models.demo import demo_model_folder
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.planning.memory import batch_bytes
from dean_interp.planning.scoring import _HEAP, _Probe
from dean_interp.report.figures import to_svg
from dean_interp.scoring.preparation import prepare

BASE = {"layers": 8, "width": 512, "d_mlp": 1536, "examples": 48}
VARIED = {"examples": (24, 48, 96), "layers": (4, 8, 16), "width": (256, 512, 1024), "d_mlp": (768, 1536, 3072)}
HOW = ScoringConfig(template="raw", batch_tokens=512)


def built(layers: int, width: int, d_mlp: int) -> HookedModel:
    """A random Llama on the CPU; its heads have 64 dimensions, every fourth a key and value of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=d_mlp, num_hidden_layers=layers, vocab_size=49152,
                         num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256))  # fmt: skip
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=AutoTokenizer.from_pretrained(demo_model_folder()))


def row(model: HookedModel, n_examples: int) -> dict[str, Any]:
    """Seconds of scoring one behaviour, and memory of a batch watched and forecast, bytes."""
    behaviour = load_behaviour("privacy", n_examples=n_examples)
    data = prepare(model, behaviour, HOW)
    seconds = []
    for _ in range(3):
        began = perf_counter()
        importance(model, behaviour, unit=("neuron", "weight"), config=HOW)
        seconds.append(perf_counter() - began)
    probe = _Probe(model, data, neuron_sites(model), HOW)
    lengths = [sum(len(branch.tokens) for branch in one) for one in data.rows]
    n_rows = max(1, 512 // max(lengths))
    watched = probe.batch_bytes()(n_rows, max(lengths)) / _HEAP
    rows = sorted(data.rows, key=lambda one: -sum(len(branch.tokens) for branch in one))[:n_rows]
    forecast = batch_bytes(model, rows, n_rows * max(lengths), "float32")
    return {"tokens": sum(lengths), "seconds": min(seconds), "watched": watched, "forecast": forecast}


def along(rows: list[dict[str, Any]], name: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows in which one thing varied, and what it was."""
    own = [one for one in rows if one["varied"] == name]
    return own, [one["tokens" if name == "examples" else name] for one in own]


def curves(rows: list[dict[str, Any]]) -> Figure:
    """Seconds above, memory below, one column for each thing varied; lines are least squares, crosses the forecast."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(2, len(VARIED), sharey="row")
    for column, name in enumerate(VARIED):
        own, x = along(rows, name)
        for axes, what, size in zip(panels[:, column], ("seconds", "watched"), (1, 2**20), strict=True):
            y = [one[what] / size for one in own]
            axes.plot(x, y, "o", color="#0072B2", label="measured")
            slope, start = np.polyfit(x, y, 1)
            axes.axline((0, start), slope=slope, color="0.6")
            axes.set_xlim(0.9 * x[0], 1.04 * x[-1])
            axes.set_xticks(x)
        panels[1, column].plot(x, [one["forecast"] / 2**20 for one in own], "x", color="#D55E00", label="forecast")
        panels[1, column].set_xlabel({"examples": "tokens", "d_mlp": "MLP width"}.get(name, name))
    for axes in panels[:, 0]:
        axes.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("MiB of the largest batch")
    panels[1, 0].legend(frameon=False)
    return figure


def main(out: Path = Path("benchmarks/curves.json")) -> None:
    """Every row, then the slopes."""
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    row(built(4, 256, 768), 24)  # whatever is set up once
    for name, values in VARIED.items():
        for value in values:
            settings = BASE | {name: value}
            model = built(*(settings[size] for size in ("layers", "width", "d_mlp")))
            rows.append({"varied": name} | settings | row(model, settings["examples"]))
            print(json.dumps(rows[-1]), flush=True)
            out.write_text(json.dumps(rows, indent=1) + "\n")
    write_text(out.with_suffix(".svg"), to_svg(curves(rows), "Cost of scoring against tokens, layers and widths"))
    for name in VARIED:
        own, x = along(rows, name)
        for what in ("seconds",) if name == "examples" else ("seconds", "watched"):
            slopes = np.diff([one[what] for one in own]) / np.diff(x)
            print(f"{what} against {name}: slope of the upper half / of the lower {slopes[1] / slopes[0]:.2f}")
    ratios = [one["watched"] / one["forecast"] for one in rows]
    print(f"watched / forecast memory of a batch: {np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    demo = row(load_model("smollm2-135m-instruct"), BASE["examples"])
    print(f"the demo model: {json.dumps(demo)}, ratio {demo['watched'] / demo['forecast']:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
