"""Pictures of neurons and circuits."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dean_interp.circuits.graph import Circuit, Edge
from dean_interp.circuits.neuron_view import NeuronView
from dean_interp.report.look import EDIT, FAINT, GREY, Look, with_looks
from dean_interp.report.pictures import Picture, styled

INTO_SET, TO_MARGIN = "share of the target's activation", "nats per token"
"""The units of effects on selected neurons, and on the margin."""


def activations_by_behaviour(view: NeuronView) -> Picture:
    """How often a neuron takes which activation, one line a behaviour: share of tokens, on a log scale."""
    counted = []
    with styled():
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, (name, counts, look) in enumerate(with_looks(view.activations)):
            n_tokens = sum(counts)
            axes.stairs(
                _shares(counts),
                view.bins,
                color=look.colour,
                linestyle=look.dash,
                # A histogram has no markers: where dashes come again, lines are wider.
                linewidth=1.2 + 1.2 * (number // 4),
                label=name,
            )
            counted.append(f"{n_tokens:,} tokens of {name}")
        # An expert that no token is sent to has no counts.
        if any(map(sum, view.activations.values())):
            axes.set_yscale("log")
        # The default formatter writes mathematics, which is text here.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(f"activation of {view.name}")
        axes.set_ylabel("share of tokens sent to its expert" if view.routed else "share of tokens")
        axes.legend()
    n_bins = len(view.bins) - 1
    return Picture(
        figure, _activation_data(view), ", ".join(counted), f"A line a behaviour, in {n_bins} bins of the activation."
    )


def _activation_data(view: NeuronView) -> pd.DataFrame:
    """One row a behaviour and bin."""
    rows = []
    for name, counts in view.activations.items():
        shares = _shares(counts)
        for number, count in enumerate(counts):
            rows.append(
                {
                    "behaviour": name,
                    "activation_from": view.bins[number],
                    "activation_to": view.bins[number + 1],
                    "n_tokens": count,
                    "share_of_tokens": shares[number],
                }
            )
    return pd.DataFrame(rows)


def _shares(counts: Sequence[int]) -> list[float]:
    """Each count as a share of all; 0 where there is none."""
    n_tokens = max(sum(counts), 1)
    return [count / n_tokens for count in counts]


def predicted_against_measured(circuit: Circuit) -> Picture:
    """Every checked edge: what attribution predicted, and what the intervention did.

    Edges into the set and edges to the margin stand apart, since their units differ.
    """
    inward = _checked(circuit.inward)
    outward = _checked(circuit.outward)
    random = _checked(circuit.random)
    with styled():
        figure = Figure(figsize=(6.8, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, unit in ((left, INTO_SET), (right, TO_MARGIN)):
            axes.axline((0, 0), slope=1, color=FAINT, linewidth=1)
            axes.set_xlabel(f"predicted\n({unit})")
            axes.set_ylabel(f"measured\n({unit})")
        left.set_title("into the set")
        right.set_title("to the margin")
        largest = Look(EDIT, "D", "")
        _scatter(left, inward, largest, label="largest")
        _scatter(left, random, Look(GREY, "o", ""), label="random")
        _scatter(right, outward, largest, label="largest")
        left.legend()
    into_set = f"{len(inward)} largest and {len(random)} random edges into the set"
    return Picture(
        figure,
        data=edge_data(circuit, [*inward, *random, *outward]),
        n=f"{into_set}, {len(outward)} edges to the margin, on one prompt",
        caption="A mark an edge. On the line both are the same.",
    )


def edge_data(circuit: Circuit, edges: Sequence[Edge]) -> pd.DataFrame:
    """One row an edge of a circuit: its ends, and what it does."""
    # A random draw may be one of the largest edges, too, and is then equal to it.
    drawn_at_random = {id(edge) for edge in circuit.random}
    rows = []
    for edge in edges:
        target = edge.target
        rows.append(
            {
                "source": edge.source.name,
                "source_token": circuit.tokens[edge.source.position],
                "target": target.name if target else "margin",
                "target_token": circuit.tokens[target.position] if target else "",
                "drawn": "at random" if id(edge) in drawn_at_random else "largest",
                "unit": INTO_SET if target else TO_MARGIN,
                "predicted": edge.predicted,
                "measured": edge.measured,
            }
        )
    return pd.DataFrame(rows)


def _checked(edges: Sequence[Edge]) -> list[Edge]:
    """The edges that an intervention measured."""
    return [edge for edge in edges if edge.measured is not None]


def _scatter(axes: Axes, edges: Sequence[Edge], look: Look, *, label: str) -> None:
    predicted, measured = [], []
    for edge in edges:
        if edge.measured is not None:
            predicted.append(edge.predicted)
            measured.append(edge.measured)
    axes.scatter(
        predicted,
        measured,
        s=18,
        color=look.colour,
        marker=look.marker,
        label=label,
    )
