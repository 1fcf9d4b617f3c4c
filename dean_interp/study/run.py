"""The study, step by step: score, couple, ablate, measure beside controls, answer, report. Nothing is done twice.

A run folder holds `config.json`, `scores/`, `selection.<unit>.safetensors`, `states/` (measurements), `answers/`,
`results.json`, `checksums.json` of these, and `times.json` for what differs from run to run. Files that end in
`.unfinished` hold what the finished batches of a step left; they go when the step is done.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.circuits.neuron import Neuron, neuron_scores, strongest_neurons, top_texts
from dean_interp.data.examples import Behaviour
from dean_interp.data.leakage import Leaked
from dean_interp.errors import InputError
from dean_interp.evaluation.guard import held_super_weights, super_weights
from dean_interp.models.load import HookedModel, load_model, model_fingerprint, refuse_not_finite
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import Unit
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished, discard
from dean_interp.scoring.importance import ScoringConfig, importance, scores_fingerprint
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.controls import strata
from dean_interp.selection.coupling import Coupling, coupling, refuse_empty
from dean_interp.selection.selection import Selection, load_selection
from dean_interp.statistics import Interval
from dean_interp.study.answers import spoken
from dean_interp.study.comparison import Comparison
from dean_interp.study.config import StudyConfig
from dean_interp.study.folder import Clock, note_checksums, owned
from dean_interp.study.outcome import faults_of, state_of
from dean_interp.study.results import Results, Spoken, TestLeak, load_results, save_results
from dean_interp.study.states import States, disjoint_neurons

N_NEURONS, N_TEXTS, N_TEXT_EXAMPLES = 8, 6, 32  # shown in the report
N_NAMED = 4  # named controls a unit has at most


def run_study(config: StudyConfig, folder: str | Path) -> Results:
    """Run a study into a folder, or go on with the one that is there.

    Raises:
        InputError: anything wrong with the model, the data or the fractions, before any long work; a folder that holds
            another study, cannot be written, or is being written; no coupled unit.
    """
    config.check()
    folder = Path(folder)
    data = data_of(config)
    with owned(folder, dataclasses.asdict(config), data.all):
        path = folder / "results.json"
        if not path.is_file():
            clock = Clock(folder / "times.json")
            model = load_model(config.model, device=config.device, dtype=config.dtype)
            refuse_not_finite(model)
            clock.lap("load")
            save_results(results_in(folder, model, config, data, clock), path)
        note_checksums(folder)
        return load_results(path)


@dataclass(frozen=True)
class StudyData:
    """The examples of a study; of `calibration` and `tests`: first, second, general."""

    calibration: Sequence[Behaviour]
    tests: Sequence[Behaviour]
    benign: Sequence[Behaviour]
    leaked: Sequence[Leaked]
    """What was left out of each test set."""

    @property
    def all(self) -> list[Behaviour]:
        """All that the folder's `config.json` names."""
        return [*self.calibration, *self.tests, *self.benign]


def data_of(config: StudyConfig) -> StudyData:
    """The examples that the settings name. Raises `InputError` as `StudyConfig.tests`."""
    calibration = config.calibration()
    tests, leaked = config.tests(calibration)
    return StudyData(calibration, tests, config.benign(), leaked)


def results_in(folder: Path, model: HookedModel, config: StudyConfig, data: StudyData, clock: Clock) -> Results:
    """The results of a study whose files are in the folder; what is not there yet is made and written there."""
    scores = [score_into(folder, model, behaviour, config) for behaviour in data.calibration]
    clock.lap("score")
    results = _study(config, folder, model, data, scores, clock)
    return dataclasses.replace(results, leaks=_leaks(config, folder, model, data.leaked, results))


def score_into(folder: Path, model: HookedModel, behaviour: Behaviour, config: StudyConfig) -> Scores:
    """From the run folder where the file is of this very model and data, else scored and written there."""
    path = folder / "scores" / f"{behaviour.name}.safetensors"
    how = scoring_of(config)
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        scores = importance(model, behaviour, unit=config.scored, config=how, keep=config.keep, unfinished=unfinished)
        scores.save(path, keep=config.keep)
        discard(unfinished)
    scores = load_scores(path)
    if scores.fingerprint != scores_fingerprint(model, behaviour, unit=config.scored, config=how):
        raise InputError(f"{path} was made with another model or other data: choose another folder")
    scored_prompts(model).update(behaviour.prompt_hashes)
    return scores


def scoring_of(config: StudyConfig) -> ScoringConfig:
    """How a study scores."""
    return ScoringConfig(
        template=config.template, batch_tokens=config.score_tokens, layers_per_pass=config.layers_per_pass
    )


