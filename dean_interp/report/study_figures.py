"""Figures of a study and of a sweep: each function takes a part of the results and returns a matplotlib `Figure`."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from dean_interp.information.shifts import MutualInformation
from dean_interp.models.sites import Unit
from dean_interp.report.figures import (
    BLUE,
    EDIT,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    error_of,
    styled,
    whiskers,
)
from dean_interp.study.controls import RANDOM_CONTROLS
from dean_interp.study.results import Answers, StateResults, UnitResults
from dean_interp.study.sweep import Point, Sweep, objectives

_CONTROL_MARKS = ((GREY, "o"), (BLUE, "s"), (PINK, "v"), (YELLOW, "P"), (SKY, "X"))
"""Colour and marker of each kind of random control, in the order of `RANDOM_CONTROLS`; taken again from the first."""
_LABEL_MARKS = {
    "safe": (GREEN, ""),
    "refusal": (SKY, "//"),
    "unsafe": (ORANGE, "xx"),
    "incoherent": (GREY, ".."),
}
"""Colour and hatch of each label of an answer."""
_UNIT_MARKERS: dict[Unit, str] = {"neuron": "o", "weight": "s"}


def effect_against_controls(results: UnitResults) -> Figure:
    """Change of both margins: the edit with its intervals, every control as a mark. Up and right is safer."""
    first, second = results.edit.change
    with styled():
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = plane_of_changes(figure, first, second)
        marks = itertools.cycle(_CONTROL_MARKS)
        for (kind, control), (colour, marker) in zip(RANDOM_CONTROLS.items(), marks, strict=False):
            states = [state for state in results.states if state.kind == kind]
            if states:
                label = f"random, {control.label}"
                mark_states(axes, states, (first, second), colour=colour, marker=marker, label=label)
        named = [state for state in results.states if state.kind == "named"]
        mark_states(axes, named, (first, second), colour=GREEN, marker="^", label=None)
        for i, state in enumerate(named):
            x, y = (change.mean for change in state.change.values())
            # Two are often close: names stand above and below in turn.
            offset = (6, 5 - 12 * (i % 2))
            axes.annotate(state.name, (x, y), offset, textcoords="offset points", color=GREEN, fontsize=9)
        mark_edit(axes, results.edit, (first, second), label=f"coupled {results.unit}s silenced (95 %)")
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def plane_of_changes(figure: Figure, first: str, second: str) -> Axes:
    """Axes of the change of one behaviour's margin against that of another. Up and right is safer."""
    axes = figure.subplots()
    axes.axhline(0, color="0.8", linewidth=1)
    axes.axvline(0, color="0.8", linewidth=1)
    axes.set_xlabel(f"change of the {first} margin (nats per token)")
    axes.set_ylabel(f"change of the {second} margin (nats per token)")
    return axes


def mark_states(
    axes: Axes,
    states: Sequence[StateResults],
    behaviours: tuple[str, str],
    *,
    colour: str,
    marker: str,
    label: str | None,
) -> None:
    """One mark a state, at its change of both margins."""
    first, second = behaviours
    x = [state.change[first].mean for state in states]
    y = [state.change[second].mean for state in states]
    axes.plot(x, y, marker, color=colour, alpha=0.8, linestyle="", label=label)


def mark_edit(axes: Axes, edit: StateResults, behaviours: tuple[str, str], *, label: str) -> None:
    """The edit, at its change of both margins, with its intervals."""
    across, along = (edit.change[name] for name in behaviours)
    axes.errorbar(
        across.mean,
        along.mean,
        xerr=error_of(across),
        yerr=error_of(along),
        fmt="D",
        color=EDIT,
        capsize=3,
        label=label,
    )


def coupled_per_layer(results: UnitResults) -> Figure:
    """How many coupled units each layer holds."""
    with styled():
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(results.coupled_per_layer)), results.coupled_per_layer, color=EDIT)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"coupled {results.unit}s\n(of {results.n_units_per_layer:,})")
    return figure


def coupling_against_chance(results: UnitResults) -> Figure:
    """The number of coupled units beside its floor, and where there are halves their overlap beside the ceiling."""
    floor, halves, ceiling = results.chance.floor, results.chance.halves, results.chance.ceiling
    n_panels = 2 if ceiling else 1
    with styled():
        figure = Figure(figsize=(6.4, 0.6 + 0.9 * n_panels), layout="constrained")
        panels = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
        n = float(floor.n)
        rows = [("strata alone", GREY, floor.expected, floor.low, floor.high), ("coupled", EDIT, n, n, n)]
        whiskers(panels[0], rows, f"{results.unit}s in both tops, not in general's")
        if halves and ceiling:
            rows = [("between the two", EDIT, halves.mean, halves.low, halves.high)]
            for name, own in ceiling.items():
                rows.append((f"{name} with itself", BLUE, own.mean, own.low, own.high))
            whiskers(panels[1], rows, "Jaccard overlap on halves of the examples")
    return figure


