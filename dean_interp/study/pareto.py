"""Which of many edits are worth having: three objectives, two halves of the test topics, and the Pareto front."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.outcomes import LOSS, clusters_of, part_of
from dean_interp.statistics import Interval
from dean_interp.study.results import StateResults
from dean_interp.study.state_outcomes import StateOutcomes

ABILITY = "ability"
"""The third objective: minus the change of the loss on general text, nats per token."""
ChosenRows = Mapping[str, Bool[np.ndarray, " example"]]
"""For each test set, the examples that edits are chosen on."""


def objectives(results: StateResults) -> dict[str, Interval]:
    """The change of each behaviour's margin and of ability, nats per token. Larger is better."""
    changes = dict(results.change)
    for line in results.lines:
        if line.metric == LOSS:
            loss = line.change
            changes[ABILITY] = Interval(
                mean=-loss.mean,
                low=-loss.high,
                high=-loss.low,
                n_clusters=loss.n_clusters,
            )
    return changes


def pareto_front(points: Sequence[Mapping[str, float]]) -> list[bool]:
    """Which points no other dominates: none is at least as good in every objective and better in one."""
    table = np.array([list(point.values()) for point in points])
    on_front = []
    for point in table:
        is_no_worse = (table >= point).all(axis=1)
        is_better = (table > point).any(axis=1)
        dominates = is_no_worse & is_better
        on_front.append(not dominates.any())
    return on_front


def halves(behaviour: Behaviour) -> Bool[np.ndarray, " example"]:
    """True for the examples that edits are chosen on: every other topic (where there are none, every other prompt)."""
    clusters = clusters_of(behaviour)
    distinct = list(dict.fromkeys(clusters))
    every_other = set(distinct[::2])
    return np.array([cluster in every_other for cluster in clusters])


def halves_of(tests: Sequence[Behaviour]) -> tuple[ChosenRows, ChosenRows]:
    """The examples of each test set that edits are chosen on, and those that they are confirmed on."""
    chosen = {test.name: halves(test) for test in tests}
    return chosen, {name: ~rows for name, rows in chosen.items()}


def front_of(results: Sequence[StateResults]) -> list[int]:
    """The numbers of the edits on the Pareto front of both behaviours and ability."""
    means = []
    for state in results:
        changes = objectives(state)
        means.append({name: change.mean for name, change in changes.items()})
    on_front = pareto_front(means)
    return np.flatnonzero(on_front).tolist()


def on_rows(measured: StateOutcomes, rows: ChosenRows) -> StateOutcomes:
    """The outcomes on some of the test prompts."""
    parts = tuple(part_of(outcome, rows[outcome.on]) for outcome in measured.outcomes)
    return dataclasses.replace(measured, outcomes=parts)
