"""Do first-order scores rank neurons by what silencing them really does?

    python analyses/scores_against_ablation.py --n-neurons 60 --n-examples 8

on the demo model (--model for another).

A sample of neurons, spread evenly over the ranks of the gradient score in every layer, is silenced one by one. The real
change of each example's loss, absolute and averaged, is compared with the score by Spearman's rank correlation.
Magnitude and random scores are what a score has to beat. The ratio of the real change to the score says where first
order fails: it should be 1. The interval is a bootstrap over neurons: they are what is sampled here, not prompts.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import bootstrap, spearmanr

from dean_interp import Behaviour, Scores, ScoringConfig, Selection, ablate, importance, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_shapes
from dean_interp.models.tokens import collate
from dean_interp.progress import progress_bar
from dean_interp.scoring.capture import stream_activations
from dean_interp.scoring.methods import activation_contrast, magnitude, random
from dean_interp.scoring.preparation import prepare


def main() -> None:
    """Print one line a score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--behaviour", default="privacy")
    parser.add_argument("--n-examples", type=int, default=8)
    parser.add_argument("--n-neurons", type=int, default=60)
    given = parser.parse_args()
    model = load_model(given.model)
    behaviour = load_behaviour(given.behaviour, n_examples=given.n_examples)
    scores = {
        "gradient": importance(model, behaviour),
        "activation contrast": activation_contrast(model, behaviour),
        "magnitude": magnitude(model, behaviour),
        "random": random(model, behaviour),
    }
    neurons = spread_over_ranks(model, scores["gradient"], given.n_neurons)
    changes = np.array(measured_changes(model, behaviour, neurons))
    print(
        f"{len(neurons)} neurons, {len(behaviour)} examples of {behaviour.name}; changes {changes.min():.2g} to "
        f"{changes.max():.2g} nats"
    )
    print_ratios(neurons, changes, scores["gradient"])
    for name, of_method in scores.items():
        values = np.array([float(of_method[site][index]) for site, index in neurons])
        rho, low, high = correlation(values, changes)
        print(f"{name:<20} Spearman {rho:+.2f} [{low:+.2f}, {high:+.2f}]")


def spread_over_ranks(model: HookedModel, scores: Scores, n_neurons: int) -> list[tuple[Site, int]]:
    """Neurons from all layers in turn, spread evenly over the ranks of their scores."""
    sites = neuron_sites(model)
    ranked = {site: scores[site].argsort(descending=True) for site in sites}
    neurons = []
    fewest = min(width for (width,) in neuron_shapes(model).values())
    for number in np.linspace(0, len(sites) * fewest - 1, n_neurons).astype(int).tolist():
        site = sites[number % len(sites)]
        neurons.append((site, int(ranked[site][number // len(sites)])))
    return neurons


def measured_changes(model: HookedModel, behaviour: Behaviour, neurons: Sequence[tuple[Site, int]]) -> list[float]:
    """The mean absolute change of the examples' losses when each neuron is silenced, nats."""
    batch = collate(prepare(model, behaviour, ScoringConfig()).rows, device=model.cfg.device)

    def losses() -> torch.Tensor:
        return stream_activations(model, batch, [], lambda site, x: None).double().cpu()

    before, changes = losses(), []
    shapes = neuron_shapes(model)
    for site, index in progress_bar(neurons, desc="silencing one neuron at a time"):
        units = {each: torch.tensor([index] if each == site else [], dtype=torch.int64) for each in shapes}
        with ablate(model, Selection(units, shapes)):
            changes.append(float((losses() - before).abs().mean()))
    return changes


def print_ratios(neurons: Sequence[tuple[Site, int]], changes: np.ndarray, scores: Scores) -> None:
    """Print the real change over the score, by quarter of the score and for the highest scores."""
    predicted = np.array([float(scores[site][index]) for site, index in neurons])
    ratios = changes / predicted
    lowest_first = predicted.argsort()
    quarters = np.array_split(ratios[lowest_first], 4)
    medians = ", ".join(f"{np.median(quarter):.2f}" for quarter in quarters)
    print(f"real change / first-order score, median by quarter of the score, lowest first: {medians}")
    highest = []
    for number in lowest_first[::-1][:5]:
        site, index = neurons[number]
        highest.append(f"{site}[{index}] {ratios[number]:.2f}")
    print("the five highest scores: " + ", ".join(highest))


def correlation(values: np.ndarray, changes: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation with a 95 % bootstrap interval over neurons."""
    drawn = bootstrap(
        (values, changes),
        lambda a, b: spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = drawn.confidence_interval
    return float(spearmanr(values, changes).statistic), interval.low, interval.high


if __name__ == "__main__":
    script(main)
