"""How few examples does DEAN need? A selection from 4 to 512 examples a behaviour, beside random units each time.

    python analyses/limited_data.py --out runs/limited

on the demo model (--model for another; the built-in sets hold 168 examples, the paper's CSVs more). Each size is a draw
that holds the smaller ones. Resumes where it was stopped. Writes results.json, report.html and a picture (SVG, CSV).
The paper claims that few examples are enough.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, InputError, load_behaviour
from dean_interp.cli.ending import command, script
from dean_interp.data.examples import draw
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import MARGIN, Outcome
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_along
from dean_interp.report.html import write_arms_report
from dean_interp.report.pictures import Picture
from dean_interp.selection.coupling import couple
from dean_interp.selection.stability import jaccard
from dean_interp.selection.strata import strata
from dean_interp.statistics import Interval
from dean_interp.study import day
from dean_interp.study.arm_results import ArmResults, arm, arm_outcomes, arms_plan, margin_lines, random_arms
from dean_interp.study.config import StudyConfig
from dean_interp.study.method import score
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.store import ORIGINAL, State
from dean_interp.study.study_data import test_sets


@dataclass(frozen=True)
class Limited:
    """One selection a size."""

    out: Path = Path("runs/limited")
    """The run folder."""
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    """Numbers of examples of each behaviour; those that the data do not hold are left out."""
    n_controls: int = 5
    """Number of random sets a size and unit."""
    quick: bool = False
    """Run every other size, and two controls."""
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(answers=AnswerConfig(n_answers=0)))


@dataclass(frozen=True)
class SizedEdit:
    """What is coupled when so many examples are scored."""

    unit: Unit
    n_examples: int
    state: State
    controls: Sequence[State]

    @property
    def size(self) -> str:
        """The number of examples in words."""
        return f"{self.n_examples} examples"


def run(given: Limited) -> ArmResults:
    """Every size, from the store where it was measured before."""
    config, data = given.study, given.study.data
    config.check()
    response = config.calibration.response
    wholes = [load_behaviour(source, n_examples=None, response=response) for source in data.sources]
    given = with_possible_sizes(given, at_most=min(map(len, wholes)))
    tests, _ = test_sets(data, wholes)
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), [*wholes, *tests]):
        plan = arms_plan(config, given.out, tests)
        model = day.of_evaluation(config.model, given.out, ()).load()
        original = arm_outcomes(plan, ORIGINAL, model)
        edits: list[SizedEdit] = []
        outcomes: dict[str, list[Outcome]] = {}
        controls: dict[str, list[list[Outcome]]] = {}
        for n_examples in progress_bar(given.sizes, desc="sizes", unit="size"):
            for edit in edits_from(given, model, wholes, n_examples):
                edits.append(edit)
                controls[edit.state.name] = [arm_outcomes(plan, state, model) for state in edit.controls]
                outcomes[edit.state.name] = arm_outcomes(plan, edit.state, model)
        lines = compare_each(original, outcomes, controls)
        results = ArmResults(
            title=f"How few examples does DEAN need in {config.model.title}?",
            model=config.model.title,
            facts=facts(edits, n_test=len(tests[0])),
            conclusions=conclusions(given, edits, lines),
            arms=lines,
        )
        picture = along(results, given, edits, tests)
        page = write_arms_report(results, given.out, {"Margins by number of examples": picture})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def with_possible_sizes(given: Limited, *, at_most: int) -> Limited:
    """The settings with the sizes that the data hold; in the quick form, every other one of them.

    Raises `InputError` where there is none.
    """
    sizes = tuple(n for n in given.sizes if n <= at_most)
    if not sizes:
        raise InputError(f"sizes must be at most {at_most}, what the smallest behaviour holds, got {given.sizes}")
    if not given.quick:
        return dataclasses.replace(given, sizes=sizes)
    # The largest stays, and every other one below it.
    return dataclasses.replace(given, sizes=sizes[::-2][::-1], n_controls=2)


def edits_from(given: Limited, model: HookedModel, wholes: Sequence[Behaviour], n_examples: int) -> list[SizedEdit]:
    """What `n_examples` examples couple, with random controls. Units of which none is coupled are left out."""
    config, folder = given.study, given.out / f"{n_examples}_examples"
    folder.mkdir(exist_ok=True)
    drawn = [draw(whole, n_examples, seed=config.data.seed) for whole in wholes]
    scores = [score(model, behaviour, config, folder) for behaviour in drawn]
    edits = []
    for unit in config.unit:
        of_unit = [behaviour.of(unit) for behaviour in scores]
        selection = couple(*of_unit, fraction=config.fraction(unit)).coupled
        if len(selection):
            state = arm(f"{unit}s, {n_examples} examples", selection)
            # The draws are the same whatever the seed of the study: only the examples depend on it.
            controls = random_arms(state, strata(model, of_unit), n=given.n_controls, seed=0)
            edits.append(SizedEdit(unit=unit, n_examples=n_examples, state=state, controls=controls))
    return edits


def facts(edits: Sequence[SizedEdit], *, n_test: int) -> dict[str, str]:
    """How it was done."""
    return {
        "units silenced": "; ".join(f"{edit.state.name}: {edit.state.n_units}" for edit in edits),
        "test prompts": f"{n_test} of each behaviour",
        "command": command(),
    }


def conclusions(given: Limited, edits: Sequence[SizedEdit], lines: Mapping[str, Sequence[Line]]) -> tuple[str, ...]:
    """What each size changes, and how far its selection is that of the largest."""
    paragraphs = []
    for unit in given.study.unit:
        of_unit = [edit for edit in edits if edit.unit == unit]
        if not of_unit:
            continue
        largest = of_unit[-1]
        overlaps, rising, beyond = [], [], []
        for edit in of_unit:
            assert edit.state.ablated is not None and largest.state.ablated is not None
            overlaps.append(f"{edit.size} {jaccard(edit.state.ablated, largest.state.ablated):.2f}")
            margins = margin_lines(lines[edit.state.name]).values()
            if all(line.change.low > 0 for line in margins):
                rising.append(edit.size)
            if all(line.change.mean > max(line.control_changes) for line in margins):
                beyond.append(edit.size)
        paragraphs.append(
            f"{unit.capitalize()}s: both margins rise beyond their intervals with {', '.join(rising) or 'no size'}; "
            f"beyond all {len(largest.controls)} random controls with {', '.join(beyond) or 'no size'}. Jaccard "
            f"overlap with the selection from {largest.size}: {', '.join(overlaps)}."
        )
    return tuple(paragraphs)


def along(results: ArmResults, given: Limited, edits: Sequence[SizedEdit], tests: Sequence[Behaviour]) -> Picture:
    """Both margins by size, on a scale of doublings."""
    panels = {}
    for test in tests[:2]:
        curves: dict[str, list[tuple[float, Interval]]] = {f"coupled {unit}s": [] for unit in given.study.unit}
        for edit in edits:
            change = results.line(edit.state.name, MARGIN, test.name).change
            curves[f"coupled {edit.unit}s"].append((float(edit.n_examples), change))
        panels[f"{test.name} margin"] = curves
    return changes_along(panels, "examples of each behaviour", by_doubling=True)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Limited, description=__doc__)))
