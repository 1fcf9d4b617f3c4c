"""The method, from examples to conclusions, in the order of the paper and of what keeps the outcome honest.

DEAN (arXiv 2410.16672; SPIN, ACL 2025):
1. Score every unit for both behaviours and for general text, by activation times gradient (section 3.1).
2. Couple: take the units in the top of both behaviours and not in the top of general text (section 3.2).
What the paper does not do, and what keeps a rise from being luck:
3. Draw random controls: as large as the edit, matched by site and stratum.
4. Measure the edit's KL to the original on general text, and nothing else of it.
5. Grow random controls until their KL is the edit's.
6. State what can be detected, from the controls alone.
7. Measure the edit.
8. Compare: every outcome before and after, beside the same change under the controls.
9. Estimate the mutual information between the behaviours, before and under the edit (section 3.3), beside the controls.

`run`, `sweep`, `evaluate`, `information` and the files of `analyses/` call these functions.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.editing.values import Multiply
from dean_interp.errors import InputError
from dean_interp.information.activations import Activations
from dean_interp.information.before_after import BeforeAfter
from dean_interp.information.estimands import HEADLINES, InformationArm, MutualInformationConfig
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Unit
from dean_interp.progress import progress_bar
from dean_interp.resume import discard
from dean_interp.scoring.importance import importance
from dean_interp.scoring.preparation import ScoringConfig, scores_fingerprint
from dean_interp.scoring.scores import Also, Scores, load_scores
from dean_interp.selection.coupling import Coupling, couple, refuse_empty
from dean_interp.selection.selection import Selection, top_fraction
from dean_interp.selection.strata import Strata
from dean_interp.study.conclusions import design_of, primary_outcome, state_results
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import ControlRequest, random_controls, refuse_without_controls
from dean_interp.study.results import Design, Primary, StateResults
from dean_interp.study.settings import ControlConfig
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, outcomes_of
from dean_interp.study.store import ORIGINAL, State

log = logging.getLogger(__name__)


def score(
    model: HookedModel, behaviour: Behaviour, config: StudyConfig, folder: Path, *, also: Sequence[Also] = ()
) -> Scores:
    """Step 1: the scores of one behaviour. Raises `InputError` as `scored_once`."""
    scoring = config.calibration.scoring(config.model.template)
    return scored_once(model, behaviour, folder, unit=config.scored, config=scoring, keep=config.keep, also=also)


def scored_once(
    model: HookedModel,
    behaviour: Behaviour,
    folder: Path,
    *,
    unit: Unit | Sequence[Unit],
    config: ScoringConfig,
    keep: float = 1.0,
    also: Sequence[Also] = (),
) -> Scores:
    """The scores of one behaviour, from their file in `folder/scores`, else computed and written there.

    Raises `InputError` where the file is of another model or other data.
    """
    path = folder / "scores" / f"{behaviour.name}.safetensors"
    partial = path.with_suffix(".unfinished")
    if not path.is_file():
        scores = importance(model, behaviour, unit=unit, config=config, keep=keep, also=also, unfinished=partial)
        scores.save(path, keep=keep)
    # A run that was killed right after it saved left this, too.
    discard(partial)
    scores = load_scores(path)
    if scores.fingerprint != scores_fingerprint(model, behaviour, unit=unit, config=config):
        raise InputError(f"{path} was made with another model or other data: choose another folder")
    note_scored(model, behaviour.prompt_hashes)
    return scores


def couple_or_refuse(scores: Sequence[Scores], config: StudyConfig, unit: Unit) -> Coupling:
    """Step 2: the coupled units.

    Raises `InputError` where there is none, or so many that no control is as large, before anything is measured.
    """
    own = [behaviour.of(unit) for behaviour in scores]
    coupling = couple(*own, fraction=config.fraction(unit))
    refuse_empty(coupling, *own)
    refuse_without_controls(coupling.coupled)
    return coupling


@dataclass(frozen=True)
class Comparison:
    """One edit beside its random controls: steps 3 to 8."""

    original: StateOutcomes
    edit: StateOutcomes
    controls: tuple[StateOutcomes, ...]
    states: tuple[StateResults, ...]
    """The edit first, then its controls, each compared with the original."""
    design: Design
    primary: Primary | None
    """None without random controls."""


def original_of(plan: MeasurementPlan, model: HookedModel, *, in_full: bool = True) -> StateOutcomes:
    """The original: what every other state is compared with."""
    return outcomes_of(plan, model, ORIGINAL, reference=None, in_full=in_full)


def control_request(
    plan: MeasurementPlan,
    model: HookedModel,
    original: StateOutcomes,
    edit: State,
    strata: Strata,
    controls: ControlConfig,
) -> ControlRequest:
    """What controls of the edit are drawn for, with step 4: its KL to the original on general text (nats per token)."""

    def kl(state: State) -> float:
        general = plan.store.general(model, state, reference=original.measurement)
        return general[plan.store.tests[2].name].mean_kl

    return ControlRequest(
        edit=edit,
        strata=strata,
        config=controls,
        seed=plan.store.config.seed,
        kl=kl,
        folder=plan.store.folder,
    )


def compare_with_controls(
    plan: MeasurementPlan,
    model: HookedModel,
    original: StateOutcomes,
    edit: State,
    request: ControlRequest | None,
    *,
    part: Callable[[StateOutcomes], StateOutcomes] = lambda measured: measured,
    note_design: Callable[[Design], None] = lambda design: None,
) -> Comparison:
    """Steps 3 to 8 for one edit.

    Args:
        request: what its random controls are drawn for (`control_request`); None: without scores there are none.
        part: leaves the part of the test prompts that counts; of the original, this part is handed in.
        note_design: is told what can be detected before the edit is measured.
    """
    reference = original.measurement
    # Steps 3 to 5. Of the edit nothing but its KL on general text is known to them (`request.kl`).
    states = random_controls(request) if request else []
    answering = _who_answers(plan, states)
    controls = []
    for state in states:
        in_full = state.name in answering
        measured = outcomes_of(plan, model, state, reference=reference, in_full=in_full)
        controls.append(part(measured))
    # Step 6.
    design = design_of(original, controls)
    note_design(design)
    log.info("%s can be detected to change by %s", edit.title, _detectable_margins(design))
    # Step 7.
    measured = part(outcomes_of(plan, model, edit, reference=reference, in_full=True))
    # Step 8.
    results = [state_results(original, measured, controls, design)]
    results += [state_results(original, control) for control in controls]
    primary = primary_outcome(results[0], results[1:]) if controls else None
    return Comparison(
        original=original,
        edit=measured,
        controls=tuple(controls),
        states=tuple(results),
        design=design,
        primary=primary,
    )


def _detectable_margins(design: Design) -> str:
    """What the design can detect of each behaviour's margin, in words."""
    changes = []
    for name in design.n_clusters:
        change = design.margin(name)
        size = "unknown" if change is None else f"{change:.3f}"
        changes.append(f"{name} {size}")
    return f"{' and '.join(changes)} nats per token (80 % power)"


