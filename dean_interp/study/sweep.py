"""Many edits from one scoring pass: fraction, unit, method and value, and which of them is worth having.

Every edit is measured on the same test prompts. They are split by topic: the Pareto front over both behaviours and
general ability is **chosen** on one half and **confirmed** on the other, beside matched random controls. The best of
many edits looks good by luck where it was chosen; only the other half says how good it is.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import MARGIN, clusters_of
from dean_interp.files import write_json
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.sites import Unit
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.progress import progress_bar
from dean_interp.scoring.scores import Scores
from dean_interp.selection.strata import Strata, strata
from dean_interp.study import day
from dean_interp.study.conclusions import state_results
from dean_interp.study.config import StudyConfig, SweepConfig, SweepMethod
from dean_interp.study.controls import ControlRequest
from dean_interp.study.method import compare_with_controls, control_request, original_of, score
from dean_interp.study.pareto import front_of, halves_of, objectives, on_rows
from dean_interp.study.results import StateResults, load_record
from dean_interp.study.run_folder import Clock, owned
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, measurement_plan, outcomes_of
from dean_interp.study.store import Store, fingerprint_of
from dean_interp.study.study_data import PromptSets, calibration_sets, test_sets
from dean_interp.study.sweep_edits import SweepEdit, sweep_edits


@dataclass(frozen=True)
class Point:
    """One edit, compared with the original on each half of the topics."""

    unit: Unit
    method: SweepMethod
    fraction: float
    value: str
    n_units: int
    chosen_on: StateResults
    """On the half on which the front is chosen."""
    confirmed_on: StateResults
    """On the other half. For edits on the front, its lines hold their ranks among the controls."""
    on_front: bool = False
    """No other edit is better in one objective and no worse in the others, where it was chosen."""
    controls: tuple[StateResults, ...] = ()
    """Random controls on the confirming half, for edits on the front."""

    @property
    def name(self) -> str:
        """Unit, method, fraction and value in one word."""
        return f"{self.unit} {self.method} {self.fraction:g} x{self.value}"


@dataclass(frozen=True)
class Sweep:
    """Every edit that was tried."""

    config: SweepConfig
    model_fingerprint: str
    points: tuple[Point, ...]
    empty: tuple[str, ...]
    """Combinations that select no unit."""

    @property
    def objectives(self) -> list[str]:
        """Both behaviours and ability."""
        return list(objectives(self.points[0].chosen_on))


@own_torch_settings()
def run_sweep(config: SweepConfig, folder: str | Path) -> Sweep:
    """Run a sweep into a folder, or go on with the one that is there. Killed, it loses no more than a batch.

    Raises `InputError` as `run_study` does, and where no combination selects a unit.
    """
    config.check()
    folder = Path(folder)
    config = dataclasses.replace(config, model=day.of_run(config.model, folder))
    calibration = calibration_sets(config.data, config.calibration)
    tests, _ = test_sets(config.data, calibration)
    _refuse_few_topics(tests)
    with owned(folder, config, [*calibration, *tests]):
        if (folder / "sweep.json").is_file():
            return load_sweep(folder / "sweep.json")
        clock = Clock(folder / "times.json")
        model = config.model.load()
        study = _as_study(config)
        scores = [score(model, behaviour, study, folder) for behaviour in calibration]
        clock.lap("score")
        sweep = _sweep(config, folder, model=model, calibration=calibration, tests=tests, scores=scores)
        clock.lap("edits")
        write_json(folder / "sweep.json", sweep)
        return sweep


def _refuse_few_topics(tests: Sequence[Behaviour]) -> None:
    """Raise `InputError` where a half of the test topics is too small for an interval."""
    for test in tests:
        n_topics = len(set(clusters_of(test)))
        if n_topics < 4:
            raise InputError(
                f"a sweep chooses on half of the topics and confirms on the other, so each test set needs at least 4; "
                f"'{test.name}' has {n_topics}"
            )


def _as_study(config: SweepConfig) -> StudyConfig:
    """The settings of a study that scores what a sweep needs: scores are kept for the largest fraction."""
    return StudyConfig(
        model=config.model,
        data=config.data,
        calibration=config.calibration,
        unit=config.unit,
        weight_fraction=max(config.weight_fractions),
    )


def load_sweep(path: Path) -> Sweep:
    """A sweep from its file. Raises `InputError` where it is missing or something else."""
    return load_record(Sweep, path, "sweep results")


def sweep_headline(sweep: Sweep) -> str:
    """Whether any edit on the front raises both behaviours on the confirming half, in plain words."""
    front = [point for point in sweep.points if point.on_front]
    first, second, _ = sweep.objectives
    better = [point for point in front if _raises_both(point)]
    if not better:
        return (
            f"None of the {len(front)} edits on the front (of {len(sweep.points)}) raises both the {first} and the "
            f"{second} margin on the confirming half, intervals above 0 and beyond its random controls."
        )
    names = ", ".join(point.name for point in better)
    return (
        f"{len(better)} of {len(front)} edits on the front raise both margins on the confirming half, beyond their "
        f"random controls: {names}."
    )


def _raises_both(point: Point) -> bool:
    """Whether both margins rise on the confirming half, intervals above 0 and beyond every random control."""
    for line in margins_of(point.confirmed_on):
        is_beyond = all(change < line.change.mean for change in line.control_changes)
        if line.change.low <= 0 or not is_beyond:
            return False
    return True


def margins_of(results: StateResults) -> list[Line]:
    """The lines of both behaviours' margins."""
    return [line for line in results.lines if line.metric == MARGIN]


