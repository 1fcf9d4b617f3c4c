"""How many prompts does it take to find a fall of the mutual information? Simulated studies, no model.

    python analyses/information_power.py --before 1.0 --out runs/power.svg

prints, for falls of `--before` nats by 10 to 75 %, how often a study of one layer with 99 controls finds them, and
draws the same. `--disturbed` is the share of each side's own variance that any ablation replaces: choose it so that the
controls' spread is that of a first run.
"""

import argparse
from pathlib import Path

from dean_interp.cli.ending import script
from dean_interp.information.power import PowerDesign, power_curve, prompts_needed
from dean_interp.report.figures import power_by_prompts
from dean_interp.report.pictures import write_picture

N_PROMPTS = (24, 48, 96, 192, 384, 768)
FALLS = (0.1, 0.25, 0.5, 0.75)


def main() -> None:
    """Simulate, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=float, default=1.0, help="nats before the ablation")
    parser.add_argument("--k", type=int, default=5, help="principal components a side")
    parser.add_argument("--n-controls", type=int, default=99)
    parser.add_argument("--disturbed", type=float, default=0.1)
    parser.add_argument("--n-trials", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/power.svg"))
    given = parser.parse_args()
    design = PowerDesign(given.k, given.n_controls, given.disturbed)
    # Fewer prompts have no estimate.
    sizes = [n for n in N_PROMPTS if n >= 2 * given.k + 2]
    curves = {}
    print(f"{'fall':>18}  " + "  ".join(f"{n:>5}" for n in sizes) + "   for 80 %")
    for fall in (0.0, *FALLS):
        after = (1 - fall) * given.before
        name = f"{given.before:.2f} to {after:.2f} nats"
        rates = power_curve(sizes, before=given.before, after=after, design=design, n_trials=given.n_trials)
        needed: int | str | None = "-"
        # No fall at all shows how often a study finds one that is not there.
        if fall:
            needed = prompts_needed(before=given.before, after=after, design=design, n_trials=given.n_trials)
            curves[name] = rates
        print(f"{name:>18}  " + "  ".join(f"{rate:5.2f}" for rate in rates) + f"   {needed}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    picture = power_by_prompts(curves, sizes, n_trials=given.n_trials)
    write_picture(picture, given.out.parent, given.out.stem, "Power by the number of prompts")
    print(f"picture: {given.out.resolve()}, its data as CSV beside it")


if __name__ == "__main__":
    script(main)
