"""Do bfloat16 and float16 models select the units that the float32 model selects?

    python analyses/precision.py --n-examples 16

on the demo model (--model for another; --dtypes bfloat16 float16: the second is slow on a CPU). Sums are float32
whatever the weights are. Prints the Jaccard overlap of each behaviour's top and of the coupled units with those of the
float32 model, and for scale that of two halves of the examples in float32 (neurons).
"""

import argparse

from dean_interp import Scores, couple, importance, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.selection.stability import half_overlap, jaccard

NAMES = ("fairness", "privacy", "general")
FRACTIONS = {"neuron": 0.01, "weight": 1e-4}


def scored(name: str, dtype: str, n_examples: int) -> list[Scores]:
    """All three behaviours, both units."""
    model = load_model(name, dtype=dtype)
    behaviours = [load_behaviour(each, n_examples=n_examples) for each in NAMES]
    return [importance(model, behaviour, unit=("neuron", "weight")).kept() for behaviour in behaviours]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--n-examples", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    given = parser.parse_args()
    exact = scored(given.model, "float32", given.n_examples)
    print(f"{'':<34}" + "".join(f"{name:>12}" for name in (*NAMES[:2], "general", "coupled")))
    for dtype in given.dtypes:
        rough = scored(given.model, dtype, given.n_examples)
        for unit, fraction in FRACTIONS.items():
            one, other = (couple(*(each.of(unit) for each in some), fraction=fraction) for some in (exact, rough))
            parts = ("first", "second", "general", "coupled")
            overlaps = [jaccard(getattr(one, part), getattr(other, part)) for part in parts]
            print(f"{dtype}, top {fraction:g} of {unit}s".ljust(34) + "".join(f"{value:>12.3f}" for value in overlaps))
    neurons = [each.of("neuron") for each in exact]
    halves = [half_overlap(each, each, fraction=FRACTIONS["neuron"]).mean for each in neurons]
    print("float32, halves of the examples".ljust(34) + "".join(f"{value:>12.3f}" for value in halves))


if __name__ == "__main__":
    script(main)