def _sweep(
    config: SweepConfig,
    folder: Path,
    model: HookedModel,
    calibration: Sequence[Behaviour],
    tests: Sequence[Behaviour],
    scores: Sequence[Scores],
) -> Sweep:
    edits, empty = sweep_edits(config, model, calibration, scores)
    parts = [behaviour.fingerprint for behaviour in (*tests, *scores)]
    store = Store(
        folder=folder,
        fingerprint=fingerprint_of(model_fingerprint(model), *parts),
        tests=tests,
        config=config.data,
        template=config.model.template,
    )
    with progress_bar(total=1 + len(edits), desc="edits", unit="edit") as progress:
        plan = measurement_plan(store, PromptSets(), config=AnswerConfig(n_answers=0), model=model, progress=progress)
        original = original_of(plan, model, in_full=False)
        points = _points(plan, model, original, edits)
        # Choose the front on one half of the topics, and confirm it on the other, beside controls.
        front = front_of([point.chosen_on for point in points])
        n_controls = config.controls.n_random + config.controls.n_equal_kl
        progress.total += len(front) * n_controls
        matched: dict[Unit, Strata] = {}
        for unit in config.unit:
            matched[unit] = strata(model, [behaviour.of(unit) for behaviour in scores])
        for number in front:
            edit = edits[number]
            request = control_request(
                plan, model, original=original, edit=edit.state, strata=matched[edit.unit], controls=config.controls
            )
            points[number] = _confirmed(plan, model, original=original, point=points[number], request=request)
    return Sweep(config, model_fingerprint(model), tuple(points), tuple(empty))


def _points(
    plan: MeasurementPlan, model: HookedModel, original: StateOutcomes, edits: Sequence[SweepEdit]
) -> list[Point]:
    """Every edit, compared with the original on each half of the topics."""
    chosen_on, confirmed_on = halves_of(plan.store.tests)
    points = []
    for edit in edits:
        measured = outcomes_of(plan, model, edit.state, reference=original.measurement, in_full=False)
        point = Point(
            unit=edit.unit,
            method=edit.method,
            fraction=edit.fraction,
            value=edit.value,
            n_units=edit.state.n_units,
            chosen_on=state_results(on_rows(original, chosen_on), on_rows(measured, chosen_on)),
            confirmed_on=state_results(on_rows(original, confirmed_on), on_rows(measured, confirmed_on)),
        )
        points.append(point)
    return points


def _confirmed(
    plan: MeasurementPlan, model: HookedModel, original: StateOutcomes, point: Point, request: ControlRequest
) -> Point:
    """A point of the front on the confirming half, beside its controls."""
    _, rows = halves_of(plan.store.tests)

    def confirming(measured: StateOutcomes) -> StateOutcomes:
        return on_rows(measured, rows)

    comparison = compare_with_controls(
        plan,
        model,
        confirming(original),
        edit=request.edit,
        request=request,
        part=confirming,
    )
    edit, *controls = comparison.states
    return dataclasses.replace(point, on_front=True, confirmed_on=edit, controls=tuple(controls))
