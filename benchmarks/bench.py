"""Every figure beside its limit and beside the committed baseline; exits with 1 where one got worse.

    make bench               (or: python benchmarks/bench.py)
    make bench-baseline      (or: python benchmarks/bench.py --write-baseline)

`--only scoring generation` measures the figures of some files; then the others are not missed.
`--whole` prints what depends on depth and threads for the demo model's 30 layers, on all cores. It is compared with
nothing, since the baseline is of 6 layers and one thread.
"""

import sys
from typing import Literal

import disk
import experts
import generation
import imports
import measuring
import scoring
import tyro
from figures import BASELINE, compared, measure_figures, measured_and_printed, read_baseline
from figures import write_baseline as note_baseline
from passes import N_LAYERS_OF_DEMO

OF_LAYERS = {"scoring": scoring.figures, "measuring": measuring.figures, "generation": generation.figures}
"""What makes the figures of a file for so many layers."""
FILES = {
    **OF_LAYERS,
    "experts": experts.figures,
    "disk": disk.figures,
    "imports": imports.figures,
}
"""What makes the figures of each file."""
Name = Literal["scoring", "measuring", "generation", "experts", "disk", "imports"]


def main(only: tuple[Name, ...] = (), write_baseline: bool = False, whole: bool = False) -> int:
    """Measure, and compare."""
    if whole:
        for name in OF_LAYERS:
            measured_and_printed(OF_LAYERS[name](N_LAYERS_OF_DEMO), known={})
        return 0
    measured = {}
    for name in only or FILES:
        measured |= measure_figures(FILES[name]())
    known = read_baseline(BASELINE).figures if BASELINE.is_file() else {}
    if write_baseline:
        note_baseline(BASELINE, {**known, **measured} if only else measured)
        return 0
    if only:
        known = {name: then for name, then in known.items() if name in measured}
    verdict = compared(measured, known)
    print(verdict)
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
