"""What costs grow with: examples, tokens, layers, widths, units that are silenced, controls.

    python benchmarks/curves.py --out benchmarks/curves.json

Random Llamas on one thread, one thing varied at a time. Cost is the better of wall and CPU time, the least of two
runs. Each row is printed as soon as it is measured: of scoring also the memory of the largest batch by
`planning.scoring`, which watches passes, and by `planning.memory`, which runs none. Draws the curves beside `--out`,
and ends with exponents: the slope of the logarithm of the cost over that of what varied (1: proportional).
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from passes import BOTH, hooked, laps_in_cpu_time, random_llama, score  # beside this file

from dean_interp import (
    AnswerConfig,
    Behaviour,
    CalibrationConfig,
    ControlConfig,
    DataConfig,
    ModelConfig,
    ScoringConfig,
    StudyConfig,
    ablate,
    load_behaviour,
    load_model,
    measure,
    show_progress,
    top_fraction,
)
from dean_interp.files import read_json
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.sites import Unit
from dean_interp.models.tokens import row_length
from dean_interp.planning.memory import batch_bytes
from dean_interp.planning.scoring import _HEAP, _Probe
from dean_interp.planning.stopwatch import timed
from dean_interp.report.look import BLUE
from dean_interp.report.pictures import Picture, styled, write_picture
from dean_interp.scoring.methods import random
from dean_interp.scoring.preparation import prepare
from dean_interp.study.run import run_study

_APART = 1.3
"""Least ratio of two costs whose ticks do not overlap."""
BASE = {"layers": 4, "width": 256, "MLP width": 1024, "examples": 8, "answer": 1}
SCORED = {
    "examples": (4, 8, 16),
    "answer": (1, 3, 6),
    "layers": (2, 4, 8),
    "width": (128, 256, 512),
    "MLP width": (512, 1024, 2048),
}
SILENCED: dict[Unit, tuple[float, ...]] = {"neuron": (0.003, 0.03, 0.3), "weight": (1e-5, 1e-4, 1e-3)}
CONTROLS = (2, 4, 8)
HOW = ScoringConfig(template="raw", batch_tokens=512)


@dataclass(frozen=True)
class Point:
    """One measured cost."""

    varied: str
    value: float
    seconds: float
    watched: float | None = None
    """MiB of the largest batch of scoring, by watching passes."""
    forecast: float | None = None
    """MiB of it, without a pass."""


def least_seconds(run: Callable[[], object]) -> float:
    """The least of two runs."""
    return min(timed(run).better for _ in range(2))


def behaviour_of(n_examples: int, times: int) -> Behaviour:
    """Examples whose answers are so many times as long."""
    behaviour = load_behaviour("privacy", n_examples=n_examples)
    longer = []
    for example in behaviour.examples:
        longer.append(
            replace(example, answers={name: " ".join([text] * times) for name, text in example.answers.items()})
        )
    return replace(behaviour, examples=tuple(longer))


def model_of(settings: dict[str, int]) -> HookedModel:
    """A random Llama; its heads have 64 dimensions, every fourth a key and value of its own."""
    heads = settings["width"] // 64
    return hooked(
        random_llama(
            n_layers=settings["layers"],
            width=settings["width"],
            d_mlp=settings["MLP width"],
            heads=heads,
            kv_heads=max(1, heads // 4),
            tied=False,
        )
    )


def scored_point(name: str, value: int) -> Point:
    """Scoring neurons and weights of one behaviour."""
    settings = BASE | {name: value}
    model, behaviour = model_of(settings), behaviour_of(settings["examples"], settings["answer"])
    seconds = least_seconds(lambda: score(model, behaviour, BOTH))
    watched, forecast, n_tokens = memory_of(model, behaviour)
    x = {"examples": settings["examples"], "answer": n_tokens / settings["examples"]}.get(name, value)
    return Point("tokens an example" if name == "answer" else name, x, seconds, watched, forecast)


def memory_of(model: HookedModel, behaviour: Behaviour) -> tuple[float, float, int]:
    """MiB of the largest batch, watched and forecast; and the number of tokens."""
    data = prepare(model, behaviour, HOW)
    probe = _Probe(model, data, neuron_sites(model), HOW)
    rows = sorted(data.rows, key=lambda row: -row_length(row))
    longest = row_length(rows[0])
    n_rows = max(1, 512 // longest)
    watched = probe.batch_bytes()(n_rows, longest) / _HEAP
    forecast = batch_bytes(model, rows[:n_rows], n_rows * longest, "float32")
    return watched / 2**20, forecast / 2**20, sum(map(row_length, rows))


def silenced_points(unit: Unit) -> list[Point]:
    """Measuring while more and more units are silenced."""
    model = model_of(BASE)
    tests = [load_behaviour("fairness", n_examples=8, split="test")]
    scores = random(model, tests[0], unit=unit)
    points = []
    for fraction in SILENCED[unit]:
        chosen = top_fraction(scores, fraction)

        def run(chosen: object = chosen) -> None:
            with ablate(model, chosen):
                measure(model, tests, template="raw")

        points.append(Point(f"{unit}s silenced", len(chosen), least_seconds(run)))
    return points


def control_points(folder: Path) -> list[Point]:
    """The step of a study of neurons in which the edit and its controls are measured."""
    random_llama(n_layers=2, width=128, d_mlp=512, heads=2).save_pretrained(folder / "tiny")
    load_model(DEMO_MODEL).tokenizer.save_pretrained(folder / "tiny")
    points = []
    for n_controls in CONTROLS:
        config = StudyConfig(
            model=ModelConfig(str(folder / "tiny")),
            data=DataConfig(n_test=12, n_general_test=12),
            calibration=CalibrationConfig(n_calibration=12),
            controls=ControlConfig(n_random=n_controls, n_equal_kl=0),
            answers=AnswerConfig(n_answers=0),
            unit=("neuron",),
            neuron_fraction=0.1,
        )
        with laps_in_cpu_time():
            run_study(config, folder / str(n_controls))
        seconds = read_json(folder / str(n_controls) / "times.json", dict[str, float])
        points.append(Point("controls", n_controls, seconds["neurons: edit and controls"]))
    return points


def exponent(points: list[Point]) -> float:
    """The slope of a line through the logarithms of cost and of what varied."""
    x, y = np.log([point.value for point in points]), np.log([point.seconds for point in points])
    return float(np.polyfit(x, y, 1)[0])


def curves(series: dict[str, list[Point]]) -> Picture:
    """Cost against each thing, both axes logarithmic, with the line whose slope is the exponent."""
    with styled():
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        panels = figure.subplots(2, (len(series) + 1) // 2).flatten()
        for axes, (name, points) in zip(panels, series.items(), strict=False):
            x = np.array([point.value for point in points])
            y = np.array([point.seconds for point in points])
            slope, start = np.polyfit(np.log(x), np.log(y), 1)
            axes.loglog(x, y, "o", color=BLUE)
            axes.loglog(x, np.exp(start) * x**slope, color="0.6")
            axes.set_xlabel(f"{name}: exponent {slope:.2f}")
            axes.set_ylabel("seconds")
            axes.set_ylim(y.min() / 3, y.max() * 3)
            # Ticks are what was measured. Those of a logarithmic axis are mathematics, which is text here.
            axes.minorticks_off()
            axes.set_xticks(x, [f"{value:.0f}" for value in x])
            ends = [y.min(), y.max()] if y.max() > _APART * y.min() else [y.max()]
            axes.set_yticks(ends, [f"{value:.2g}" for value in ends])
        for axes in panels[len(series) :]:
            axes.remove()
    rows = []
    for points in series.values():
        for point in points:
            memory = {"watched_mib": point.watched, "forecast_mib": point.forecast}
            rows.append({"varied": point.varied, "value": point.value, "seconds": point.seconds, **memory})
    return Picture(
        figure, pd.DataFrame(rows), "the better of two runs a point", "The line has the exponent as its slope."
    )


def measured(folder: Path, out: Path) -> dict[str, list[Point]]:
    """Every series; each point is printed, and written, as soon as it is there."""
    series: dict[str, list[Point]] = {}

    def note(points: list[Point]) -> None:
        for point in points:
            series.setdefault(point.varied, []).append(point)
            print(json.dumps(asdict(point)), flush=True)
        points_by_name = {name: list(map(asdict, each)) for name, each in series.items()}
        out.write_text(json.dumps(points_by_name, indent=1) + "\n", encoding="utf-8")

    for name, values in SCORED.items():
        for value in values:
            note([scored_point(name, value)])
    for unit in SILENCED:
        note(silenced_points(unit))
    note(control_points(folder))
    return series


def main(out: Path = Path("benchmarks/curves.json")) -> None:
    """Every row, then the exponents."""
    torch.set_num_threads(1)
    show_progress(False)
    scored_point("layers", 1)  # whatever is set up once
    with tempfile.TemporaryDirectory() as folder:
        series = measured(Path(folder), out)
    write_picture(curves(series), out.parent, out.stem, "Cost against what it grows with")
    for name, points in series.items():
        print(f"cost against {name}: exponent {exponent(points):.2f}")
    known = [point for points in series.values() for point in points if point.watched and point.forecast]
    ratios = [(point.watched or 0.0) / (point.forecast or 1.0) for point in known]
    print(f"watched / forecast memory of a batch: {np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
