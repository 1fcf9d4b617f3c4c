"""What scoring costs beside plain passes over the same batches, and how near its peak of memory is predicted."""

import threading
from collections.abc import Callable

import psutil
from figures import REPEATS, Figure, interleaved
from passes import BOTH, N_LAYERS, forward_and_backward, hooked, like_demo, released_schedule, score

from dean_interp import Behaviour, ScoringConfig, importance, load_behaviour
from dean_interp.models.load import HookedModel
from dean_interp.planning.scoring import plan
from dean_interp.scoring.preparation import prepare


def figures(n_layers: int = N_LAYERS) -> list[Figure]:
    """Scoring on so many layers of the demo model's widths."""
    model = hooked(like_demo(n_layers))
    behaviour = load_behaviour("fairness", n_examples=6)
    rows = prepare(model, behaviour, ScoringConfig()).rows
    return [
        Figure(
            name="scoring neurons / a pass forward and back without parameter gradients",
            limit=1.0,
            bound="the plain pass",
            ratios=lambda: interleaved(
                lambda: score(model, behaviour, ("neuron",)),
                lambda: forward_and_backward(model, rows, parameters=False),
            ),
        ),
        Figure(
            name="scoring neurons and weights / a pass forward and back with parameter gradients",
            limit=1.0,
            bound="the plain pass, which makes the embedding's gradients, too",
            ratios=lambda: interleaved(
                lambda: score(model, behaviour, BOTH), lambda: forward_and_backward(model, rows, parameters=True)
            ),
        ),
        Figure(
            name=f"scoring neurons and weights / the released schedule, {n_layers} layers",
            limit=1 / n_layers,
            bound="one pass in place of one a layer",
            ratios=lambda: interleaved(lambda: score(model, behaviour, BOTH), lambda: released_schedule(model, rows)),
        ),
        Figure(
            name="scoring in batches of 512 tokens / of 2048",
            limit=1.0,
            bound="where caches do not matter",
            ratios=lambda: interleaved(
                lambda: score(model, behaviour, BOTH), lambda: score(model, behaviour, BOTH, 2048)
            ),
        ),
        Figure(
            name="peak memory of scoring, measured and predicted: the larger / the smaller",
            limit=1.0,
            bound="a prediction that is right",
            ratios=lambda: [peak_error(model, behaviour) for _ in range(REPEATS)],
        ),
    ]


def peak_error(model: HookedModel, behaviour: Behaviour) -> float:
    """How far the measured peak of the process's memory is from the predicted one, as a factor."""
    planned = plan(model, behaviour, unit=BOTH)
    peak = peak_bytes(lambda: importance(model, behaviour, unit=BOTH, config=planned.apply(ScoringConfig())))
    return max(peak, planned.peak_bytes) / min(peak, planned.peak_bytes)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that the process held during a call."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak
