"""How near forecasts of time come: what is forecast from a calibration, beside what the same work takes.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py

One thread, and CPU time on both sides, so that other work on the machine does not count. The demo model measures, is
scored and answers, and goes through a small `improve`; a tiny random Llama goes through a small study. Prints one row a
case: seconds forecast, with the range of the calibration's rounds, seconds taken, and the ratio of both.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from passes import hooked, laps_in_cpu_time, random_llama  # beside this file

from dean_interp import (
    AnswerConfig,
    DataConfig,
    ModelConfig,
    ScoringConfig,
    generate,
    importance,
    load_behaviour,
    measure,
    show_progress,
)
from dean_interp.models.load import HookedModel
from dean_interp.planning.beside_actual import ForecastBeside, finished_beside_forecast
from dean_interp.planning.rates import TimeSpan
from dean_interp.planning.remembered import pace_here
from dean_interp.planning.stopwatch import timed
from dean_interp.planning.work import Amounts, WorkCounter
from dean_interp.study.improve import run_improve
from dean_interp.study.improvement import ImproveConfig

N_EXAMPLES, N_NEW, SCORE_TOKENS = 12, 32, 512
SMALL_IMPROVE = ImproveConfig(
    register=None, n_score=8, n_choose=4, n_confirm=6, n_flips=2, n_random=0, answers=AnswerConfig(n_answers=0)
)


def show(name: str, span: TimeSpan, actual: float) -> None:
    """Print one row."""
    ends = f"[{span.low:.1f}, {span.high:.1f}]"
    print(f"{name:<58}{span.seconds:>7.1f} {ends:<16}{actual:>7.1f}{span.seconds / actual:>7.2f}", flush=True)


def single_steps(name: str, model: HookedModel) -> None:
    """Measuring, scoring and answering, each alone."""
    pace = pace_here(model, ("forward", "neurons", "weights", "answer"), device="cpu")
    print(f"{name}: {pace.said}{pace.busy and f'; the machine was busy ({pace.busy})'}")
    data, answers = DataConfig(answer_tokens=None), AnswerConfig(answer_lengths=(N_NEW,), answer_batch=N_EXAMPLES)
    counter = WorkCounter(model, "chat", SCORE_TOKENS, data, answers)
    scored = load_behaviour("fairness", n_examples=N_EXAMPLES)
    tests = [load_behaviour(name, n_examples=N_EXAMPLES, split="test") for name in ("privacy", "general")]
    both, response = ("neuron", "weight"), ScoringConfig(batch_tokens=SCORE_TOKENS)
    margin = ScoringConfig(batch_tokens=SCORE_TOKENS, target="margin", signed=True)
    prompts = tests[0].prompts
    # Whatever is set up once: attention and the cache are checked.
    generate(model, prompts[:2], max_new_tokens=2)
    measure(model, [load_behaviour("fairness", n_examples=2, split="test")])
    cases: list[tuple[str, Amounts, Callable[[], object]]] = [
        ("measure, 12 pairs and 12 answers", counter.measured(tests), lambda: measure(model, tests)),
        (
            "answer, 12 prompts, 32 new tokens",
            counter.answered(tests[:1]),
            lambda: generate(model, prompts, max_new_tokens=N_NEW, batch_size=N_EXAMPLES),
        ),
        (
            "score neurons, 12 pairs, margin",
            counter.scored([scored], "neurons", target="margin"),
            lambda: importance(model, scored, config=margin),
        ),
        (
            "score neurons and weights, 12 answers",
            counter.scored([scored], "weights"),
            lambda: importance(model, scored, unit=both, config=response),
        ),
    ]
    for what, amounts, run in cases:
        show(f"{name}: {what}", pace.span(amounts), timed(run).better)


def show_run(name: str, beside: ForecastBeside) -> None:
    """Print a row for each step of a run, and one for all."""
    spans = {step.step: step.span for step in beside.forecast.steps}
    for step in beside.steps:
        show(f"{name}: {step.step}", spans[step.step], step.actual)
    whole = sum((spans[step.step] for step in beside.steps), TimeSpan(0.0, 0.0, 0.0))
    show(f"{name}: in all", whole, beside.in_all.actual)
    print(f"not forecast: {beside.others}", flush=True)


def small_improve(folder: Path) -> None:
    """`improve` on the demo model."""
    with laps_in_cpu_time():
        run_improve(SMALL_IMPROVE, folder)
    show_run("improve", finished_beside_forecast(folder))


def main() -> None:
    """Every case."""
    torch.set_num_threads(1)
    show_progress(False)
    print(f"{'case':<58}{'forecast, s':<24}{'actual':>7}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        single_steps("tiny", hooked(random_llama(n_layers=4, width=128, d_mlp=512, heads=4)))
        single_steps("demo", ModelConfig(device="cpu").load())
        small_improve(Path(folder))


if __name__ == "__main__":
    main()
