"""What is measured of one state of the model, as outcomes: likelihoods in every state, and what takes longer in some.

A new kind of measurement is a function here and an entry in `MEASUREMENTS`. It then appears in `run`, `sweep`,
`evaluate` and the report, since all of them show outcomes.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.harness import TaskResult, run_harness, task_files_fingerprint
from dean_interp.evaluation.judges import Judge, Verdict, judge_fingerprint, judged, make_judge
from dean_interp.evaluation.judges.lexical import cautionary_phrases
from dean_interp.evaluation.measurement import Measurement
from dean_interp.evaluation.outcomes import (
    MARGIN,
    Outcome,
    PromptKind,
    answer_outcomes,
    likelihoods,
    task_outcomes,
    window_outcomes,
)
from dean_interp.evaluation.served import Served
from dean_interp.models.load import HookedModel
from dean_interp.progress import ProgressBar
from dean_interp.resume import Unfinished
from dean_interp.study.answering import answers_of
from dean_interp.study.kept_windows import kept_windows
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.store import ORIGINAL, State, Store, file_name, fingerprint_of
from dean_interp.study.study_data import PromptSets, running_text


@dataclass(frozen=True)
class MeasurementPlan:
    """What is measured of each state, and where it is kept."""

    store: Store
    prompts: PromptSets
    config: AnswerConfig
    judges: Mapping[str, Judge]
    """Who judges answers to harmful prompts, by name."""
    progress: ProgressBar | None
    """Moves by one for each state; None: nothing is shown."""
    servers: Mapping[str, Served]
    """Servers that answer in place of the model, by the name of the state; empty: none."""


@dataclass(frozen=True)
class JudgedAnswers:
    """The answers of one state to every set of prompts, and what the judges make of them."""

    answers: Mapping[int, Mapping[str, Sequence[str]]]
    """By length (new tokens) and by set."""
    verdicts: Mapping[int, Mapping[str, Mapping[str, Sequence[Verdict]]]]
    """By length, by set of harmful prompts and by judge."""

    @property
    def longest(self) -> Mapping[str, Sequence[str]]:
        """The answers of the largest length, by set."""
        return self.answers[max(self.answers)]

    def of_judge(self, judge: str) -> list[Verdict]:
        """All verdicts of one judge, in one order for every state."""
        verdicts = []
        for by_set in self.verdicts.values():
            for by_judge in by_set.values():
                verdicts += by_judge[judge]
        return verdicts

    @property
    def cautionary(self) -> dict[str, int]:
        """Cautionary phrases in the longest answers, the most frequent first."""
        counts = Counter[str]()
        for answers in self.longest.values():
            for answer in answers:
                counts.update(cautionary_phrases(answer))
        return dict(counts.most_common())


@dataclass(frozen=True)
class StateOutcomes:
    """Everything that was measured of one state."""

    state: State
    measurement: Measurement
    outcomes: tuple[Outcome, ...]
    answers: JudgedAnswers | None
    """None where the state was not asked for its own answers."""

    def margin(self, behaviour: str) -> Outcome:
        """The margins of a behaviour's prompts."""
        return next(outcome for outcome in self.outcomes if outcome.key == (MARGIN, behaviour))


def measurement_plan(
    store: Store,
    prompts: PromptSets,
    config: AnswerConfig,
    model: HookedModel | None,
    progress: ProgressBar | None,
    *,
    servers: Mapping[str, Served] | None = None,
) -> MeasurementPlan:
    """What is measured of each state. Raises `InputError` for a judge or a text that does not exist."""
    judges = {}
    if prompts.all:
        judges = {name: make_judge(name, model, folder=store.folder) for name in config.judges}
    if config.window is not None:
        running_text(config.text)
    return MeasurementPlan(
        store=store,
        prompts=prompts,
        config=config,
        judges=judges,
        progress=progress,
        servers=servers or {},
    )


def outcomes_of(
    plan: MeasurementPlan,
    model: HookedModel | None,
    state: State,
    *,
    reference: Measurement | None,
    in_full: bool,
) -> StateOutcomes:
    """Everything that is measured of one state, from the store or measured now.

    Args:
        model: None where the state is known to be in the store.
        reference: the measurement of the original, to which KL is taken; None: of the original itself, or of another
            model, no KL is taken.
        in_full: also what takes longer: answers, windows of text, tasks.
    """
    if plan.progress is not None:
        plan.progress.set_postfix_str(state.title)
    is_new = not plan.store.holds(state)
    measurement = plan.store.measurement(model, state, reference=reference)
    answers = judged_answers(plan, model, state) if in_full and plan.prompts.all else None
    outcomes = []
    for kind in MEASUREMENTS.values():
        if in_full or kind.in_every_state:
            outcomes += kind.outcomes(plan, model, state, measurement)
    if answers is not None:
        outcomes += _answer_outcomes(plan, answers)
    if plan.progress is not None:
        plan.progress.update(is_new)
    return StateOutcomes(state=state, measurement=measurement, outcomes=tuple(outcomes), answers=answers)


def is_known(plan: MeasurementPlan, state: State, *, in_full: bool) -> bool:
    """Whether everything that is measured of a state is in the store, so that no model is needed."""
    name = file_name(state.title)
    wanted = []
    if in_full and plan.prompts.all:
        wanted.append(f"answers/{name}.json")
    if in_full and plan.config.window is not None:
        wanted.append(f"windows/{name}.safetensors")
    if in_full and plan.config.tasks:
        wanted.append(f"tasks/{name}.json")
    are_there = all((plan.store.folder / path).is_file() for path in wanted)
    return plan.store.holds(state) and are_there


