"""The rows of tables of states, and the tables of one metric: what the pages of studies, sweeps and arms share.

Kinds of random controls and metrics are taken from the results, so a new one has its row or its table by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dean_interp.evaluation.lines import Line
from dean_interp.report.page import MeanAndRange, before, is_share, mean_and_range, shared_digits
from dean_interp.statistics import Interval
from dean_interp.study.controls import RANDOM_CONTROLS
from dean_interp.study.results import StateResults, UnitResults

ChangesOf = Callable[[StateResults], Mapping[str, Interval]]
"""Gives the changes of one state that a table shows, by the heading of their column."""
LinesByState = dict[str, dict[str, Line]]
"""The lines of one metric: by state, then by set of prompts."""


@dataclass(frozen=True)
class StateRow:
    """One row of a table of states: a single state, or the random controls of one kind."""

    label: str
    is_edit: bool
    n_units: str
    changes: Mapping[str, Interval | MeanAndRange]
    """The interval of a single state's change; mean, lowest and highest of a group."""
    perplexity: float
    """Mean over a group."""
    kl: float
    """Mean over a group, nats per token."""


def margins(state: StateResults) -> Mapping[str, Interval]:
    """The change of each behaviour's margin."""
    return state.change


def single_row(state: StateResults, label: str, changes: ChangesOf = margins) -> StateRow:
    """The row of one state."""
    return StateRow(
        label=label,
        is_edit=state.kind == "edit",
        n_units=str(state.n_units),
        changes=changes(state),
        perplexity=state.perplexity,
        kl=state.kl,
    )


def control_rows(states: Sequence[StateResults], changes: ChangesOf = margins) -> list[StateRow]:
    """One row for each kind of random control that is among the states."""
    rows = []
    for kind, control in RANDOM_CONTROLS.items():
        group = [state for state in states if state.kind == kind]
        if group:
            label = f"{len(group)} random, {control.label}"
            rows.append(group_row(group, label, changes))
    return rows


def group_row(group: Sequence[StateResults], label: str, changes: ChangesOf = margins) -> StateRow:
    """The row of several states: the mean of each change, with the lowest and the highest."""
    means: dict[str, list[float]] = {}
    for state in group:
        for name, change in changes(state).items():
            means.setdefault(name, []).append(change.mean)
    sizes = sorted({state.n_units for state in group})
    n_units = str(sizes[0])
    if len(sizes) > 1:
        n_units += f"–{sizes[-1]}"
    return StateRow(
        label=label,
        is_edit=False,
        n_units=n_units,
        changes={name: mean_and_range(values) for name, values in means.items()},
        perplexity=sum(state.perplexity for state in group) / len(group),
        kl=sum(state.kl for state in group) / len(group),
    )


def unit_rows(results: UnitResults) -> list[StateRow]:
    """The edit of one kind of unit, its named controls, and its random controls by kind."""
    rows = [single_row(results.edit, f"coupled {results.unit}s")]
    for state in results.states:
        if state.kind == "named":
            rows.append(single_row(state, f"top of {state.name}"))
    return rows + control_rows(results.states)


@dataclass(frozen=True)
class MetricTable:
    """One metric: a row a state, and for each set of prompts its change."""

    metric: str
    unit: str
    headings: Mapping[str, str]
    """Each set of prompts, with the original's level where all states were compared with the same."""
    rows: Mapping[str, Mapping[str, Line]]
    """The lines of each state by set."""

    @property
    def digits(self) -> int:
        """The decimals of all its changes."""
        return shared_digits(line.change for row in self.rows.values() for line in row.values())


def metric_tables(lines: Mapping[str, Sequence[Line]]) -> list[MetricTable]:
    """Every metric that is among the lines of several states."""
    by_metric: dict[str, LinesByState] = {}
    for state, state_lines in lines.items():
        for line in state_lines:
            rows = by_metric.setdefault(line.metric, {})
            of_state = rows.setdefault(state, {})
            of_state[line.on] = line
    return [_metric_table(metric, rows) for metric, rows in by_metric.items()]


def _metric_table(metric: str, rows: LinesByState) -> MetricTable:
    levels: dict[str, set[str]] = {}
    unit = ""
    for row in rows.values():
        for on, line in row.items():
            level = levels.setdefault(on, set())
            level.add(before(line))
            unit = unit or unit_in_words(line)
    headings = {}
    for on, level in levels.items():
        headings[on] = on
        # One level alone: all states were compared with the same.
        if len(level) == 1:
            headings[on] += f", {level.pop()} before"
    return MetricTable(metric=metric, unit=unit, headings=headings, rows=rows)


@dataclass(frozen=True)
class LineGroup:
    """The lines of one metric in one state."""

    metric: str
    unit: str
    lines: tuple[Line, ...]

    @property
    def digits(self) -> int:
        """The decimals of all its numbers."""
        return shared_digits(line.change for line in self.lines)


def line_groups(lines: Sequence[Line]) -> list[LineGroup]:
    """One state's lines by metric, in the order in which they were measured."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.metric, []).append(line)
    found = []
    for metric, group in groups.items():
        unit = unit_in_words(group[0])
        found.append(LineGroup(metric, unit, tuple(group)))
    return found


def unit_in_words(line: Line) -> str:
    """The unit of a metric, and which side is better."""
    unit = "% of prompts, changes in points" if is_share(line) else line.unit
    if line.better == "neither":
        return unit
    return f"{unit}; {line.better} is better"
