"""How figures look, and those of arms, estimators, neurons and circuits. Those of a study: `study_figures`.

Each function takes plain records and returns a matplotlib `Figure`; `to_svg` makes it part of a page. Colours are from
the Okabe-Ito palette (colour-blind safe); every mark also differs in shape or label.
"""

import html
import io
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from dean_interp.circuits.graph import Circuit, Edge
from dean_interp.circuits.neuron_view import NeuronView
from dean_interp.statistics import Interval

ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"
PINK, YELLOW, SKY = "#CC79A7", "#E69F00", "#56B4E9"
EDIT = ORANGE
"""The colour of the edit on every figure."""
LINES = (ORANGE, BLUE, GREEN, PINK, YELLOW, SKY)
"""Colours of lines that stand side by side."""
_STYLE: dict[RcKeyType, object] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dean_interp",
    # A "$" in a name is a "$".
    "text.parse_math": False,
}


def styled() -> AbstractContextManager[None]:
    """While open, figures are drawn in the style of the pages."""
    return rc_context(_STYLE)


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for a page, with a title for those who hear it read."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def whiskers(axes: Axes, rows: Sequence[tuple[str, str, float, float, float]], label: str) -> None:
    """One mark a row with its range: name, colour, middle, low, high."""
    for y, (_, colour, middle, low, high) in enumerate(rows):
        axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="D", color=colour, capsize=3)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def error_of(interval: Interval) -> list[list[float]]:
    """How far an interval reaches below and above its mean, as matplotlib takes it."""
    return [[interval.mean - interval.low], [interval.high - interval.mean]]


def estimates_beside_truth(rows: Sequence[tuple[str, float, float, float, float]], label: str) -> Figure:
    """Estimates with their ranges (name, truth, mean, low, high), beside the true values."""
    with styled():
        figure = Figure(figsize=(8.4, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        whiskers(axes, [(name, EDIT, middle, low, high) for name, _, middle, low, high in rows], label)
        truths = [truth for _, truth, *_ in rows]
        axes.plot(truths, range(len(rows)), "|", color="black", markersize=18, label="true")
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def power_by_prompts(curves: Mapping[str, Sequence[float]], n_prompts: Sequence[int]) -> Figure:
    """How often a fall would be found, one line an effect, by the number of prompts."""
    marks = itertools.cycle([(ORANGE, "D"), (BLUE, "s"), (GREEN, "^"), ("0.35", "o"), (GREY, "v")])
    with styled():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for (name, rates), (colour, marker) in zip(curves.items(), marks, strict=False):
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
    with styled():
        figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, arms) in zip(columns, panels.items(), strict=True):
            axes.axhline(0, color="0.8", linewidth=1)
            marks = zip(itertools.cycle(LINES), itertools.cycle("osD^vP"), strict=False)
            for (name, points), (colour, marker) in zip(arms.items(), marks, strict=False):
                x = [step for step, _ in points]
                changes = [change for _, change in points]
                means = [change.mean for change in changes]
                axes.plot(x, means, color=colour, marker=marker, markersize=4, label=name)
                low = [change.low for change in changes]
                high = [change.high for change in changes]
                axes.fill_between(x, low, high, color=colour, alpha=0.12)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(x_label)
        columns[0].set_ylabel(y_label)
        handles, labels = columns[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def changes_by_arm(panels: Mapping[str, Mapping[str, Interval]], x_label: str) -> Figure:
    """One panel a behaviour, one row an arm: the change with its 95 % interval."""
    arms = list(dict.fromkeys(arm for changes in panels.values() for arm in changes))
    with styled():
        figure = Figure(figsize=(4.2 * len(panels) + 1.5, 1.2 + 0.32 * len(arms)), layout="constrained")
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, changes) in zip(columns, panels.items(), strict=True):
            axes.axvline(0, color="0.8", linewidth=1)
            for y, arm in enumerate(arms):
                if arm in changes:
                    change = changes[arm]
                    axes.errorbar(change.mean, y, xerr=error_of(change), fmt="D", color=EDIT, markersize=4, capsize=3)
            axes.set_yticks(range(len(arms)), arms)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(x_label)
        columns[0].invert_yaxis()
    return figure


def shares_by_layer(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel a kind of unit: each set's share of every layer's units, in percent."""
    with styled():
        figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (unit, sets) in zip(columns, panels.items(), strict=True):
            for (name, shares), colour, marker in zip(sets.items(), LINES, "os", strict=False):
                axes.plot(100 * np.array(shares), color=colour, marker=marker, markersize=4, label=name)
            axes.set_title(f"{unit}s", fontsize=10)
            axes.set_xlabel("layer")
        columns[0].set_ylabel("% of the layer's units")
        columns[0].legend(frameon=False, fontsize=9)
    return figure


def activations_by_behaviour(view: NeuronView) -> Figure:
    """How often a neuron takes which activation, one line a behaviour: share of tokens, on a log scale."""
    marks = zip(itertools.cycle(LINES), itertools.cycle(["-", "--", ":", "-."]), strict=False)
    with styled():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, counts), (colour, dashes) in zip(view.activations.items(), marks, strict=False):
            shares = np.array(counts) / max(sum(counts), 1)
            axes.stairs(shares, view.bins, color=colour, linestyle=dashes, label=name)
        # An expert that no token is sent to has no counts.
        if any(map(sum, view.activations.values())):
            axes.set_yscale("log")
        # The default formatter writes mathematics, which is text here.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(f"activation of {view.name}")
        axes.set_ylabel("share of tokens sent to its expert" if view.routed else "share of tokens")
        axes.legend(frameon=False, fontsize=9)
    return figure


def predicted_against_measured(circuit: Circuit) -> Figure:
    """Every checked edge: what attribution predicted, and what the intervention did.

    Edges into the set and edges to the margin stand apart, since their units differ.
    """
    into_set = [edge for edge in circuit.edges if edge.target]
    to_margin = [edge for edge in circuit.edges if not edge.target]
    with styled():
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, title in ((left, "into the set (share of activation)"), (right, "to the margin (nats per token)")):
            axes.axline((0, 0), slope=1, color="0.8", linewidth=1)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("predicted")
        _scatter_checked(left, into_set, colour=EDIT, marker="D", label="largest")
        _scatter_checked(left, circuit.random, colour=GREY, marker="o", label="random")
        _scatter_checked(right, to_margin, colour=EDIT, marker="D", label="largest")
        left.set_ylabel("measured")
        left.legend(frameon=False, fontsize=9)
    return figure


def _scatter_checked(axes: Axes, edges: Sequence[Edge], *, colour: str, marker: str, label: str) -> None:
    """The edges that an intervention measured."""
    predicted, measured = [], []
    for edge in edges:
        if edge.measured is not None:
            predicted.append(edge.predicted)
            measured.append(edge.measured)
    axes.scatter(predicted, measured, s=18, color=colour, marker=marker, label=label)