def information_per_layer(information: MutualInformation, variant: str | None = None) -> Figure:
    """One number of an estimand per layer before and after, and its change beside the controls'."""
    variant = information.variants[0] if variant is None else variant
    layers = [shift for shift in information.of(variant) if not shift.is_joint]
    x = [shift.layers[0] for shift in layers]
    name = f"{information.estimand}\n{variant} " if variant else f"{information.estimand} "
    with styled():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(x, [shift.before.value for shift in layers], "o-", color="0.35", label="before", markersize=4)
        above.plot(x, [shift.after.value for shift in layers], "D--", color=EDIT, label="after", markersize=4)
        above.plot(x, [shift.before.null_mean for shift in layers], ":", color="0.5", label="null (shuffled pairing)")
        above.set_ylabel(f"{name}({information.units})")
        above.legend(frameon=False, fontsize=9, ncols=3)
        below.axhline(0, color="0.8", linewidth=1)
        controls = np.array([shift.control_changes for shift in layers]).T
        if len(controls):
            label = f"range of {len(controls)} controls"
            below.fill_between(x, controls.min(0), controls.max(0), color=GREY, alpha=0.35, linewidth=0, label=label)
        change = [shift.change for shift in layers]
        below_change = [shift.change - shift.low for shift in layers]
        above_change = [shift.high - shift.change for shift in layers]
        below.errorbar(
            x,
            change,
            yerr=[below_change, above_change],
            fmt="D-",
            color=EDIT,
            label="this ablation (95 %)",
            markersize=4,
            capsize=2,
        )
        below.set_xlabel("layer")
        below.set_ylabel(f"change of the excess\nover the null ({information.units})")
        below.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def labels_by_state(answers: Answers) -> Figure:
    """The share of each label of the answers, one bar a state and set of prompts."""
    y = range(len(answers.states))
    with styled():
        figure = Figure(figsize=(13, 0.8 + 0.34 * len(answers.states)), layout="constrained")
        columns = figure.subplots(1, len(answers.prompts), sharey=True, squeeze=False)[0]
        for i, (axes, name) in enumerate(zip(columns, answers.prompts, strict=True)):
            left = np.zeros(len(answers.states))
            for label, (colour, hatch) in _LABEL_MARKS.items():
                shares = []
                for state in answers.states:
                    labels = state.sets[i].labels
                    shares.append(labels.count(label) / len(labels))
                axes.barh(
                    y, shares, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=label
                )
                left += shares
            axes.set_yticks(y, [state.title for state in answers.states])
            axes.set_xlim(0, 1)
            axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
            axes.set_title(name.replace("_", " "), fontsize=10)
        columns[0].invert_yaxis()
        handles, labels = columns[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def sweep_plane(sweep: Sweep) -> Figure:
    """Every edit's change of both margins on the confirming half; colour is ability. The front has its intervals."""
    first, second, ability = sweep.objectives
    with styled():
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.8", linewidth=1)
        axes.axvline(0, color="0.8", linewidth=1)
        costs = [objectives(point.confirmed_on)[ability].mean for point in sweep.points]
        limits = (min(*costs, -1e-6), max(*costs, 0.0))
        for unit, marker in _UNIT_MARKERS.items():
            points = [point for point in sweep.points if point.unit == unit]
            if points:
                drawn = _scatter_edits(axes, points, marker, limits)
        figure.colorbar(drawn, ax=axes, label="ability: minus the change of the general loss\n(nats per token)")
        axes.set_xlabel(f"change of the {first} margin (nats per token), confirming half")
        axes.set_ylabel(f"change of the {second} margin")
        axes.legend(frameon=False, fontsize=9)
    return figure


def _scatter_edits(axes: Axes, points: list[Point], marker: str, limits: tuple[float, float]) -> PathCollection:
    """The edits of one kind of unit; those on the front have a border, a name and intervals."""
    x, y, ability, borders = [], [], [], []
    for point in points:
        across, along, cost = objectives(point.confirmed_on).values()
        x.append(across.mean)
        y.append(along.mean)
        ability.append(cost.mean)
        borders.append("black" if point.on_front else "none")
        if point.on_front:
            axes.errorbar(
                across.mean,
                along.mean,
                xerr=error_of(across),
                yerr=error_of(along),
                color="0.6",
                linewidth=1,
                zorder=1,
            )
            name = f"{point.method} {point.fraction:g} x{point.value}"
            axes.annotate(name, (across.mean, along.mean), (6, 5), textcoords="offset points", fontsize=8)
    return axes.scatter(
        x,
        y,
        c=ability,
        marker=marker,
        cmap="viridis",
        vmin=limits[0],
        vmax=limits[1],
        zorder=2,
        label=f"{points[0].unit}s",
        edgecolors=borders,
    )
