"""One edit in one table: both behaviours, general ability, judged answers, beside random controls.

Likelihoods are measured in every state; answers are given by the original, the edit and a few controls. Controls come
first, and what the design can detect is written down before the edit is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.editing.edit_at_dose import AnyEdit, as_hooks, refuse_other_base
from dean_interp.editing.values import Value, Zero
from dean_interp.errors import InputError
from dean_interp.evaluation.judges import Agreement, Sensitivity, Verdict, agreement, faults, sensitivity
from dean_interp.evaluation.served import Served
from dean_interp.files import write_json
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.native_tokenizer import chat_parts
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.progress import ProgressBar, progress_bar
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import strata
from dean_interp.study import day
from dean_interp.study.conclusions import state_results
from dean_interp.study.config import EvaluationConfig, InformationConfig
from dean_interp.study.controls import refuse_without_controls
from dean_interp.study.evaluation import Evaluation
from dean_interp.study.method import (
    Comparison,
    compare_with_controls,
    control_request,
    disjoint_neurons,
    information_before_and_under,
    original_of,
)
from dean_interp.study.preflight import refuse_silent
from dean_interp.study.results import Design
from dean_interp.study.run_folder import locked
from dean_interp.study.settings import AnswerConfig, ControlConfig
from dean_interp.study.shown import shown_answers
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, measurement_plan
from dean_interp.study.store import State, Store, fingerprint_of
from dean_interp.study.study_data import PromptSets, prompt_sets, scored_part, test_sets


@own_torch_settings()
def evaluate_edit(edit: AnyEdit, scores: Sequence[Scores], config: EvaluationConfig, folder: Path) -> Evaluation:
    """Measure an edit beside its controls into a folder, or go on with what is there.

    Args:
        edit: the units that are silenced, gates, or an edit.
        scores: of first, second and general, which random controls of a selection are matched by; empty: there are no
            controls.
        folder: gets `evaluation.json`, `design.json` and what was measured.

    Raises:
        InputError: an edit that changes nothing, or a selection so large that no control is; scores beside gates or an
            edit; a setting out of its range; other than three or no scores; a judge, a task or a set that does not
            exist; a folder that another run writes to, or that holds measurements of something else.
    """
    config.check()
    selection, value = _as_ablation(edit)
    _refuse_selection(selection, scores)
    if len(scores) not in (0, 3):
        raise InputError(f"scores must be those of first, second and general, or none; got {len(scores)}")
    if scores and not isinstance(edit, Selection):
        raise InputError(
            "scores match random controls to a selection of units. Gates and edits give each unit a number of its own, "
            "and `improve` measures nulls beside its gates: leave the scores out"
        )
    tests, _ = test_sets(config.data)
    calibration = [scored_part(source, selection.prompt_hashes) for source in config.scored_data]
    prompts = prompt_sets(config.data, config.answers, scored=selection.prompt_hashes, calibration=calibration)
    if not (folder / "evaluation.json").is_file():
        refuse_silent(config.answers, servers_of(config).values())
    with locked(folder), _progress(config.controls, scores) as progress:
        config = replace(config, model=day.of_evaluation(config.model, folder, scores))
        model = config.model.load()
        refuse_other_base(model, edit)
        store = _store(folder, model, tests=tests, scores=scores, config=config)
        plan = measurement_plan(
            store, prompts, config=config.answers, model=model, progress=progress, servers=servers_of(config)
        )

        def note_design(design: Design) -> None:
            write_json(folder / "design.json", design)

        comparison = _compared(
            plan, model, edit=_edited(selection, value), scores=scores, config=config, note_design=note_design
        )
        evaluation = _evaluation(plan, comparison)
        write_json(folder / "evaluation.json", evaluation)
    return evaluation


@own_torch_settings()
def estimate_information(
    selection: Selection, scores: Sequence[Scores], config: InformationConfig, folder: Path
) -> tuple[MutualInformation, ...]:
    """Estimate the mutual information of both behaviours' neurons before and under an edit, beside its controls.

    Arguments and errors are those of `evaluate_edit`, but three scores are needed, and all of them must be of neurons,
    too. The folder gets `information.json`; it may be the folder of an evaluation with the same settings, whose states
    are taken.
    """
    config.check()
    _refuse_selection(selection, scores)
    if len(scores) != 3:
        raise InputError(
            "information needs the scores of first, second and general: it is estimated between the top neurons of "
            f"the two behaviours; got {len(scores)}"
        )
    # Scores without neurons are refused here, before anything is measured.
    neurons = disjoint_neurons(scores, config.information_fraction)
    tests, _ = test_sets(config.data)
    with locked(folder), _progress(config.controls, scores) as progress:
        config = replace(config, model=day.of_evaluation(config.model, folder, scores))
        model = config.model.load()
        store = _store(folder, model, tests=tests, scores=scores, config=config)
        plan = measurement_plan(store, PromptSets(), config=AnswerConfig(n_answers=0), model=model, progress=progress)
        comparison = _compared(plan, model, edit=_edited(selection, Zero()), scores=scores, config=config)
        (information,) = information_before_and_under(
            plan, comparison.original, edits=[comparison.edit], controls=comparison.controls, neurons=neurons
        )
        by_estimand = {estimates.estimand: estimates for estimates in information}
        write_json(folder / "information.json", by_estimand)
    return information


def _as_ablation(edit: AnyEdit) -> tuple[Selection, Value]:
    """What takes the place of which units. Raises `InputError` for an edit that hooks cannot do."""
    if isinstance(edit, Selection):
        return edit, Zero()
    return as_hooks(edit)


def _edited(selection: Selection, value: Value) -> State:
    """The model under an edit."""
    unit = next(iter(selection.shapes)).unit
    return State("edit", "edit", ablated=selection, value=value, unit=unit)


def _refuse_selection(selection: Selection, scores: Sequence[Scores]) -> None:
    if not len(selection):
        raise InputError("the edit is empty: it changes no unit")
    if scores:
        refuse_without_controls(selection)


def _progress(controls: ControlConfig, scores: Sequence[Scores]) -> ProgressBar:
    """A bar over the original, the edit and its controls."""
    n_controls = controls.n_random + controls.n_equal_kl if scores else 0
    return progress_bar(total=2 + n_controls, desc="states of the model", unit="state")


def _store(
    folder: Path,
    model: HookedModel,
    tests: Sequence[Behaviour],
    scores: Sequence[Scores],
    config: EvaluationConfig | InformationConfig,
) -> Store:
    """The store of an edit's states, the same for `evaluate_edit` and `estimate_information`."""
    neurons = None
    if scores and all("neuron" in behaviour.units for behaviour in scores):
        first, second = disjoint_neurons(scores, config.information_fraction)
        neurons = first | second
    depends_on = [
        model_fingerprint(model),
        *(behaviour.fingerprint for behaviour in (*tests, *scores)),
        str(config.data),
        config.model.template,
        str(config.information_fraction),
        *chat_parts(model),
    ]
    return Store(
        folder=folder,
        fingerprint=fingerprint_of(*depends_on),
        tests=tests,
        config=config.data,
        template=config.model.template,
        neurons=neurons,
    )


