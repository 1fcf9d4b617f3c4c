"""The paper's coupling (set intersection) against the released code's selection: sizes, overlap, and what each moves.

    python analyses/released_code_effect.py --out runs/released

on the demo model (--model for another). Both select weights from the same scores; the released procedure runs twice,
with either behaviour first, since it depends on the order. As sets of different size prove nothing, each is thinned to
one size in every matrix, at random, some draws each; random weights outside both are the control. Resumes; writes
results.json, report.html and a figure.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from dean_interp.study.folder import owned
from tyro.conf import OmitArgPrefixes

from dean_interp import Selection, couple, load_model, random_like
from dean_interp.cli.ending import script
from dean_interp.evaluation.outcomes import Line
from dean_interp.models.sites import Site
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.selection.coupling import Coupling
from dean_interp.selection.released import released_coupling
from dean_interp.selection.stability import jaccard
from dean_interp.selection.strata import strata
from dean_interp.study.arms import LOSS, ArmResults, Arms, averaged, command, compared, margins
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import score_into


@dataclass(frozen=True)
class ReleasedEffect:
    """Correct coupling against the released selection, equal size."""

    out: Path = Path("runs/released")
    n_draws: int = 3
    """Random thinnings of each set; their outcomes are averaged."""
    n_controls: int = 19
    quick: bool = False
    """One thinning, four controls."""
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(n_answers=0, units=("weight",)))


def run(given: ReleasedEffect) -> ArmResults:
    """All arms, from their files where they were taken before."""
    config = given.study
    n_draws, n_controls = (1, 4) if given.quick else (given.n_draws, given.n_controls)
    config.check()
    calibration = config.calibration()
    tests, _ = config.tests(calibration)
    settings = {"study": dataclasses.asdict(config), "n_draws": n_draws}
    with owned(given.out, settings, [*calibration, *tests]):
        arms = Arms(config, given.out, tests)
        model = load_model(config.model, device=config.device, dtype=config.dtype)
        original = arms.take("original", model)
        first, second, general = (score_into(given.out, model, one, config).of("weight") for one in calibration)
        found = couple(first, second, general, fraction=config.weight_fraction)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is no intersection is what is shown here
            fraction = found.fractions[0]
            sets = {
                "coupled": found.coupled,
                f"released, {second.behaviour} first": released_coupling(second, first, general, fraction=fraction),
                f"released, {first.behaviour} first": released_coupling(first, second, general, fraction=fraction),
            }
        counts = {site: min(len(one.units[site]) for one in sets.values()) for site in found.coupled.shapes}
        taken = {}
        for name, one in sets.items():
            drawn = [thinned(one, counts, seed) for seed in range(n_draws)]
            taken[name] = averaged([arms.take(f"{name}, draw {i}", model, each) for i, each in enumerate(drawn)])
        union = sets["coupled"] | list(sets.values())[1] | list(sets.values())[2]
        matched = strata(model, [first, second, general])
        imitated, others = thinned(found.coupled, counts, 0), []
        for i in progress_bar(range(n_controls), desc="random weights", unit="control"):
            drawn = random_like(imitated, matched, seed=config.seed * 1000 + i) - union
            others.append(arms.take(f"random {i}", model, drawn))
        lines = compared(original, taken, dict.fromkeys(taken, others))
        said = told(sets, found, lines, sum(counts.values()))
        facts = {"thinned": f"to the smallest of the three sets in every matrix, {n_draws} random draws each",
                 "controls": f"{n_controls} random sets of weights in none of the three, matched by matrix and stratum",
                 "test prompts": f"{len(tests[0])} of each behaviour",
                 "command": command()}  # fmt: skip
        title = f"Set intersection against the released code's selection in {config.model}"
        results = ArmResults(title, config.model, facts, said, lines)
        figure = changes_by_arm(results.margins, "change (nats per token)")
        page = write_arms_report(results, given.out, {"Margins by selection": figure})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def told(
    sets: Mapping[str, Selection], found: Coupling, lines: Mapping[str, tuple[Line, ...]], n: int
) -> tuple[str, ...]:
    """What the sets share, and what each moves when `n` of its weights are silenced."""
    overlaps = "; ".join(
        f"{name} {len(one)}, of which {len(one & found.both)} are important to both behaviours, Jaccard overlap with "
        f"the coupled {jaccard(one, found.coupled):.2f}"
        for name, one in sets.items()
    )
    swapped = jaccard(*list(sets.values())[1:])
    said = [f"Weights in each set: {overlaps}. When the data sets change places, the released selections share "
            f"{swapped:.2f} (Jaccard); the coupled set does not change."]  # fmt: skip
    for name, some in lines.items():
        moved = [f"{on} {line.change} (rank among random {line.rank:.2f})" for on, line in margins(some).items()]
        loss = next(line.change.mean for line in some if line.metric == LOSS)
        said.append(f"{name}, {n} weights: margins {', '.join(moved)}; loss on general answers {loss:+.3f}.")
    return tuple(said)


def thinned(selection: Selection, counts: Mapping[Site, int], seed: int) -> Selection:
    """So many units of every site, at random."""
    units = {}
    for i, (site, count) in enumerate(counts.items()):
        generator = torch.Generator().manual_seed(seed * 100_003 + i)
        order = torch.randperm(len(selection.units[site]), generator=generator)[:count]
        units[site] = selection.units[site][order].sort().values
    return Selection(units, selection.shapes, selection.prompt_hashes)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(ReleasedEffect, description=__doc__)))
