"""Figures from results: each function takes a part of `Results` and returns a matplotlib `Figure`.

Colours are from the Okabe-Ito palette (colour-blind safe); every mark also differs in shape or label.
"""

import html
import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from dean_interp.circuits.graph import Circuit
from dean_interp.circuits.neuron_view import NeuronView
from dean_interp.information.shifts import MutualInformation
from dean_interp.statistics import Interval
from dean_interp.study.results import Spoken, UnitResults
from dean_interp.study.sweep import Sweep

_LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
EDIT, RANDOM, EQUAL_KL, NAMED = "#D55E00", "#999999", "#0072B2", "#009E73"
VERDICT_MARKS = {"safe": ("#009E73", ""), "refusal": ("#56B4E9", "//"), "unsafe": ("#D55E00", "xx"),
                 "incoherent": ("#999999", "..")}  # fmt: skip
_STYLE: dict[RcKeyType, object] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dean_interp",
    "text.parse_math": False,  # a "$" in a name is a "$"
}


def effect_against_controls(results: UnitResults) -> Figure:
    """Change of both margins: the edit with its intervals, every control as a mark. Up and right is safer."""
    edit = results.states[0]
    first, second = edit.change
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.8", linewidth=1)
        axes.axvline(0, color="0.8", linewidth=1)
        for kind, colour, marker, label in (
            ("random", RANDOM, "o", "random, same size"),
            ("equal KL", EQUAL_KL, "s", "random, same KL"),
            ("named", NAMED, "^", None),
        ):
            states = [state for state in results.states if state.kind == kind]
            x = [state.change[first].mean for state in states]
            y = [state.change[second].mean for state in states]
            axes.plot(x, y, marker, color=colour, alpha=0.8, linestyle="", label=label)
            if kind == "named":
                for i, (state, left, up) in enumerate(zip(states, x, y, strict=True)):
                    place = (6, 5 - 12 * (i % 2))  # above and below in turn: two are often close
                    axes.annotate(state.name, (left, up), place, textcoords="offset points", color=colour, fontsize=9)
        x, y = edit.change[first], edit.change[second]
        axes.errorbar(
            x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]],
            fmt="D", color=EDIT, capsize=3, label=f"coupled {results.unit}s silenced (95 %)",
        )  # fmt: skip
        axes.set_xlabel(f"change of the {first} margin (nats per token)")
        axes.set_ylabel(f"change of the {second} margin (nats per token)")
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def coupled_per_layer(results: UnitResults) -> Figure:
    """How many coupled units each layer holds."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(results.coupled_per_layer)), results.coupled_per_layer, color=EDIT)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"coupled {results.unit}s\n(of {results.n_units_per_layer:,})")
    return figure


def coupling_against_chance(results: UnitResults) -> Figure:
    """The number of coupled units beside its floor, and where there are halves their overlap beside the ceiling."""
    floor, halves, ceiling = results.chance.floor, results.chance.halves, results.chance.ceiling
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.4 if ceiling else 1.5), layout="constrained")
        panels = figure.subplots(2 if ceiling else 1, 1, squeeze=False)[:, 0]
        rows = [
            ("strata alone", RANDOM, floor.expected, floor.low, floor.high),
            ("coupled", EDIT, *[float(floor.n)] * 3),
        ]
        _whiskers(panels[0], rows, f"{results.unit}s in both tops, not in general's")
        if halves and ceiling:
            rows = [("between the two", EDIT, halves.mean, halves.low, halves.high)]
            rows += [(f"{name} with itself", EQUAL_KL, one.mean, one.low, one.high) for name, one in ceiling.items()]
            _whiskers(panels[1], rows, "Jaccard overlap on halves of the examples")
    return figure


def _whiskers(axes: Axes, rows: list[tuple[str, str, float, float, float]], label: str) -> None:
    """One mark a row, with its range."""
    for place, (_, colour, middle, low, high) in enumerate(rows):
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="D", color=colour, capsize=3)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def information_per_layer(information: MutualInformation, variant: str | None = None) -> Figure:
    """One number of an estimand per layer before and after, and its change beside the random controls'."""
    variant = information.variants[0] if variant is None else variant
    layers = [shift for shift in information.of(variant) if len(shift.layers) == 1]
    x = [layer.layers[0] for layer in layers]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(x, [layer.before.value for layer in layers], "o-", color="0.35", label="before", markersize=4)
        above.plot(x, [layer.after.value for layer in layers], "D--", color=EDIT, label="after", markersize=4)
        above.plot(x, [layer.before.null_mean for layer in layers], ":", color="0.5", label="null (shuffled pairing)")
        above.set_ylabel(f"{information.estimand}\n{variant} ({information.units})".replace("\n (", " ("))
        above.legend(frameon=False, fontsize=9, ncols=3)
        controls = np.array([layer.control_changes for layer in layers]).T
        below.axhline(0, color="0.8", linewidth=1)
        if len(controls):
            below.fill_between(x, controls.min(0), controls.max(0), color=RANDOM, alpha=0.35, linewidth=0,
                               label=f"range of {len(controls)} random controls")  # fmt: skip
        change = [layer.change for layer in layers]
        error = [[one.change - one.low for one in layers], [one.high - one.change for one in layers]]
        below.errorbar(x, change, yerr=error, fmt="D-", color=EDIT, label="the edit (95 %)", markersize=4, capsize=2)
        below.set_xlabel("layer")
        below.set_ylabel(f"change of the excess\nover the null ({information.units})")
        below.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def estimates_beside_truth(rows: Sequence[tuple[str, float, float, float, float]], label: str) -> Figure:
    """Estimates with their ranges (name, truth, mean, low, high), beside the true values."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        _whiskers(axes, [(name, EDIT, middle, low, high) for name, _, middle, low, high in rows], label)
        axes.plot([row[1] for row in rows], range(len(rows)), "|", color="black", markersize=18, label="true")
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def power_by_prompts(curves: Mapping[str, Sequence[float]], n_prompts: Sequence[int]) -> Figure:
    """How often a fall would be found, one line an effect, by the number of prompts."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        marks = ((EDIT, "D"), (EQUAL_KL, "s"), (NAMED, "^"), ("0.35", "o"), (RANDOM, "v"))
        for (name, rates), (colour, marker) in zip(curves.items(), itertools.cycle(marks), strict=False):
            axes.plot(n_prompts, rates, marker=marker, color=colour, label=name, markersize=5)
        axes.axhline(0.8, color="0.8", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(n_prompts, [str(n) for n in n_prompts])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("test prompts")
        axes.set_ylabel("share of studies that find the fall")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def changes_along(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]], x_label: str, y_label: str
) -> Figure:
    """One panel a behaviour, one line an arm: changes and their 95 % bands along what grows (steps, examples)."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
        rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (panel, arms) in zip(rows, panels.items(), strict=True):
            axes.axhline(0, color="0.8", linewidth=1)
            for (name, points), colour, marker in zip(
                arms.items(), itertools.cycle(_LINES), itertools.cycle("osD^vP"), strict=False
            ):
                x = [place for place, _ in points]
                axes.plot(x, [one.mean for _, one in points], color=colour, marker=marker, markersize=4, label=name)
                axes.fill_between(
                    x, [one.low for _, one in points], [one.high for _, one in points], color=colour, alpha=0.12
                )
            axes.set_title(panel, fontsize=10)
            axes.set_xlabel(x_label)
        rows[0].set_ylabel(y_label)
        handles, labels = rows[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def changes_by_arm(panels: Mapping[str, Mapping[str, Interval]], x_label: str) -> Figure:
    """One panel a behaviour, one row an arm: the change with its 95 % interval."""
    arms = list(dict.fromkeys(name for some in panels.values() for name in some))
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * len(panels) + 1.5, 1.2 + 0.32 * len(arms)), layout="constrained")
        rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (panel, some) in zip(rows, panels.items(), strict=True):
            axes.axvline(0, color="0.8", linewidth=1)
            for i, name in enumerate(arms):
                if name in some:
                    one = some[name]
                    axes.errorbar(one.mean, i, xerr=[[one.mean - one.low], [one.high - one.mean]], fmt="D", color=EDIT,
                                  markersize=4, capsize=3)  # fmt: skip
            axes.set_yticks(range(len(arms)), arms)
            axes.set_title(panel, fontsize=10)
            axes.set_xlabel(x_label)
        rows[0].invert_yaxis()
    return figure


def shares_by_layer(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel a kind of unit: each set's share of every layer's units, in percent."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
        rows = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (panel, sets) in zip(rows, panels.items(), strict=True):
            for (name, shares), colour, marker in zip(sets.items(), _LINES, "os", strict=False):
                axes.plot(100 * np.array(shares), color=colour, marker=marker, markersize=4, label=name)
            axes.set_title(f"{panel}s", fontsize=10)
            axes.set_xlabel("layer")
        rows[0].set_ylabel("% of the layer's units")
        rows[0].legend(frameon=False, fontsize=9)
    return figure


def activations_by_behaviour(view: NeuronView) -> Figure:
    """How often a neuron takes which activation, one line a behaviour: share of tokens, on a log scale."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, counts), colour, dashes in zip(
            view.activations.items(), itertools.cycle(_LINES), itertools.cycle(["-", "--", ":", "-."]), strict=False
        ):
            axes.stairs(np.array(counts) / max(sum(counts), 1), view.bins, color=colour, linestyle=dashes, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default one writes mathematics, which is text here
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(f"activation of {view.name}")
        axes.set_ylabel("share of tokens")
        axes.legend(frameon=False, fontsize=9)
    return figure


def predicted_against_measured(circuit: Circuit) -> Figure:
    """Every checked edge: what attribution predicted, and what the intervention did; edges into the set and to the
    margin apart, since their units differ.
    """
    groups = {
        "into the set (share of activation)": [("largest", [one for one in circuit.edges if one.target], EDIT, "D"),
                                               ("random", circuit.random, RANDOM, "o")],
        "to the margin (nats per token)": [("largest", [one for one in circuit.edges if not one.target], EDIT, "D")],
    }  # fmt: skip
    with rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for axes, (title, parts) in zip(figure.subplots(1, 2), groups.items(), strict=True):
            axes.axline((0, 0), slope=1, color="0.8", linewidth=1)
            for name, edges, colour, marker in parts:
                checked = [(one.predicted, one.measured) for one in edges if one.measured is not None]
                axes.scatter(*zip(*checked, strict=True) if checked else ((), ()), s=18, color=colour, marker=marker,
                             label=name)  # fmt: skip
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("predicted")
        figure.axes[0].set_ylabel("measured")
        figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def verdicts_by_state(spoken: Spoken) -> Figure:
    """Share of each verdict, one bar a state and set of prompts."""
    sets = [one.behaviour for one in spoken.states[0].sets]
    with rc_context(_STYLE):
        figure = Figure(figsize=(13, 0.8 + 0.34 * len(spoken.states)), layout="constrained")
        for axes, name in zip(np.atleast_1d(figure.subplots(1, len(sets), sharey=True)), sets, strict=True):
            left = np.zeros(len(spoken.states))
            for verdict, (colour, hatch) in VERDICT_MARKS.items():
                shares = [next(one for one in state.sets if one.behaviour == name).share[verdict].mean
                          for state in spoken.states]  # fmt: skip
                axes.barh(range(len(left)), shares, left=left, color=colour, hatch=hatch, edgecolor="white",
                          linewidth=0.5, label=verdict)  # fmt: skip
                left += shares
            axes.set_yticks(range(len(left)), [state.name for state in spoken.states])
            axes.set_xlim(0, 1)
            axes.set_title(name.replace("_", " "), fontsize=10)
        figure.axes[0].invert_yaxis()
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                      fontsize=9)  # fmt: skip
    return figure


