"""Where the coupling of both units stands between floor and ceiling, and how much of it other examples would give.

    python analyses/coupling_stability.py --n-examples 48

on the demo model (--model for another). Weights take a second pass over the examples for the 2 % of each matrix that
were kept. Jaccard overlaps are of tops from halves of the examples, [middle 95 % of random splits]: a range over
splits, no interval over prompts. `household` (cooking, gardening, repairs) is a set that has nothing to do with
fairness or privacy.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from dean_interp import Behaviour, Scores, Selection, importance, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel
from dean_interp.scoring.per_example import with_groups
from dean_interp.selection.coupling import Coupling, couple
from dean_interp.selection.stability import (
    STABLE_PROBABILITY,
    Halves,
    chance_overlap,
    expected_overlap,
    half_overlap,
    selection_probability,
    stable,
)
from dean_interp.selection.strata import strata

NAMES = ("fairness", "privacy", "general")
HOUSEHOLD = ("cooking", "gardening", "home-repairs", "bicycle-repair", "household-budget", "travel-packing")


def main() -> None:
    """Score, group, and print both units."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--n-examples", type=int, default=48)
    given = parser.parse_args()
    model = load_model(given.model)
    behaviours = [load_behaviour(name, n_examples=given.n_examples) for name in NAMES]
    behaviours.append(household(given.n_examples))
    scores = [importance(model, behaviour, unit=("neuron", "weight")).kept() for behaviour in behaviours]
    # Neuron scores hold groups of examples; weights need a further pass.
    *three, other = [of_behaviour.of("neuron") for of_behaviour in scores]
    report(model, three, other, fraction=0.01, n_draws=200)
    grouped = []
    for of_behaviour, behaviour in zip(scores, behaviours, strict=True):
        grouped.append(with_groups(model, of_behaviour, behaviour).of("weight"))
    *three, other = grouped
    report(model, three, other, fraction=1e-4, n_draws=50)


def household(n_examples: int) -> Behaviour:
    """Topics of the general set as a behaviour of their own."""
    general = load_behaviour("general", n_examples=None)
    examples = tuple(example for example in general.examples if example.topic in HOUSEHOLD)
    return replace(general, name="household", examples=examples[:n_examples])


def report(model: HookedModel, scores: Sequence[Scores], other: Scores, *, fraction: float, n_draws: int) -> None:
    """Print one unit's lines."""
    coupling = couple(*scores, fraction=fraction)
    matched = strata(model, scores, general=scores[2])
    floor = chance_overlap(coupling.first, coupling.second, matched, excluded=coupling.general)
    independent = expected_overlap(coupling.first, coupling.second)
    print(f"\n{scores[0].units[0]}s, top {fraction:g}: sizes {coupling.sizes()}")
    print(f"in both tops {len(coupling.both)}, if they were independent {independent:.1f}")
    chance = f"{floor.expected:.0f} [{floor.low:.0f}, {floor.high:.0f}]"
    print(f"coupled {floor.n}; strata alone give {chance}, p = {floor.p:.3f}")
    first, second, _ = scores
    print(f"fairness with privacy, halves   {shown(half_overlap(first, second, fraction=fraction))}")
    for behaviour in (first, second):
        overlap = half_overlap(behaviour, other, fraction=fraction)
        print(f"{behaviour.behaviour + ' with household, halves':<31} {shown(overlap)}")
    for behaviour in scores:
        overlap = half_overlap(behaviour, behaviour, fraction=fraction)
        print(f"{behaviour.behaviour + ' with itself, halves':<31} {shown(overlap)}")
    print_stability(scores, coupling, fraction, n_draws)


def print_stability(scores: Sequence[Scores], coupling: Coupling, fraction: float, n_draws: int) -> None:
    """Print how many of the coupled units new draws of the examples would select."""

    def select(drawn: Sequence[Scores]) -> Selection:
        return couple(*drawn, fraction=fraction).coupled

    probability = selection_probability(scores, select, n_draws=n_draws)
    n_often = sum(int((share >= STABLE_PROBABILITY).sum()) for share in probability.values())
    of_coupled = [probability[site].flatten()[units] for site, units in coupling.coupled.units.items()]
    median = float(torch.cat(of_coupled).median())
    n_stable = len(stable(probability, coupling.coupled))
    print(f"of {len(coupling.coupled)} coupled, {n_stable} are selected on at least 80 % of new draws of the examples")
    print(f"(median {median:.2f}); {n_often} units in all are selected as often")


def shown(halves: Halves) -> str:
    """Mean and range."""
    return f"{halves.mean:.3f} [{halves.low:.3f}, {halves.high:.3f}]"


if __name__ == "__main__":
    script(main)
