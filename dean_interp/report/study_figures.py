"""Pictures of a study: each function takes a part of the results and returns a `Picture`."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.report.figures import Range, errors_of, label_layers, whiskers
from dean_interp.report.look import BLUE, EDIT, FAINT, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, Look
from dean_interp.report.pictures import Picture, interval_cells, n_of_lines, styled
from dean_interp.selection.chance import Chance
from dean_interp.selection.stability import N_SHUFFLES, N_SPLITS, Halves
from dean_interp.study.controls import RANDOM_CONTROLS, is_random
from dean_interp.study.results import Answers, StateResults, UnitResults

_CONTROL_LOOKS = (
    Look(GREY, "o", ""),
    Look(BLUE, "s", ""),
    Look(PINK, "v", ""),
    Look(YELLOW, "P", ""),
    Look(SKY, "X", ""),
)
"""The look of each kind of random control, in the order of `RANDOM_CONTROLS`; taken again from the first."""
_NAMED_LOOK = Look(GREEN, "^", "")
LABEL_MARKS = {
    "safe": (GREEN, ""),
    "refusal": (SKY, "//"),
    "unsafe": (ORANGE, "xx"),
    "incoherent": (GREY, ".."),
}
"""Colour and hatch of each label of an answer."""
EFFECT_CAPTION = "A mark a state; the edit has its 95 % intervals. Up and to the right is safer."
"""What the marks of a plane of changes are."""
_HALVES_LABEL = "Jaccard overlap on halves of the examples"


def effect_against_controls(results: UnitResults) -> Picture:
    """Change of both margins: the edit with its intervals, every control as a mark. Up and right is safer."""
    first, second = results.edit.change
    behaviours = (first, second)
    with styled():
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = plane_of_changes(figure, first, second)
        control_looks = itertools.cycle(_CONTROL_LOOKS)
        for (kind, control), look in zip(RANDOM_CONTROLS.items(), control_looks, strict=False):
            states = [state for state in results.states if state.kind == kind]
            if states:
                mark_states(axes, states, behaviours, look, label=f"random, {control.label}")
        named = [state for state in results.states if state.kind == "named"]
        mark_states(axes, named, behaviours, _NAMED_LOOK, label=None)
        _name_states(axes, named, behaviours)
        mark_edit(axes, results.edit, behaviours, label=f"coupled {results.unit}s silenced (95 %)")
        axes.legend(loc="best")
    n_controls = sum(is_random(state.kind) for state in results.states)
    return Picture(
        figure,
        data=changes_of_states(results.states, behaviours),
        n=f"{n_of_margins(results.edit, behaviours)}; {n_controls} random controls",
        caption=EFFECT_CAPTION,
    )


def _name_states(axes: Axes, states: Sequence[StateResults], behaviours: tuple[str, str]) -> None:
    first, second = behaviours
    # Two are often close: names stand above and below in turn.
    offsets = itertools.cycle([(6, 5), (6, -12)])
    for state, offset in zip(states, offsets, strict=False):
        x = state.change[first].mean
        y = state.change[second].mean
        axes.annotate(state.name, (x, y), offset, textcoords="offset points", fontsize=9)


def plane_of_changes(figure: Figure, first: str, second: str) -> Axes:
    """Axes of the change of one behaviour's margin against that of another. Up and right is safer."""
    axes = figure.subplots()
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_xlabel(f"change of the {first} margin (nats per token)")
    axes.set_ylabel(f"change of the {second} margin\n(nats per token)")
    return axes


def mark_states(
    axes: Axes, states: Sequence[StateResults], behaviours: tuple[str, str], look: Look, *, label: str | None
) -> None:
    """One mark a state, at its change of both margins."""
    first, second = behaviours
    x = [state.change[first].mean for state in states]
    y = [state.change[second].mean for state in states]
    axes.plot(
        x,
        y,
        look.marker,
        color=look.colour,
        markersize=6,
        alpha=0.8,
        label=label,
    )


def mark_edit(axes: Axes, edit: StateResults, behaviours: tuple[str, str], *, label: str) -> None:
    """The edit, at its change of both margins, with its intervals."""
    first, second = behaviours
    across = edit.change[first]
    along = edit.change[second]
    place = (across.mean, along.mean)
    axes.errorbar(*place, xerr=errors_of([across]), yerr=errors_of([along]), ecolor=EDIT)
    axes.plot(*place, "D", color=EDIT, markersize=7, label=label)


def changes_of_states(states: Sequence[StateResults], behaviours: Sequence[str]) -> pd.DataFrame:
    """One row a state and behaviour: the change of the margin with its interval, and what it stands on."""
    rows = []
    for state in states:
        for line in _margins(state, behaviours):
            row = {
                "state": state.name,
                "kind": state.kind,
                "behaviour": line.on,
                "n_prompts": line.n,
            }
            rows.append(row | interval_cells(line.change))
    return pd.DataFrame(rows)


def n_of_margins(state: StateResults, behaviours: Sequence[str]) -> str:
    """How many prompts and clusters the margins of a state stand on, by behaviour."""
    return n_of_lines(_margins(state, behaviours))


