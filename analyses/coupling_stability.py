"""Where the coupling of both units stands between floor and ceiling, and how much of it other examples would give.

    python analyses/coupling_stability.py --n-examples 48

on the demo model (--model for another). Weights take a second pass over the examples for the 2 % of each matrix that
were kept. Jaccard overlaps are of tops from halves of the examples, [middle 95 % of random splits]; `household`
(cooking, gardening, repairs) is a set that has nothing to do with fairness or privacy.
"""

import argparse
from dataclasses import replace

import torch

from dean_interp import Behaviour, Scores, couple, importance, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel
from dean_interp.scoring.per_example import with_groups
from dean_interp.selection.stability import (
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


def shown(halves: Halves) -> str:
    """Mean and range."""
    return f"{halves.mean:.3f} [{halves.low:.3f}, {halves.high:.3f}]"


def household(n_examples: int) -> Behaviour:
    """Topics of the general set as a behaviour of their own."""
    rows = load_behaviour("general", n_examples=None)
    examples = tuple(row for row in rows.examples if row.topic in HOUSEHOLD)[:n_examples]
    return replace(rows, name="household", examples=examples)


def report(model: HookedModel, scores: list[Scores], other: Scores, fraction: float, n_draws: int) -> None:
    """Print one unit's lines."""
    found = couple(*scores, fraction=fraction)
    floor = chance_overlap(found.first, found.second, strata(model, scores, general=scores[2]), excluded=found.general)
    independent = expected_overlap(found.first, found.second)
    print(f"\n{scores[0].units[0]}s, top {fraction:g}: sizes {found.sizes()}")
    print(f"in both tops {len(found.both)}, if they were independent {independent:.1f}")
    chance = f"{floor.expected:.0f} [{floor.low:.0f}, {floor.high:.0f}]"
    print(f"coupled {floor.n}; strata alone give {chance}, p = {floor.p:.3f}")
    print(f"fairness with privacy, halves   {shown(half_overlap(scores[0], scores[1], fraction=fraction))}")
    for one in scores[:2]:
        print(f"{one.behaviour + ' with household, halves':<31} {shown(half_overlap(one, other, fraction=fraction))}")
    for one in scores:
        print(f"{one.behaviour + ' with itself, halves':<31} {shown(half_overlap(one, one, fraction=fraction))}")
    probability = selection_probability(
        scores, lambda drawn: couple(*drawn, fraction=fraction).coupled, n_draws=n_draws
    )
    n_often = sum(int((share >= 0.8).sum()) for share in probability.values())
    shares = torch.cat([probability[site].flatten()[units] for site, units in found.coupled.units.items()])
    n_stable = len(stable(probability, found.coupled))
    print(f"of {len(found.coupled)} coupled, {n_stable} are selected on at least 80 % of new draws of the examples")
    print(f"(median {float(shares.median()):.2f}); {n_often} units in all are selected as often")


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
    *three, other = [one.of("neuron") for one in scores]
    report(model, three, other, 0.01, 200)
    grouped = [with_groups(model, one, behaviour) for one, behaviour in zip(scores, behaviours, strict=True)]
    *three, other = [one.of("weight") for one in grouped]
    report(model, three, other, 1e-4, 50)


if __name__ == "__main__":
    script(main)
