"""Do bfloat16 and float16 models select the units that the float32 model selects?

    python analyses/precision.py --n-examples 16

on the demo model (--model for another; --dtypes bfloat16 float16: the second is slow on a CPU). Sums are float32
whatever the weights are. Prints the Jaccard overlap of each behaviour's top and of the coupled units with those of the
float32 model, and for scale that of two halves of the examples in float32 (neurons).
"""

import argparse

from dean_interp import Scores, importance, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.sites import Unit
from dean_interp.selection.coupling import Coupling, couple
from dean_interp.selection.stability import half_overlap, jaccard
from dean_interp.study.settings import FRACTION

NAMES = ("fairness", "privacy", "general")
UNITS: tuple[Unit, ...] = ("neuron", "weight")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--n-examples", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    given = parser.parse_args()
    exact = scored(given.model, "float32", given.n_examples)
    print_row("", [f"{name:>12}" for name in (*NAMES, "coupled")])
    for dtype in given.dtypes:
        rough = scored(given.model, dtype, given.n_examples)
        for unit in UNITS:
            overlaps = overlaps_of(coupled(exact, unit), coupled(rough, unit))
            print_row(f"{dtype}, top {FRACTION[unit]:g} of {unit}s", [f"{overlap:>12.3f}" for overlap in overlaps])
    neurons = [behaviour.of("neuron") for behaviour in exact]
    halves = [half_overlap(behaviour, behaviour, fraction=FRACTION["neuron"]).mean for behaviour in neurons]
    print_row("float32, halves of the examples", [f"{mean:>12.3f}" for mean in halves])


def scored(name: str, dtype: str, n_examples: int) -> list[Scores]:
    """The scores of all three behaviours, both units."""
    model = load_model(name, dtype=dtype)
    behaviours = [load_behaviour(behaviour, n_examples=n_examples) for behaviour in NAMES]
    return [importance(model, behaviour, unit=UNITS).kept() for behaviour in behaviours]


def coupled(scores: list[Scores], unit: Unit) -> Coupling:
    """The coupling of one kind of unit, at the demo's fraction."""
    return couple(*(behaviour.of(unit) for behaviour in scores), fraction=FRACTION[unit])


def overlaps_of(exact: Coupling, rough: Coupling) -> list[float]:
    """Jaccard overlap of the three tops and of the coupled units."""
    pairs = [
        (exact.first, rough.first),
        (exact.second, rough.second),
        (exact.general, rough.general),
        (exact.coupled, rough.coupled),
    ]
    return [jaccard(first, second) for first, second in pairs]


def print_row(name: str, columns: list[str]) -> None:
    """Print one row of the table."""
    print(name.ljust(34) + "".join(columns))


if __name__ == "__main__":
    script(main)
