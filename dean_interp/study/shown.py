"""What the report shows beside the numbers: the strongest coupled neurons, texts on which they fire, all answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from dean_interp.circuits.neuron import Neuron, TextActivations, strongest_neurons, top_texts
from dean_interp.evaluation.judges.lexical import labels_or_faults
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.sites import Unit
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.coupling import Coupling
from dean_interp.study.config import StudyConfig
from dean_interp.study.results import Answers, AnswerSet, StateAnswers
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes
from dean_interp.study.store import fingerprint_of
from dean_interp.study.study_data import StudyData

N_NEURONS = 8
N_TEXTS = 6
"""How many neurons the report shows, and how many texts, on which all of them are shown."""
N_TEXT_EXAMPLES = 32
"""Examples of each test set among which the texts are looked for."""


def shown_neurons(couplings: Mapping[Unit, Coupling], scores: Sequence[Scores]) -> list[Neuron]:
    """The strongest coupled neurons; none where neurons were not studied."""
    if "neuron" not in couplings:
        return []
    return strongest_neurons(couplings["neuron"].coupled, scores[0], scores[1], n_neurons=N_NEURONS)


def shown_texts(
    folder: Path,
    model: HookedModel,
    config: StudyConfig,
    data: StudyData,
    couplings: Mapping[Unit, Coupling],
    scores: Sequence[Scores],
) -> tuple[TextActivations, ...]:
    """Test texts on which the strongest coupled neurons fire most."""
    neurons = shown_neurons(couplings, scores)
    if not neurons:
        return ()
    shown = [dataclasses.replace(test, examples=test.examples[:N_TEXT_EXAMPLES]) for test in data.tests]
    key = fingerprint_of(model_fingerprint(model), *(test.fingerprint for test in shown))
    unfinished = Unfinished(folder / "texts.unfinished", key)
    texts = top_texts(model, neurons, shown, n_texts=N_TEXTS, template=config.model.template, unfinished=unfinished)
    unfinished.discard()
    return tuple(texts)


def shown_answers(plan: MeasurementPlan, answering: Sequence[StateOutcomes]) -> Answers | None:
    """What the states said, at the largest length."""
    if not plan.prompts.all:
        return None
    prompts = {behaviour.name: tuple(behaviour.prompts) for behaviour in plan.prompts.all}
    states = []
    for measured in answering:
        assert measured.answers is not None
        sets = []
        for name, answers in measured.answers.longest.items():
            labels = labels_or_faults(prompts[name], answers)
            sets.append(AnswerSet(behaviour=name, answers=tuple(answers), labels=tuple(labels)))
        state = measured.state
        states.append(StateAnswers(name=state.name, kind=state.kind, unit=state.unit, sets=tuple(sets)))
    return Answers(judges=tuple(plan.judges), prompts=prompts, states=tuple(states))
