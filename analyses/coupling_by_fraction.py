"""How many units are coupled at each fraction, beside what independent rankings would give.

    python analyses/coupling_by_fraction.py runs/study            (or: runs/study weight)

Reads the scores of a finished (or half-finished) run folder; nothing is scored again. Under independence the top
fractions p of two rankings share p * p of the units, and p * p * (1 - p) of them would count as coupled.
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from dean_interp import InputError, load_scores
from dean_interp.cli.ending import script
from dean_interp.models.sites import Unit
from dean_interp.selection.coupling import couple
from dean_interp.selection.stability import jaccard


def main(folder: Positional[Path], unit: Positional[Unit] = "neuron") -> None:
    """Print one line a fraction."""
    files = sorted((folder / "scores").glob("*.safetensors"))
    scores = {path.name.split(".")[0]: load_scores(path).of(unit) for path in files}
    general = scores.pop("general", None)
    if general is None or len(scores) != 2:
        raise InputError(f"{folder} must hold the scores of two behaviours and of general, got {[*scores]}")
    first, second = scores.values()
    n_units = sum(value.numel() for value in general.values.values())
    print(f"{first.behaviour} and {second.behaviour}, {n_units} {unit}s; Jaccard of the two tops in the last column")
    print(f"{'fraction':>8} {'top':>6} {'both':>6} {'by chance':>9} {'coupled':>7} {'by chance':>9} {'Jaccard':>7}")
    for fraction in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        coupling = couple(first, second, general, fraction=fraction)
        sizes = coupling.sizes()
        share = sizes["first"] / n_units
        both_by_chance = share**2 * n_units
        coupled_by_chance = both_by_chance * (1 - share)
        print(
            f"{fraction:>8} {sizes['first']:>6} {sizes['both']:>6} {both_by_chance:>9.1f} {sizes['coupled']:>7} "
            f"{coupled_by_chance:>9.1f} {jaccard(coupling.first, coupling.second):>7.2f}"
        )


if __name__ == "__main__":
    script(lambda: tyro.cli(main, description=__doc__))
