"""Do the coupled units carry the trade-off? In a fine-tuned model they alone get their old values back.

    python analyses/mediation.py --out runs/mediation

on the demo model (--model for another), fine-tuned on `--second`. If the coupled units carry what fine-tuning does to
the other behaviour, that comes back when they are restored, while the trained one stays; random units of the same size,
matched by site and stratum, are the control. The other way round, the original model gets the fine-tuned values of the
coupled units alone. Total effect: fine-tuned less original. Indirect, through the units: fine-tuned less restored.
Direct: restored less original. Putting a model's own values into it must change nothing. Resumes; writes results.json,
report.html and a picture (SVG, CSV).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, Scores, Selection, load_model
from dean_interp.cli.ending import command, script
from dean_interp.editing.values import Restore
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import Outcome
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.sites import Unit
from dean_interp.models.sizes import site_shape
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.selection.coupling import couple
from dean_interp.selection.strata import Strata, strata
from dean_interp.study import day
from dean_interp.study.arm_results import ArmResults, arm, arm_outcomes, arms_plan, margin_lines, random_arms
from dean_interp.study.config import StudyConfig
from dean_interp.study.method import score
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.state_outcomes import MeasurementPlan
from dean_interp.study.store import ORIGINAL
from dean_interp.study.study_data import calibration_sets, test_sets

TUNED, ITSELF, EVERY = "fine-tuned", "fine-tuned, its own values put back", "fine-tuned, every MLP neuron restored"


@dataclass(frozen=True)
class Mediation:
    """Fine-tune on second; restore the coupled units; look at both."""

    out: Path = Path("runs/mediation")
    """The run folder."""
    n_controls: int = 19
    """Number of random sets for each kind of unit."""
    quick: bool = False
    """Run four controls."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(answers=AnswerConfig(n_answers=0)))


@dataclass(frozen=True)
class Measured:
    """Outcomes of every arm, and of the random arms beside those of the coupled units."""

    outcomes: Mapping[str, list[Outcome]]
    controls: Mapping[str, list[list[Outcome]]]


def run(given: Mediation) -> ArmResults:
    """All arms, from the store where they were measured before."""
    if given.quick:
        given = dataclasses.replace(given, n_controls=4)
    config = given.study
    config.check()
    given.tuning.check()
    calibration = calibration_sets(config.data, config.calibration)
    tests, _ = test_sets(config.data, calibration)
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), [*calibration, *tests]):
        plan = arms_plan(config, given.out, tests)
        model = day.of_evaluation(config.model, given.out, ()).load()
        scores = [score(model, behaviour, config, given.out) for behaviour in calibration]
        original = arm_outcomes(plan, ORIGINAL, model)
        tuned = fine_tuned(given, calibration[1])
        edits, matched = edits_of(config, model, scores)
        measured = measure_arms(plan=plan, given=given, model=model, tuned=tuned, edits=edits, matched=matched)
        lines = compared(original, measured)
        results = ArmResults(
            title=f"Do the coupled units carry the trade-off in {config.model.title}?",
            model=config.model.title,
            facts=facts(given, trained=tests[1].name),
            conclusions=conclusions(lines, edits, tests),
            arms={_shown(name): of_arm for name, of_arm in lines.items()},
        )
        picture = changes_by_arm(results.margins, "change (nats per token)")
        page = write_arms_report(results, given.out, {"Effects on both margins": picture})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def fine_tuned(given: Mediation, behaviour: Behaviour) -> HookedModel:
    """The study's model, fine-tuned on one behaviour."""
    config = given.study.model
    checkpoint = fine_tune(
        config.name,
        [behaviour],
        given.tuning,
        folder=given.out / "tuned",
        template=config.template,
        device=config.device,
        dtype=config.dtype,
        adapter=config.adapter,
    )
    return load_model(checkpoint, device=config.device, dtype=config.dtype)


def edits_of(
    config: StudyConfig, model: HookedModel, scores: Sequence[Scores]
) -> tuple[dict[Unit, Selection], dict[Unit, Strata]]:
    """The coupled units of each kind, and what random units are matched on."""
    edits: dict[Unit, Selection] = {}
    matched: dict[Unit, Strata] = {}
    for unit in config.unit:
        of_unit = [behaviour.of(unit) for behaviour in scores]
        edits[unit] = couple(*of_unit, fraction=config.fraction(unit)).coupled
        matched[unit] = strata(model, of_unit)
    return edits, matched


