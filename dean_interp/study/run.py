"""A study in a run folder: the method for each kind of unit, and what the report shows beside it.

Nothing is done twice.
A run folder holds `config.json`, `scores/`, `selection.<unit>.safetensors`, `states/` (measurements), `answers/`,
`results.json`, `checksums.json` of these, and `times.json` for what differs from run to run. Files that end in
`.unfinished` hold what the finished batches of a step left; they go when the step is done.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.circuits.neuron_scores import neuron_scores
from dean_interp.data.leakage import Leaked
from dean_interp.evaluation.guard import held_super_weights, super_weights
from dean_interp.files import write_json
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.scored_prompts import measuring_scored_prompts
from dean_interp.models.sites import Unit
from dean_interp.models.sizes import neuron_counts
from dean_interp.models.threads import chosen_threads
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.progress import ProgressBar, progress_bar
from dean_interp.scoring.scores import Scores
from dean_interp.selection.chance import chance_of
from dean_interp.selection.coupling import Coupling
from dean_interp.selection.selection import Selection, load_selection
from dean_interp.selection.strata import Strata, strata
from dean_interp.statistics import Interval
from dean_interp.study import day
from dean_interp.study.conclusions import faults, headline, state_results
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import named_controls
from dean_interp.study.method import (
    Comparison,
    compare_with_controls,
    control_request,
    couple_or_refuse,
    disjoint_neurons,
    information_before_and_under,
    original_of,
    score,
)
from dean_interp.study.preflight import refuse_silent, refuse_unfit_self
from dean_interp.study.results import (
    RESULTS_FILE,
    Results,
    StateResults,
    TestLeak,
    UnitResults,
    load_results,
)
from dean_interp.study.run_folder import THREADS, Clock, note_checksums, owned
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.shown import shown_answers, shown_neurons, shown_texts
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, measurement_plan, outcomes_of
from dean_interp.study.store import State, Store, fingerprint_of
from dean_interp.study.study_data import PromptSets, StudyData, study_data, test_sets

_N_NAMED = 4
"""Named controls that a unit has at most."""


@own_torch_settings()
def run_study(config: StudyConfig, folder: str | Path) -> Results:
    """Run a study into a folder, or go on with the one that is there.

    Raises:
        InputError: anything wrong with the model, the data or the fractions, before any long work; a folder that holds
            another study, cannot be written, or is being written; no coupled unit; a judge that does not answer.
    """
    config.check()
    folder = Path(folder)
    config = dataclasses.replace(config, model=day.of_run(config.model, folder))
    data = study_data(config)
    if not (folder / RESULTS_FILE).is_file():
        refuse_silent(config.answers)
    with owned(folder, config, data.all):
        path = folder / RESULTS_FILE
        if not path.is_file():
            clock = Clock(folder / "times.json")
            model = config.model.load()
            clock.lap("load")
            with chosen_threads(model, folder / THREADS):
                write_json(path, results_in(folder, model, config=config, data=data, clock=clock))
        note_checksums(folder)
        return load_results(path)


def results_in(folder: Path, model: HookedModel, config: StudyConfig, data: StudyData, clock: Clock) -> Results:
    """The results of a study whose files are in the folder. What is not there yet is made and written there."""
    refuse_unfit_self(config.answers, model)
    scores = [score(model, behaviour, config, folder) for behaviour in data.calibration]
    clock.lap("score")
    couplings = _couplings(config, scores, folder)
    with _progress(config, couplings, folder) as progress:
        neurons = disjoint_neurons(scores, config.information_fraction)
        plan = _plan(folder, model, config=config, data=data, scores=scores, neurons=neurons, progress=progress)
        original = original_of(plan, model)
        unchanged = state_results(original, original)
        calibration = plan.store.calibration(model, data.calibration[:2])
        units, answering = [], [original]
        for unit, coupling in couplings.items():
            own = [behaviour.of(unit) for behaviour in scores]
            of_unit = _CoupledUnits(unit, coupling, scores=own, strata=strata(model, own))
            comparison = _measured(plan, model, original=original, of_unit=of_unit, config=config)
            clock.lap(f"{unit}s: edit and controls")
            (information,) = information_before_and_under(
                plan, original, [comparison.edit], comparison.controls, neurons=neurons, calibration=calibration
            )
            results = _unit_results(
                config, of_unit, comparison=comparison, information=information, unchanged=unchanged
            )
            units.append(results)
            answering += [measured for measured in (comparison.edit, *comparison.controls) if measured.answers]
            clock.lap("mutual information")
    units = _with_faults(model, units, couplings, unchanged)
    texts = shown_texts(folder, model, config=config, data=data, couplings=couplings, scores=scores)
    clock.lap("neuron views")
    return Results(
        config=config,
        model_fingerprint=model_fingerprint(model),
        n_layers=len(model.blocks),
        d_mlp=max(neuron_counts(model)),
        original=unchanged,
        units=tuple(units),
        answers=shown_answers(plan, answering),
        neurons=tuple(neuron_scores(neuron, scores) for neuron in shown_neurons(couplings, scores)),
        texts=texts,
        leaks=_leaks(config, folder, model, data.leaked),
    )


def _couplings(config: StudyConfig, scores: Sequence[Scores], folder: Path) -> dict[Unit, Coupling]:
    """The coupled units of each kind, kept in the folder. An empty set is refused before anything is measured."""
    couplings: dict[Unit, Coupling] = {}
    for unit in config.unit:
        couplings[unit] = couple_or_refuse(scores, config, unit)
        couplings[unit].coupled.save(folder / f"selection.{unit}.safetensors")
    return couplings


def _progress(config: StudyConfig, couplings: Mapping[Unit, Coupling], folder: Path) -> ProgressBar:
    """A bar over all states of the model: those that are measured already count."""
    per_unit = 1 + config.controls.n_random + config.controls.n_equal_kl + _N_NAMED
    n_done = len(list((folder / "states").glob("*.safetensors")))
    return progress_bar(total=1 + len(couplings) * per_unit, initial=n_done, desc="states of the model", unit="state")


def _plan(
    folder: Path,
    model: HookedModel,
    config: StudyConfig,
    data: StudyData,
    scores: Sequence[Scores],
    neurons: tuple[Selection, Selection],
    progress: ProgressBar,
) -> MeasurementPlan:
    """What is measured of each state of this study."""
    parts = [behaviour.fingerprint for behaviour in (*data.tests, *scores)]
    first, second = neurons
    store = Store(
        folder=folder,
        fingerprint=fingerprint_of(model_fingerprint(model), *parts),
        tests=data.tests,
        config=config.data,
        template=config.model.template,
        neurons=first | second,
    )
    return measurement_plan(store, data.prompts, config=config.answers, model=model, progress=progress)


@dataclass(frozen=True)
class _CoupledUnits:
    """What is coupled of one kind of units, and what its controls are drawn by."""

    unit: Unit
    coupling: Coupling
    scores: Sequence[Scores]
    """Of this kind of units, a behaviour each."""
    strata: Strata


def _measured(
    plan: MeasurementPlan,
    model: HookedModel,
    original: StateOutcomes,
    of_unit: _CoupledUnits,
    config: StudyConfig,
) -> Comparison:
    """The edit beside its random controls; the named controls are its last states."""
    edit = State("edit", "edit", ablated=of_unit.coupling.coupled, unit=of_unit.unit)
    request = control_request(
        plan, model, original=original, edit=edit, strata=of_unit.strata, controls=config.controls
    )
    comparison = compare_with_controls(plan, model, original=original, edit=edit, request=request)
    named = []
    for state in named_controls(request, of_unit.coupling, of_unit.scores):
        measured = outcomes_of(plan, model, state, reference=original.measurement, in_full=False)
        named.append(state_results(original, measured))
    return dataclasses.replace(comparison, states=(*comparison.states, *named))


def _unit_results(
    config: StudyConfig,
    of_unit: _CoupledUnits,
    comparison: Comparison,
    information: tuple[MutualInformation, ...],
    unchanged: StateResults,
) -> UnitResults:
    coupling, scores = of_unit.coupling, of_unit.scores
    n_layers = 1 + max(site.layer for site in coupling.coupled.shapes)
    per_layer = [0] * n_layers
    for site, n in coupling.coupled.counts().items():
        per_layer[site.layer] += n
    n_units = sum(value.numel() for value in scores[0].values.values())
    edit = comparison.states[0]
    primary = comparison.primary
    assert primary is not None, "a study has random controls"
    return UnitResults(
        unit=of_unit.unit,
        fractions=coupling.fractions,
        n_units_per_layer=n_units // n_layers,
        sizes=coupling.sizes(),
        coupled_per_layer=tuple(per_layer),
        chance=chance_of(coupling, scores, of_unit.strata, seed=config.data.seed),
        design=comparison.design,
        primary=primary,
        states=comparison.states,
        information=information,
        headline=headline(of_unit.unit, edit, primary, unchanged.perplexity),
    )


def _with_faults(
    model: HookedModel, units: Sequence[UnitResults], couplings: Mapping[Unit, Coupling], original: StateResults
) -> list[UnitResults]:
    """The results with what each edit must not do and does."""
    known = super_weights(model)
    flagged = []
    for results in units:
        silenced = held_super_weights(couplings[results.unit].coupled, known)
        of_edit = faults(results.edit, original, silenced)
        flagged.append(dataclasses.replace(results, faults=of_edit))
    return flagged


def _leaks(config: StudyConfig, folder: Path, model: HookedModel, leaked: Sequence[Leaked]) -> tuple[TestLeak, ...]:
    """How many prompts were left out; where it is asked for, what the edits do on test sets that hold them."""
    changes: dict[str, dict[Unit, Interval]] = {leak.name: {} for leak in leaked}
    is_leaky = any(leak.exact or leak.near for leak in leaked[:2])
    if config.report_leaked and is_leaky:
        tests, _ = test_sets(config.data)
        store = Store(
            folder=folder / "with_leaked",
            fingerprint=fingerprint_of(model_fingerprint(model), *(test.fingerprint for test in tests)),
            tests=tests,
            config=config.data,
            template=config.model.template,
        )
        progress = progress_bar(total=1 + len(config.unit), desc="with leaked prompts", unit="state")
        plan = measurement_plan(store, PromptSets(), config=AnswerConfig(n_answers=0), model=model, progress=progress)
        # Measuring scored prompts is the question here.
        with measuring_scored_prompts(model), progress:
            original = original_of(plan, model, in_full=False)
            for unit in config.unit:
                edit = load_selection(folder / f"selection.{unit}.safetensors")
                edit = dataclasses.replace(edit, prompt_hashes=frozenset())
                state = State("edit", "edit", ablated=edit, unit=unit)
                measured = outcomes_of(plan, model, state, reference=original.measurement, in_full=False)
                for name, change in state_results(original, measured).change.items():
                    changes[name][unit] = change
    return tuple(
        TestLeak(
            behaviour=leak.name,
            n_prompts=leak.n_prompts,
            n_exact=len(leak.exact),
            n_near=len(leak.near),
            change=changes[leak.name],
        )
        for leak in leaked
    )
