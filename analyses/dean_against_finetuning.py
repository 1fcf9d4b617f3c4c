"""The paper's first table for any model: original, fine-tuning, DEAN on neurons and weights, the released selection.

    python analyses/dean_against_finetuning.py --out runs/table1

on the demo model (--model for another, --first and --second for other data: `paper:fairness@folder`). DEAN's arms stand
beside random units of the same size, matched by site and stratum. Resumes where it was stopped. Writes results.json,
report.html and a picture (SVG, CSV). With --response unsafe everything is scored and trained on unsafe answers alone
(`malicious_only.py`).
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from published_numbers import published
from tyro.conf import OmitArgPrefixes

from dean_interp.cli.ending import command, script
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import LOSS, Outcome, averaged
from dean_interp.fine_tuning import FineTuningConfig, FineTuningMethod
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import couple
from dean_interp.selection.released import released_coupling
from dean_interp.selection.strata import Strata, strata
from dean_interp.study.arm_results import (
    ArmResults,
    arm,
    arm_outcomes,
    arms_plan,
    fine_tuned_arms,
    margin_lines,
    random_arms,
)
from dean_interp.study.conclusions import answers_in_words
from dean_interp.study.config import StudyConfig
from dean_interp.study.method import score
from dean_interp.study.run_folder import owned
from dean_interp.study.state_outcomes import MeasurementPlan
from dean_interp.study.store import ORIGINAL, State
from dean_interp.study.study_data import StudyData, study_data

RELEASED = "released selection, weights"


@dataclass(frozen=True)
class Table:
    """Every arm of the paper's first table, and controls."""

    out: Path = Path("runs/table1")
    """The run folder."""
    methods: tuple[FineTuningMethod, ...] = ("full", "lora", "dora")
    """Methods of fine-tuning on both behaviours, one after the other, whatever `tuning.method` is."""
    n_seeds: int = 1
    """Number of seeds of fine-tuning, from `tuning.seed` on."""
    quick: bool = False
    """Run full fine-tuning alone, and four controls."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=StudyConfig)


def run(given: Table, title: str = "DEAN against fine-tuning in {model}") -> ArmResults:
    """All arms, from the store where they were measured before."""
    if given.quick:
        given = _quick(given)
    config = given.study
    config.check()
    for method in given.methods:
        dataclasses.replace(given.tuning, method=method).check()
    data = study_data(config)
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), data.all):
        plan = arms_plan(config, given.out, data.tests, data.prompts)
        model = config.model.load()
        original = arm_outcomes(plan, ORIGINAL, model, in_full=True)
        scores = [score(model, behaviour, config, given.out) for behaviour in data.calibration]
        edits = edit_arms(scores, config)
        controls = control_outcomes(plan=plan, model=model, edits=edits, scores=scores, config=config)
        outcomes = {edit.name: arm_outcomes(plan, edit, model, in_full=True) for edit in edits}
        # Fine-tuning loads models of its own.
        del model
        outcomes |= fine_tuned_outcomes(plan, given, data)
        lines = compare_each(original, outcomes, controls)
        results = ArmResults(
            title=title.format(model=config.model.title),
            model=config.model.title,
            facts=facts(given, data, edits),
            conclusions=conclusions(lines, general=data.tests[2].name),
            arms=lines,
        )
        picture = changes_by_arm(results.margins, "change (nats per token)")
        page = write_arms_report(results, given.out, {"Margins by arm": picture})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def _quick(given: Table) -> Table:
    """The quick form of the settings."""
    controls = given.study.controls
    controls = dataclasses.replace(controls, n_random=min(4, controls.n_random))
    return dataclasses.replace(given, methods=("full",), study=dataclasses.replace(given.study, controls=controls))


def edit_arms(scores: Sequence[Scores], config: StudyConfig) -> list[State]:
    """DEAN's edit of each kind of unit; for weights, what the released code selects, too."""
    edits = []
    for unit in config.unit:
        of_unit = [behaviour.of(unit) for behaviour in scores]
        coupling = couple(*of_unit, fraction=config.fraction(unit))
        edits.append(arm(f"DEAN, {unit}s", coupling.coupled))
        if unit == "weight":
            first, second, general = of_unit
            with warnings.catch_warnings():
                # It warns that it is no intersection: that is why it stands here.
                warnings.simplefilter("ignore", UserWarning)
                # Privacy comes first, as in the authors' script.
                selection = released_coupling(second, first, general, fraction=coupling.fractions[0])
            edits.append(arm(RELEASED, selection))
    return edits