def _margins(state: StateResults, behaviours: Sequence[str]) -> list[Line]:
    margins = []
    for line in state.lines:
        if line.metric == MARGIN and line.on in behaviours:
            margins.append(line)
    return margins


def coupled_per_layer(results: UnitResults) -> Picture:
    """How many coupled units each layer holds."""
    units = f"{results.unit}s"
    counts = results.coupled_per_layer
    layers = range(len(counts))
    with styled():
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.bar(layers, counts, color=EDIT)
        label_layers(axes)
        axes.set_ylabel(f"coupled {units}\n(of {results.n_units_per_layer:,})")
    return Picture(
        figure,
        data=pd.DataFrame({"layer": layers, f"n_coupled_{units}": counts}),
        n=f"{sum(counts):,} coupled {units} in {len(counts)} layers",
        caption="A bar a layer, the first layer at the left.",
    )


def coupling_against_chance(results: UnitResults) -> Picture:
    """The number of coupled units beside its floor, and where there are halves their overlap beside the ceiling."""
    chance = results.chance
    floor_label = f"{results.unit}s in both tops, not in general's"
    panels = {floor_label: _floor_ranges(chance)}
    colours = {floor_label: (GREY, EDIT), _HALVES_LABEL: (EDIT, BLUE, BLUE)}
    n = f"{N_SHUFFLES} shuffles within strata"
    if chance.halves and chance.ceiling:
        panels[_HALVES_LABEL] = _half_ranges(chance.halves, chance.ceiling)
        n += f", {N_SPLITS} random halves of the examples"
    rows = []
    with styled():
        height = 0.6 + 0.9 * len(panels)
        figure = Figure(figsize=(6.4, height), layout="constrained")
        column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (label, ranges) in zip(column, panels.items(), strict=True):
            whiskers(axes, ranges, colours[label], label)
            for name, (middle, low, high) in ranges.items():
                rows.append(
                    {
                        "quantity": label,
                        "of": name,
                        "middle": middle,
                        "low": low,
                        "high": high,
                    }
                )
    return Picture(figure, pd.DataFrame(rows), n, "Bars hold the middle 95 %.")


def _floor_ranges(chance: Chance) -> dict[str, Range]:
    """The number of units that strata alone give, and that there are."""
    floor = chance.floor
    n = float(floor.n)
    return {
        "strata alone": (floor.expected, floor.low, floor.high),
        "coupled": (n, n, n),
    }


def _half_ranges(halves: Halves, ceiling: Mapping[str, Halves]) -> dict[str, Range]:
    """Overlaps of tops from two halves of the examples: between the behaviours, and of each with itself."""
    ranges: dict[str, Range] = {"between the two": (halves.mean, halves.low, halves.high)}
    for name, own in ceiling.items():
        ranges[f"{name} with itself"] = (own.mean, own.low, own.high)
    return ranges


def labels_by_state(answers: Answers) -> Picture:
    """The share of each label of the answers, one bar a state and set of prompts."""
    titles = [state.title for state in answers.states]
    rows, counts = [], []
    with styled():
        height = 1.0 + 0.36 * len(titles)
        figure = Figure(figsize=(13, height), layout="constrained")
        columns = figure.subplots(1, len(answers.prompts), sharey=True, squeeze=False)[0]
        for place, (axes, name) in enumerate(zip(columns, answers.prompts, strict=True)):
            title = name.replace("_", " ")
            n_prompts = len(answers.prompts[name])
            shares = _label_shares(answers, place)
            _stack_labels(axes, shares)
            for label, percents in shares.items():
                for state, percent in zip(titles, percents, strict=True):
                    rows.append(
                        {
                            "prompts": name,
                            "n_prompts": n_prompts,
                            "state": state,
                            "label": label,
                            "share_percent": percent,
                        }
                    )
            axes.set_yticks(range(len(titles)), titles)
            axes.set_title(title)
            axes.set_xlabel("% of answers")
            counts.append(f"{n_prompts} prompts of {title}")
        columns[0].invert_yaxis()
        handles, labels = columns[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return Picture(figure, pd.DataFrame(rows), ", ".join(counts), "The labels are given by rules.")


def _label_shares(answers: Answers, place: int) -> dict[str, list[float]]:
    """The share of each label in one set of prompts, in percent, one a state."""
    shares: dict[str, list[float]] = {label: [] for label in LABEL_MARKS}
    for state in answers.states:
        given = state.sets[place].labels
        for label, percents in shares.items():
            share = given.count(label) / len(given)
            percents.append(100 * share)
    return shares


def _stack_labels(axes: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    """One bar a state: the shares of all labels, one after the other."""
    left = np.zeros(len(next(iter(shares.values()))))
    for label, percents in shares.items():
        colour, hatch = LABEL_MARKS[label]
        axes.barh(
            range(len(percents)),
            percents,
            left=left,
            color=colour,
            # In grey, neighbours differ in their hatch.
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
        left = left + percents
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 50, 100])