def _compared(
    plan: MeasurementPlan,
    model: HookedModel,
    edit: State,
    scores: Sequence[Scores],
    config: EvaluationConfig | InformationConfig,
    *,
    note_design: Callable[[Design], None] = lambda design: None,
) -> Comparison:
    """The edit beside its random controls, where there are scores to match them by."""
    original = original_of(plan, model)
    request = None
    if scores:
        assert edit.unit is not None
        matched = strata(model, [behaviour.of(edit.unit) for behaviour in scores])
        request = control_request(plan, model, original=original, edit=edit, strata=matched, controls=config.controls)
    return compare_with_controls(plan, model, original=original, edit=edit, request=request, note_design=note_design)


def servers_of(config: EvaluationConfig) -> dict[str, Served]:
    """Who answers in place of the hooked model, by the name of the state."""
    servers = map(Served, config.answers_from)
    return dict(zip(("original", "edit"), servers, strict=False))


def _evaluation(plan: MeasurementPlan, comparison: Comparison) -> Evaluation:
    original, edit = comparison.original, comparison.edit
    # What judges and rules make of the answers of both.
    caution = {}
    verdicts: dict[str, list[Verdict]] = {name: [] for name in plan.judges}
    for measured in (original, edit):
        if measured.answers is None:
            continue
        caution[measured.state.name] = measured.answers.cautionary
        for name in plan.judges:
            verdicts[name] += measured.answers.of_judge(name)
    return Evaluation(
        n_units=edit.state.n_units,
        n_left_out=plan.prompts.n_left_out,
        design=comparison.design,
        original=state_results(original, original),
        states=comparison.states,
        primary=comparison.primary,
        agreements=_agreements(verdicts),
        sensitivity=_sensitivity(plan, original, edit),
        judge_faults={name: faults(given) for name, given in verdicts.items()},
        caution=caution,
        answers=shown_answers(plan, [original, edit]),
    )


def _agreements(verdicts: Mapping[str, Sequence[Verdict]]) -> tuple[Agreement, ...]:
    """How far every pair of judges agrees that has a verdict in common."""
    agreements = []
    for first_name, second_name in combinations(verdicts, 2):
        first, second = verdicts[first_name], verdicts[second_name]
        if any(verdict.label and other.label for verdict, other in zip(first, second, strict=True)):
            agreements.append(agreement(first_name, first, second_name, second))
    return tuple(agreements)


def _sensitivity(plan: MeasurementPlan, original: StateOutcomes, edit: StateOutcomes) -> Sensitivity | None:
    """What each judge makes of the edit; None where nothing was judged."""
    if original.answers is None or edit.answers is None or not plan.judges:
        return None
    before_and_after = {}
    for name in plan.judges:
        before_and_after[name] = (original.answers.of_judge(name), edit.answers.of_judge(name))
    return sensitivity(before_and_after)