def control_outcomes(
    plan: MeasurementPlan, model: HookedModel, edits: Sequence[State], scores: Sequence[Scores], config: StudyConfig
) -> dict[str, list[list[Outcome]]]:
    """Outcomes of the random controls of DEAN's edits. The released selection has none."""
    controls = {}
    for edit in edits:
        if edit.name == RELEASED:
            continue
        states = random_arms(edit, _strata_of(edit, model, scores), n=config.controls.n_random, seed=config.data.seed)
        bar = progress_bar(states, desc=f"random units beside {edit.name}", unit="control")
        controls[edit.name] = [arm_outcomes(plan, state, model) for state in bar]
    return controls


def _strata_of(edit: State, model: HookedModel, scores: Sequence[Scores]) -> Strata:
    """What random units like an edit's are matched on."""
    assert edit.ablated is not None
    unit = next(iter(edit.ablated.shapes)).unit
    return strata(model, [behaviour.of(unit) for behaviour in scores])


def fine_tuned_outcomes(plan: MeasurementPlan, given: Table, data: StudyData) -> dict[str, list[Outcome]]:
    """Outcomes after the last step of each method of fine-tuning, averaged over its seeds."""
    outcomes, last = {}, given.tuning.n_steps
    for method in given.methods:
        draws = []
        for seed in range(given.tuning.seed, given.tuning.seed + given.n_seeds):
            tuning = dataclasses.replace(given.tuning, method=method, seed=seed)
            name = f"fine-tuned {method} seed {seed}"
            by_step = fine_tuned_arms(
                plan=plan, config=given.study, name=name, behaviours=data.calibration[:2], tuning=tuning, at=(last,)
            )
            draws.append(by_step[last])
        outcomes[f"fine-tuned, {method}"] = averaged(draws)
    return outcomes


def facts(given: Table, data: StudyData, edits: Sequence[State]) -> dict[str, str]:
    """How it was done."""
    config, tuning = given.study, given.tuning
    n_examples = len(data.calibration[0]) + len(data.calibration[1])
    return {
        "units silenced": ", ".join(f"{edit.name} {edit.n_units}" for edit in edits),
        "controls": f"{config.controls.n_random} random sets of the size of each edit of DEAN, matched by site and "
        "stratum",
        "fine-tuning": f"on {config.calibration.response} answers of both behaviours, {tuning.n_steps} steps of "
        f"{tuning.batch_size} examples of {n_examples}",
        "test prompts": f"{len(data.tests[0])} of each behaviour, {config.answers.n_answers} of them answered",
        "published": published(),
        "command": command(),
    }


def conclusions(lines: Mapping[str, Sequence[Line]], general: str) -> tuple[str, ...]:
    """Of every arm: do both margins rise, and what does it cost?"""
    paragraphs = []
    for name, of_arm in lines.items():
        margins = margin_lines(of_arm)
        loss = next(line.change for line in of_arm if (line.metric, line.on) == (LOSS, general))
        raised = [on for on, line in margins.items() if line.change.low > 0]
        lowered = [on for on, line in margins.items() if line.change.high < 0]
        changes = "; ".join(f"{on} {line.change}" for on, line in margins.items())
        paragraphs.append(
            f"{name[0].upper()}{name[1:]}: {changes} (margins, nats per token). Raised beyond the interval: "
            f"{' and '.join(raised) or 'neither'}; lowered: {' and '.join(lowered) or 'neither'}."
            f"{_beyond_controls(name, margins)} Loss on general answers {loss}. {answers_in_words(of_arm)}"
        )
    return tuple(paragraphs)


def _beyond_controls(name: str, margins: Mapping[str, Line]) -> str:
    """Which margins rise beyond every random control; empty for arms that have none."""
    if not name.startswith("DEAN"):
        return ""
    beyond = []
    for on, line in margins.items():
        if line.control_changes and line.change.mean > max(line.control_changes):
            beyond.append(on)
    return f" Beyond every random control: {' and '.join(beyond) or 'neither'}."


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Table, description=__doc__)))
