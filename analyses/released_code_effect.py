"""The paper's coupling (set intersection) against the released code's selection: sizes, overlap, and what each moves.

    python analyses/released_code_effect.py --out runs/released

on the demo model (--model for another). Both select weights from the same scores; the released procedure runs twice,
with either behaviour first, since it depends on the order. As sets of different size prove nothing, each is thinned to
one size in every matrix, at random, some draws each; random weights outside both are the control. Resumes; writes
results.json, report.html and a picture (SVG, CSV).
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Scores, Selection
from dean_interp.cli.ending import command, script
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import LOSS, Outcome, averaged
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.selection.coupling import Coupling, couple
from dean_interp.selection.released import released_coupling
from dean_interp.selection.stability import jaccard
from dean_interp.selection.strata import Strata, strata
from dean_interp.study import day
from dean_interp.study.arm_results import ArmResults, arm, arm_outcomes, arms_plan, margin_lines
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import random_control
from dean_interp.study.method import score
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.state_outcomes import MeasurementPlan
from dean_interp.study.store import ORIGINAL
from dean_interp.study.study_data import calibration_sets, test_sets


@dataclass(frozen=True)
class ReleasedEffect:
    """Correct coupling against the released selection, equal size."""

    out: Path = Path("runs/released")
    """The run folder."""
    n_draws: int = 3
    """Number of random thinnings of each set; their outcomes are averaged."""
    n_controls: int = 19
    """Number of random sets."""
    quick: bool = False
    """Run one thinning and four controls."""
    study: OmitArgPrefixes[StudyConfig] = field(
        default_factory=lambda: StudyConfig(unit=("weight",), answers=AnswerConfig(n_answers=0))
    )


def run(given: ReleasedEffect) -> ArmResults:
    """All arms, from the store where they were measured before."""
    if given.quick:
        given = dataclasses.replace(given, n_draws=1, n_controls=4)
    config = given.study
    config.check()
    calibration = calibration_sets(config.data, config.calibration)
    tests, _ = test_sets(config.data, calibration)
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), [*calibration, *tests]):
        plan = arms_plan(config, given.out, tests)
        model = day.of_evaluation(config.model, given.out, ()).load()
        original = arm_outcomes(plan, ORIGINAL, model)
        scores = [score(model, behaviour, config, given.out).of("weight") for behaviour in calibration]
        coupling = couple(*scores, fraction=config.weight_fraction)
        selections = {"coupled": coupling.coupled} | released(scores, coupling.fractions[0])
        counts = smallest_counts(selections)
        outcomes = thinned_outcomes(plan=plan, model=model, selections=selections, counts=counts, n_draws=given.n_draws)
        controls = control_outcomes(
            plan=plan, given=given, model=model, selections=selections, counts=counts, matched=strata(model, scores)
        )
        lines = compare_each(original, outcomes, dict.fromkeys(outcomes, controls))
        results = ArmResults(
            title=f"Set intersection against the released code's selection in {config.model.title}",
            model=config.model.title,
            facts=facts(given, n_test=len(tests[0])),
            conclusions=conclusions(selections, coupling, lines, sum(counts.values())),
            arms=lines,
        )
        picture = changes_by_arm(results.margins, "change (nats per token)")
        page = write_arms_report(results, given.out, {"Margins by selection": picture})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def released(scores: Sequence[Scores], fraction: float) -> dict[str, Selection]:
    """What the released procedure selects with either behaviour first."""
    first, second, general = scores
    with warnings.catch_warnings():
        # It warns that it is no intersection: that is what is shown here.
        warnings.simplefilter("ignore", UserWarning)
        return {
            f"released, {second.behaviour} first": released_coupling(second, first, general, fraction=fraction),
            f"released, {first.behaviour} first": released_coupling(first, second, general, fraction=fraction),
        }


def smallest_counts(selections: Mapping[str, Selection]) -> dict[Site, int]:
    """The size of the smallest of the selections at every site."""
    counts = {}
    for site in selections["coupled"].shapes:
        counts[site] = min(len(selection.units[site]) for selection in selections.values())
    return counts


def thinned_outcomes(
    plan: MeasurementPlan,
    model: HookedModel,
    selections: Mapping[str, Selection],
    counts: Mapping[Site, int],
    n_draws: int,
) -> dict[str, list[Outcome]]:
    """Outcomes of each selection at one size, averaged over its draws."""
    outcomes = {}
    for name, selection in selections.items():
        draws = []
        for seed in range(n_draws):
            state = arm(f"{name}, draw {seed + 1}", thinned(selection, counts, seed))
            draws.append(arm_outcomes(plan, state, model))
        outcomes[name] = averaged(draws)
    return outcomes


def control_outcomes(
    plan: MeasurementPlan,
    given: ReleasedEffect,
    model: HookedModel,
    selections: Mapping[str, Selection],
    counts: Mapping[Site, int],
    matched: Strata,
) -> list[list[Outcome]]:
    """Outcomes of random weights that are like the thinned coupled ones and in none of the three selections."""
    coupled, second_first, first_first = selections.values()
    union = coupled | second_first | first_first
    like = thinned(coupled, counts, 0)
    outcomes = []
    for number in progress_bar(range(given.n_controls), desc="random weights", unit="control"):
        drawn = random_control(like, matched, seed=given.study.data.seed, number=number) - union
        outcomes.append(arm_outcomes(plan, arm(f"random {number + 1}", drawn), model))
    return outcomes


def thinned(selection: Selection, counts: Mapping[Site, int], seed: int) -> Selection:
    """So many units of every site, at random."""
    units = {}
    for number, (site, count) in enumerate(counts.items()):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        order = torch.randperm(len(selection.units[site]), generator=generator)[:count]
        units[site] = selection.units[site][order].sort().values
    return Selection(units, selection.shapes, selection.prompt_hashes)


def facts(given: ReleasedEffect, *, n_test: int) -> dict[str, str]:
    """How it was done."""
    return {
        "thinned": f"to the smallest of the three sets in every matrix, {given.n_draws} random draws each",
        "controls": f"{given.n_controls} random sets of weights in none of the three, matched by matrix and stratum",
        "test prompts": f"{n_test} of each behaviour",
        "command": command(),
    }


def conclusions(
    selections: Mapping[str, Selection], coupling: Coupling, lines: Mapping[str, Sequence[Line]], n_weights: int
) -> tuple[str, ...]:
    """What the selections share, and what each moves when `n_weights` of its weights are silenced."""
    sizes = []
    for name, selection in selections.items():
        sizes.append(
            f"{name} {len(selection)}, of which {len(selection & coupling.both)} are important to both behaviours, "
            f"Jaccard overlap with the coupled {jaccard(selection, coupling.coupled):.2f}"
        )
    _, second_first, first_first = selections.values()
    paragraphs = [
        f"Weights in each set: {'; '.join(sizes)}. When the data sets change places, the released selections share "
        f"{jaccard(second_first, first_first):.2f} (Jaccard); the coupled set does not change."
    ]
    for name, of_arm in lines.items():
        changes = []
        for on, line in margin_lines(of_arm).items():
            changes.append(f"{on} {line.change} (rank among random {line.rank:.2f})")
        loss = next(line.change.mean for line in of_arm if line.metric == LOSS)
        paragraphs.append(
            f"{name}, {n_weights} weights: margins {', '.join(changes)}; loss on general answers {loss:+.3f}."
        )
    return tuple(paragraphs)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(ReleasedEffect, description=__doc__)))