def _who_answers(plan: MeasurementPlan, controls: Sequence[State]) -> set[str]:
    """The controls that answer too: the first few of the last kind, which do the edit's damage, then of the others."""
    if plan.servers or not controls:
        return set()
    kinds = reversed(dict.fromkeys(state.kind for state in controls))
    names = [state.name for kind in kinds for state in controls if state.kind == kind]
    return set(names[: plan.config.n_answer_controls])


def disjoint_neurons(scores: Sequence[Scores], fraction: float) -> tuple[Selection, Selection]:
    """The top neurons of each behaviour that are not in the other's top: a neuron in both would inform about itself."""
    first = top_fraction(scores[0].of("neuron"), fraction)
    second = top_fraction(scores[1].of("neuron"), fraction)
    return first - second, second - first


def information_before_and_under(
    plan: MeasurementPlan,
    original: StateOutcomes,
    edits: Sequence[StateOutcomes],
    controls: Sequence[StateOutcomes],
    neurons: tuple[Selection, Selection],
    calibration: Activations | None = None,
) -> list[tuple[MutualInformation, ...]]:
    """Step 9: both headline estimands before and under each edit, beside the same under every random control.

    Args:
        edits: mostly one; several share the controls. Places that the first cannot reach are not joined to one.
        neurons: the neurons of first and second between which it is estimated (`disjoint_neurons`).
        calibration: activations on calibration answers, which probes are fitted on. None: each probe is fitted on the
            half of the test topics that a prompt does not belong to.
    """
    before = original.measurement.activations
    assert before is not None, "the store keeps activations of these neurons"
    behaviours = [test.name for test in plan.store.tests[:2]]
    arms = [_under(edit, neurons) for edit in edits]
    compared = [_under(control, neurons) for control in controls]
    results: list[list[MutualInformation]] = [[] for _ in edits]
    for estimand in progress_bar(HEADLINES, desc="mutual information", leave=False):
        config = MutualInformationConfig(estimand, seed=plan.store.config.seed)
        estimates = BeforeAfter(config, before, edit=arms[0][0], behaviours=behaviours, calibration=calibration)
        changes = [estimates.changes(*control) for control in compared]
        for of_edit, (arm, edited) in zip(results, arms, strict=True):
            of_edit.append(estimates.information(edited, changes, arm=arm))
    return [tuple(of_edit) for of_edit in results]


def _under(measured: StateOutcomes, neurons: tuple[Selection, Selection]) -> tuple[InformationArm, Activations]:
    """One ablation as the estimands take it, and the activations under it."""
    activations, state = measured.measurement.activations, measured.state
    assert activations is not None
    if isinstance(state.value, Multiply):
        return InformationArm(state.value.gates, *neurons), activations
    assert state.ablated is not None
    return InformationArm(state.ablated, *neurons), activations