def sweep_plane(sweep: Sweep) -> Figure:
    """Every edit's change of both margins on the confirming half; colour is ability. The front has its intervals."""
    first, second, ability = sweep.objectives
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.8", linewidth=1)
        axes.axvline(0, color="0.8", linewidth=1)
        costs = [point.confirmed_on[ability].mean for point in sweep.points]
        low = min(*costs, -1e-6)
        for shape, unit in (("o", "neuron"), ("s", "weight")):
            points = [point for point in sweep.points if point.unit == unit]
            for point in points:
                if point.on_front:
                    x, y = point.confirmed_on[first], point.confirmed_on[second]
                    across, along = [[x.mean - x.low], [x.high - x.mean]], [[y.mean - y.low], [y.high - y.mean]]
                    axes.errorbar(x.mean, y.mean, xerr=across, yerr=along, color="0.6", linewidth=1, zorder=1)
                    axes.annotate(f"{point.method} {point.fraction:g} x{point.value}", (x.mean, y.mean), (6, 5),
                                  textcoords="offset points", fontsize=8)  # fmt: skip
            drawn = axes.scatter(
                [point.confirmed_on[first].mean for point in points],
                [point.confirmed_on[second].mean for point in points],
                c=[point.confirmed_on[ability].mean for point in points],
                marker=shape, cmap="viridis", vmin=low, vmax=max(*costs, 0), zorder=2, label=f"{unit}s",
                edgecolors=["black" if point.on_front else "none" for point in points],
            )  # fmt: skip
        figure.colorbar(drawn, ax=axes, label="ability: minus the change of the general loss\n(nats per token)")
        axes.set_xlabel(f"change of the {first} margin (nats per token), confirming half")
        axes.set_ylabel(f"change of the {second} margin")
        axes.legend(frameon=False, fontsize=9)
    return figure


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for a page, with a title for those who hear it read."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