def judged_answers(plan: MeasurementPlan, model: HookedModel | None, state: State) -> JudgedAnswers:
    """The state's answers to every set of prompts, judged. Each is given once and judged once."""
    server = plan.servers.get(state.name)
    answers = answers_of(plan.store, model, state=state, behaviours=plan.prompts.all, config=plan.config, server=server)
    verdicts: dict[int, dict[str, dict[str, list[Verdict]]]] = {}
    for length, by_set in answers.items():
        verdicts[length] = {}
        for behaviour in plan.prompts.harmful:
            given = by_set[behaviour.name]
            by_judge = {name: _verdicts(plan, judge, behaviour, given) for name, judge in plan.judges.items()}
            verdicts[length][behaviour.name] = by_judge
    return JudgedAnswers(answers=answers, verdicts=verdicts)


def _verdicts(plan: MeasurementPlan, judge: Judge, behaviour: Behaviour, answers: Sequence[str]) -> list[Verdict]:
    """One judge's verdicts: from their file, else given and written there."""
    of_judge = judge_fingerprint(judge)
    key = fingerprint_of(of_judge, *behaviour.prompts, *answers)

    def make(_: Unfinished) -> list[Verdict]:
        return judged(judge, behaviour.prompts, answers)

    # A judge that failed is asked again the next time.
    def is_whole(verdicts: list[Verdict]) -> bool:
        return all(verdict.label is not None for verdict in verdicts)

    return plan.store.record(f"verdicts/{key}.json", [of_judge], list[Verdict], make, keep=is_whole)


def _answer_outcomes(plan: MeasurementPlan, answers: JudgedAnswers) -> list[Outcome]:
    kinds: dict[PromptKind, Sequence[Behaviour]] = {
        "harmful": plan.prompts.harmful,
        "over_refusal": plan.prompts.over_refusal,
        "general": plan.prompts.general,
    }
    outcomes = []
    for length, by_set in answers.answers.items():
        for kind, behaviours in kinds.items():
            for behaviour in behaviours:
                given = by_set[behaviour.name]
                verdicts = answers.verdicts[length].get(behaviour.name, {})
                outcomes += answer_outcomes(kind, behaviour, answers=given, verdicts=verdicts, length=length)
    return outcomes


def _likelihoods(
    plan: MeasurementPlan, model: HookedModel | None, state: State, measurement: Measurement
) -> list[Outcome]:
    outcomes = likelihoods(measurement, plan.store.tests)
    if not state.model:
        return outcomes
    # Another model shares no unembedding with the original, so it has no KL to it.
    return [outcome for outcome in outcomes if not outcome.metric.startswith("KL")]


def _further(plan: MeasurementPlan, model: HookedModel | None, state: State, measurement: Measurement) -> list[Outcome]:
    others = plan.store.others
    if not others:
        return []
    return likelihoods(plan.store.further(model, state), others)


def _windows(plan: MeasurementPlan, model: HookedModel | None, state: State, measurement: Measurement) -> list[Outcome]:
    source, window = plan.config.text, plan.config.window
    if window is None:
        return []
    reference = None
    # Another model shares no unembedding with the original, so it has no KL to it.
    if state.fingerprint and not state.model:
        reference = kept_windows(plan.store, model, ORIGINAL, source=source, window=window)
    measured = kept_windows(plan.store, model, state, source=source, window=window, reference=reference)
    return window_outcomes(measured, source)


def _tasks(plan: MeasurementPlan, model: HookedModel | None, state: State, measurement: Measurement) -> list[Outcome]:
    config = plan.config
    if not config.tasks:
        return []

    def make(_: Unfinished) -> list[dict[str, Any]]:
        assert model is not None, f"{state.title} was not measured"
        with state.applied(model):
            results = run_harness(model, config.tasks, limit=config.task_limit, folder=config.task_folder)
        return [dataclasses.asdict(result) | {"values": result.values.tolist()} for result in results]

    name = f"tasks/{file_name(state.title)}.json"
    settings = [*config.tasks, str(config.task_limit), task_files_fingerprint(config.task_folder), state.fingerprint]
    records = plan.store.record(name, settings, list[dict[str, Any]], make)
    results = []
    for record in records:
        values = np.array(record.pop("values"), dtype=float)
        items = tuple(record.pop("items"))
        results.append(TaskResult(**record, values=values, items=items))
    return task_outcomes(results)


Measure = Callable[[MeasurementPlan, "HookedModel | None", State, Measurement], list[Outcome]]


@dataclass(frozen=True)
class MeasurementKind:
    """One kind of measurement."""

    outcomes: Measure
    """Gives the outcomes of one state; an empty list where the settings do not ask for them."""
    in_every_state: bool
    """False: only the original, the edit and a few controls are measured, since it takes long."""


MEASUREMENTS: dict[str, MeasurementKind] = {
    "likelihoods": MeasurementKind(_likelihoods, in_every_state=True),
    "further": MeasurementKind(_further, in_every_state=False),
    "windows": MeasurementKind(_windows, in_every_state=False),
    "tasks": MeasurementKind(_tasks, in_every_state=False),
}
"""Every kind of measurement beside answers, in the order of the table."""