def measure_arms(
    plan: MeasurementPlan,
    given: Mediation,
    model: HookedModel,
    tuned: HookedModel,
    edits: Mapping[Unit, Selection],
    matched: Mapping[Unit, Strata],
) -> Measured:
    """Outcomes of every arm but the original."""
    outcomes, controls = {TUNED: arm_outcomes(plan, arm(TUNED), tuned)}, {}
    for unit, edit in edits.items():
        for name, base, other in ((restored(unit), tuned, model), (moved(unit), model, tuned)):
            state = arm(name, edit, Restore(other))
            beside = random_arms(state, matched[unit], n=given.n_controls, seed=given.study.data.seed)
            bar = progress_bar(beside, desc=f"random {unit}s", unit="control")
            controls[name] = [arm_outcomes(plan, control, base) for control in bar]
            outcomes[name] = arm_outcomes(plan, state, base)
    # A model's own values change nothing; all of the original's undo the fine-tuning of the MLPs.
    first_edit = next(iter(edits.values()))
    outcomes[ITSELF] = arm_outcomes(plan, arm(ITSELF, first_edit, Restore(tuned)), tuned)
    outcomes[EVERY] = arm_outcomes(plan, arm(EVERY, every_neuron(model), Restore(model)), tuned)
    return Measured(outcomes=outcomes, controls=controls)


def restored(unit: str) -> str:
    """The arm in which the fine-tuned model gets the original's units."""
    return f"{TUNED}, coupled {unit}s restored"


def moved(unit: str) -> str:
    """The arm in which the original gets the fine-tuned model's units."""
    return f"original, coupled {unit}s as fine-tuned"


def every_neuron(model: HookedModel) -> Selection:
    """All MLP neurons."""
    sites = neuron_sites(model)
    shapes = {site: site_shape(model, site) for site in sites}
    units = {site: torch.arange(width) for site, (width,) in shapes.items()}
    return Selection(units, shapes)


def compared(original: Sequence[Outcome], measured: Measured) -> dict[str, tuple[Line, ...]]:
    """Restored arms stand against the fine-tuned model, the others against the original."""
    against_original: dict[str, list[Outcome]] = {}
    against_tuned: dict[str, list[Outcome]] = {}
    for name, outcomes in measured.outcomes.items():
        side = against_tuned if _is_restored(name) else against_original
        side[name] = outcomes
    lines = compare_each(original, against_original, measured.controls)
    return lines | compare_each(measured.outcomes[TUNED], against_tuned, measured.controls)


def _is_restored(name: str) -> bool:
    """Whether an arm is the fine-tuned model with units that were given back."""
    return name.startswith(f"{TUNED},")


def _shown(name: str) -> str:
    """The arm's name on the page: it says what the arm is compared with."""
    return f"{name} (against fine-tuned)" if _is_restored(name) else name


def conclusions(
    lines: Mapping[str, Sequence[Line]], edits: Mapping[Unit, Selection], tests: Sequence[Behaviour]
) -> tuple[str, ...]:
    """Total effects, and what the coupled units carry of them."""
    other, trained = tests[0].name, tests[1].name
    identical = max(abs(line.change.mean) for line in lines[ITSELF])
    total, every = margin_lines(lines[TUNED]), margin_lines(lines[EVERY])
    paragraphs = [
        f"Fine-tuning on {trained} changes the {trained} margin by {total[trained].change} and the {other} margin by "
        f"{total[other].change} nats per token (total effects). Its own values put back change it by {identical:g}; "
        f"every MLP neuron restored: {other} {every[other].change}, {trained} {every[trained].change}."
    ]
    for unit, edit in edits.items():
        effects = {restored(unit): "given back", moved(unit): "as fine-tuned, in the original model"}
        for name, effect in effects.items():
            paragraphs.append(f"The {len(edit)} coupled {unit}s {effect}: {_beside_random(lines[name])}.")
    return tuple(paragraphs)


def _beside_random(lines: Sequence[Line]) -> str:
    """The change of both margins, and how many random sets move them as much."""
    parts = []
    for name, line in margin_lines(lines).items():
        n_as_much = sum(abs(change) >= abs(line.change.mean) for change in line.control_changes)
        parts.append(f"{name} {line.change} (of {len(line.control_changes)} random sets {n_as_much} move it as much)")
    return "; ".join(parts)


def facts(given: Mediation, *, trained: str) -> dict[str, str]:
    """How it was done."""
    tuning = given.tuning
    return {
        "indirect effect": "the restored arm with its sign turned (fine-tuned less restored); direct: the rest",
        "dose": f"{tuning.method} fine-tuning on {trained}: {tuning.n_steps} steps of {tuning.batch_size} examples of "
        f"{given.study.calibration.n_calibration}",
        "controls": "random sets of the same size, matched by site and stratum; rank is one-sided, for a rise",
        "command": command(),
    }


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Mediation, description=__doc__)))