def _study(
    config: StudyConfig,
    folder: Path,
    model: HookedModel,
    data: StudyData,
    scores: Sequence[Scores],
    clock: Clock,
) -> Results:
    tests = data.tests
    found: dict[Unit, Coupling] = {unit: _coupled(config, folder, unit, scores) for unit in config.units}
    known = [model_fingerprint(model), *(test.fingerprint for test in tests), *(one.fingerprint for one in scores)]
    first_neurons, second_neurons = disjoint_neurons(scores, config.information_fraction)
    n_states = 1 + len(found) * (1 + config.n_random + config.n_equal_kl + N_NAMED)
    n_done = len(list((folder / "states").glob("*.safetensors")))
    with progress_bar(total=n_states, initial=n_done, desc="states of the model", unit="state") as progress:
        read = first_neurons | second_neurons
        states = States(config, folder / "states", model, tests, read, known, progress, data.calibration[:2])
        comparisons: dict[Unit, Comparison] = {}
        units = []
        for unit, one in found.items():
            own = [behaviour.of(unit) for behaviour in scores]
            matched = strata(model, own)
            comparisons[unit] = Comparison(config, unit, one, own, matched, states, (first_neurons, second_neurons))
            units.append(comparisons[unit].results())
            clock.lap(f"{unit}s: edit and controls")
    answers = _spoken(config, folder, model, tests, data.benign, comparisons, states.fingerprint)
    clock.lap("answers")
    original = state_of("original", "original", 0, 0.0, states.original, states.original, states.general)
    known = super_weights(model)
    units = [
        dataclasses.replace(
            one, faults=faults_of(one, original, answers, held_super_weights(found[one.unit].coupled, known))
        )
        for one in units
    ]
    neurons: list[Neuron] = []
    if "neuron" in found:
        neurons = strongest_neurons(found["neuron"].coupled, scores[0], scores[1], n_neurons=N_NEURONS)
    shown = [dataclasses.replace(test, examples=test.examples[:N_TEXT_EXAMPLES]) for test in tests]
    unfinished = Unfinished(folder / "texts.unfinished", states.fingerprint)
    texts = top_texts(
        model, neurons, shown, n_texts=N_TEXTS, template=config.template, unfinished=unfinished
    ) if neurons else []  # fmt: skip
    unfinished.discard()
    clock.lap("neuron views")
    return Results(
        config,
        model_fingerprint(model),
        model.cfg.n_layers,
        model.cfg.d_mlp,
        original,
        tuple(units),
        answers,
        tuple(neuron_scores(neuron, scores) for neuron in neurons),
        tuple(texts),
        (),
    )


def _leaks(
    config: StudyConfig, folder: Path, model: HookedModel, leaked: Sequence[Leaked], results: Results
) -> tuple[TestLeak, ...]:
    """How many prompts were left out; where it is asked for, what the edits do on test sets that hold them."""
    changes: dict[str, dict[Unit, Interval]] = {one.name: {} for one in leaked}
    if config.report_leaked and any(one.exact or one.near for one in leaked[:2]):
        tests, _ = config.tests()
        known = [results.model_fingerprint, *(test.fingerprint for test in tests)]
        scored_prompts(model).clear()  # the one place where measuring scored prompts is the question
        with progress_bar(total=1 + len(config.units), desc="with leaked prompts", unit="state") as progress:
            states = States(config, folder / "states_with_leaked", model, tests, None, known, progress)
            for unit in config.units:
                edit = load_selection(folder / f"selection.{unit}.safetensors")
                measured = states.measured(f"{unit} edit", dataclasses.replace(edit, prompt_hashes=frozenset()))
                line = state_of("edit", "edit", len(edit), 1.0, measured, states.original, states.general)
                for name, change in line.change.items():
                    changes[name][unit] = change
    return tuple(TestLeak(one.name, one.n_prompts, len(one.exact), len(one.near), changes[one.name]) for one in leaked)


def _coupled(config: StudyConfig, folder: Path, unit: Unit, scores: Sequence[Scores]) -> Coupling:
    """Which units are coupled, written down; an empty selection is refused before anything is measured."""
    own = [one.of(unit) for one in scores]
    found = coupling(*own, fraction=config.fraction(unit))
    refuse_empty(found, *own)
    found.coupled.save(folder / f"selection.{unit}.safetensors")
    return found


def _spoken(
    config: StudyConfig,
    folder: Path,
    model: HookedModel,
    tests: Sequence[Behaviour],
    benign: Sequence[Behaviour],
    comparisons: dict[Unit, Comparison],
    fingerprint: str,
) -> Spoken | None:
    """The original, every edit, and `n_answer_controls` equal-KL controls of each."""
    if not config.n_answers:
        return None
    sets = [dataclasses.replace(test, examples=test.examples[: config.n_answers]) for test in tests[:2]]
    states: list[tuple[str, str, Unit | None, Selection | None]] = [("original", "original", None, None)]
    for unit, comparison in comparisons.items():
        for name in ("edit", *(f"equal KL {i + 1}" for i in range(config.n_answer_controls))):
            one = comparison.ablated[name]
            states.append((f"{unit} {name}", one.kind, unit, one.selection))
    return spoken(config, folder / "answers", model, sets, benign, states, fingerprint=fingerprint)
