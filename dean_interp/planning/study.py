"""What a study would take on given devices, from the model's configuration and tokenizer alone: no weight is read.

Memory: the weights, what autograd keeps of a batch, the running sums. Time: what goes through the model in each step,
at the pace of a calibration on this machine, or of the arithmetic where the devices are elsewhere. docs/scaling.md says
how near this comes. `planning.scoring` says the same of one scoring pass, of a model that is there and can be watched.
"""

from collections.abc import Sequence

from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sizes import neuron_counts, unembedding_shape
from dean_interp.models.tokens import Row
from dean_interp.planning.amounts import PassKind
from dean_interp.planning.costs import forecast_of, placed_model
from dean_interp.planning.estimates import estimates_of
from dean_interp.planning.forecast import Forecast
from dean_interp.planning.memory import GIB
from dean_interp.planning.parameters import n_weights
from dean_interp.planning.placement import Devices, ScoringPasses, passes_that_fit, room_for_sums
from dean_interp.planning.work import Amounts, StepWork, WorkCounter, added, repeated
from dean_interp.scoring.preparation import ScoringConfig, prepare
from dean_interp.study.config import StudyConfig
from dean_interp.study.study_data import StudyData, study_data

_EQUAL_KL_TRIES = 3
"""Sizes that an equal-KL control takes; the KL of the last one is its own."""
_NAMED_CONTROLS = 4
NOT_COUNTED = "loading, judges, windows of text and tasks are"


def forecast(config: StudyConfig, devices: Devices = Devices()) -> Forecast:  # noqa: B008 - frozen
    """What `run_study` would take with these settings, but for windows of text and tasks.

    Raises:
        InputError: as `run_study` for settings and data, as `load_model` for the name; devices out of range, or too
            small for one batch.
    """
    config.check()
    data = study_data(config)

    def scored_rows(model: HookedModel) -> list[Sequence[Row]]:
        scoring = ScoringConfig(template=config.model.template)
        return [prepare(model, behaviour, scoring).rows for behaviour in data.calibration]

    # Memory: a batch, the weights, then as many layers' sums as there is room for.
    placed = placed_model(config.model, devices, scored_rows, config.calibration.score_tokens)
    placement = placed.placement
    room = room_for_sums(placement, placed.batch, devices, placed.host)
    passes = passes_that_fit(placed.model, config, room)
    # Time: what each step sends through the model.
    works = study_works(placed.model, config, data, passes)
    layers = f" --layers-per-pass {passes.layers_per_pass}" if passes.n_passes > 1 else ""
    return forecast_of(
        placed,
        works,
        command=f"{placement.command}{layers}",
        not_counted=NOT_COUNTED,
        n_passes=passes.n_passes,
        writes=True,
    )


def study_works(model: HookedModel, config: StudyConfig, data: StudyData, passes: ScoringPasses) -> list[StepWork]:
    """What each step of `run_study` sends through the model, by the names of its `times.json`."""
    counter = WorkCounter(
        model=model,
        template=config.model.template,
        score_tokens=config.calibration.score_tokens,
        data=config.data,
        answers=config.answers,
    )
    works = [_score_work(counter, config, data, passes)]
    of_original = _original(counter, data)
    of_unit = _edit_and_controls(counter, config, data)
    disk = _state_gib(model, config, of_original)
    for number, unit in enumerate(config.unit):
        # The original is measured with the first unit.
        amounts = added(of_unit, of_original) if number == 0 else of_unit
        works.append(StepWork(f"{unit}s: edit and controls", amounts, disk_gib=disk / len(config.unit)))
    n_edits = len(config.unit)
    n_controls = n_edits * (config.controls.n_random + config.controls.n_equal_kl)
    estimates = estimates_of(model, data.tests, config.information_fraction, n_edits=n_edits, n_controls=n_controls)
    works.append(StepWork("mutual information", estimates=estimates))
    return works


def _score_work(counter: WorkCounter, config: StudyConfig, data: StudyData, passes: ScoringPasses) -> StepWork:
    kind: PassKind = "weights" if "weight" in config.unit else "neurons"
    amounts = counter.scored(data.calibration, kind)
    if passes.n_passes > 1:
        # Each further pass goes forward and back again; what a weight adds up is added up once.
        again = repeated(counter.scored(data.calibration, "neurons"), passes.n_passes - 1)
        amounts = added(amounts, again)
    # Every process keeps the top scores of weights with their indices; the files also hold whole scores of neurons.
    n_kept = config.keep * n_weights(counter.model) if kind == "weights" else 0
    n_neurons = sum(neuron_counts(counter.model))
    bytes_of_file = 8 * n_kept + 4 * 20 * n_neurons
    return StepWork(
        step="score",
        amounts=amounts,
        sums_gib=passes.sums,
        kept_gib=12 * n_kept / GIB,
        disk_gib=3 * bytes_of_file / GIB,
    )


def _original(counter: WorkCounter, data: StudyData) -> Amounts:
    """The original on all tests, its answers, and its activations on calibration answers, which probes need."""
    parts = [counter.state(data.tests, with_kl=False), counter.answered(data.prompts.all)]
    if all(behaviour.paired for behaviour in data.calibration[:2]):
        parts.append(counter.measured(data.calibration[:2]))
    return added(*parts)


def _edit_and_controls(counter: WorkCounter, config: StudyConfig, data: StudyData) -> Amounts:
    """One unit's edit with its controls: every state on all tests, and some of them answer."""
    controls = config.controls
    # While an equal-KL control is grown, general text is enough.
    n_tries = controls.n_equal_kl * (_EQUAL_KL_TRIES - 1)
    # No more controls answer than the last kind has.
    n_answering = 1 + min(config.answers.n_answer_controls, controls.n_equal_kl or controls.n_random)
    return added(
        repeated(counter.state(data.tests), _n_states(config)),
        repeated(counter.measured(data.tests[2:], with_kl=True), n_tries),
        repeated(counter.answered(data.prompts.all), n_answering),
    )


def _n_states(config: StudyConfig) -> int:
    """One unit's edit and its controls."""
    return 1 + config.controls.n_random + config.controls.n_equal_kl + _NAMED_CONTROLS


def _state_gib(model: HookedModel, config: StudyConfig, of_original: Amounts) -> float:
    """What the states keep on disk."""
    n_states = 1 + len(config.unit) * _n_states(config)
    # Each state keeps activations where a prompt and its two answers end, of two behaviours, in float32. Neurons in
    # both tops are left out: about half.
    n_neurons = config.information_fraction * sum(neuron_counts(model))
    per_state = 4 * 3 * 2 * config.data.n_test * n_neurons
    # Of the original it is also kept what the unembedding reads at answer tokens.
    d_model, _ = unembedding_shape(model)
    of_reference = 4 * of_original["forward"].n_logits * d_model
    return (n_states * per_state + of_reference) / GIB
