"""The page of a circuit: a graph of units by layer and token, and how far its edges can be believed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dean_interp.circuits.graph import Circuit, Edge, Node
from dean_interp.circuits.trace import trace_circuit
from dean_interp.data.examples import Example
from dean_interp.models.load import HookedModel
from dean_interp.models.tokens import Template
from dean_interp.report.figures import predicted_against_measured, to_svg
from dean_interp.report.page import Page, rendered, visible
from dean_interp.selection.selection import Selection

# of the graph, in pixels; where the page is wider or narrower, columns move apart or together
_LEFT, _TOP, _FOOT = 44.0, 36.0, 110.0
_COLUMN, _LAYER = 40.0, 20.0
_RIGHT = 3 * _COLUMN
_NARROWEST = 0.5
"""How near columns come to each other, as a share of `_COLUMN`: labels are still apart."""
_SMALLEST_SHOWN = 15
"""Percent of the largest edge from which edges are shown at first."""


@dataclass(frozen=True)
class CircuitPage(Page):
    """A circuit's record and its page; in a notebook it shows itself."""

    circuit: Circuit
    title: str = "What feeds the neurons, and what they feed"
    command: str = ""
    """The command that makes the page again, where a command made it."""
    text: str = ""
    """What else stands under the title: the prompt, for instance."""
    links: Mapping[str, str] = field(default_factory=dict)
    """The page of each unit that has one, by the unit's name."""
    index: str = ""
    """The page that lists all units, where there is one."""
    fingerprint: str = ""
    """The fingerprint of what the page shows, where a page that is made already shall be known by it."""
    frame_rem = 50

    def __repr__(self) -> str:
        return f"CircuitPage({self.circuit!r})"

    @property
    def headline(self) -> str:
        """The strongest neuron, and how far predicted effects held when they were measured."""
        circuit = self.circuit
        largest, random, _ = circuit.checks.values()
        strongest = ""
        if circuit.outward:
            edge = circuit.outward[0]
            strongest = (
                f"Silencing {edge.source.name} at {circuit.tokens[edge.source.position]!r} alone moves the margin by "
                f"{edge.measured:+.3f} (predicted {edge.predicted:+.3f}: the largest) from {circuit.margin:+.3f} nats "
                "per token. "
            )
        if not largest.n:
            return f"{strongest}No unit of a layer before feeds one of the set."
        return (
            f"{strongest}Over the {largest.n} largest edges into the set predicted and measured effects agree with a "
            f"rank correlation of {largest.rank_correlation:.2f}; they move their targets by {largest.mean_size:.0%} "
            f"on average, random edges by {random.mean_size:.2%}."
        )

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        circuit, layout = self.circuit, _layout(self.circuit)
        return rendered(
            "circuit.html.j2",
            title=self.title,
            headline=self.headline,
            circuit=circuit,
            command=self.command,
            text=self.text,
            links=self.links,
            index=self.index,
            fingerprint=self.fingerprint,
            figure=to_svg(predicted_against_measured(circuit), "Predicted against measured effects"),
            edges=_drawn_edges(circuit, layout),
            nodes=_drawn_nodes(circuit, layout),
            layers=[(layer, layout.y_of(layer)) for layer in range(layout.n_layers)],
            columns=_column_labels(circuit, layout),
            parts=_part_labels(circuit, layout),
            left=_LEFT,
            right=_RIGHT,
            narrowest=_NARROWEST,
            bottom=layout.bottom + 8,
            width=layout.right + _RIGHT,
            height=layout.bottom + _FOOT,
            smallest_shown=_SMALLEST_SHOWN,
        )


def circuit_page(
    model: HookedModel,
    selection: Selection,
    example: Example,
    *,
    n_targets: int = 10,
    n_sources: int = 8,
    n_checked: int = 32,
    answer_tokens: int | None = 12,
    template: Template = "chat",
    seed: int = 0,
) -> CircuitPage:
    """What feeds the selected neurons on one example, and what they feed, as a page.

    As the last line of a notebook cell the page shows itself; `.save("circuit.html")` keeps it, `.circuit` is the
    record. Arguments and errors are those of `trace_circuit`.
    """
    circuit = trace_circuit(
        model,
        selection,
        example,
        n_targets=n_targets,
        n_sources=n_sources,
        n_checked=n_checked,
        answer_tokens=answer_tokens,
        template=template,
        seed=seed,
    )
    return CircuitPage(circuit)


@dataclass(frozen=True)
class _Layout:
    """Where the graph's columns and layers are drawn, in pixels; the margin stands at the upper right."""

    x_of_column: dict[int, float]
    n_layers: int
    """Layers that are drawn: those up to the last that holds a unit."""

    @property
    def right(self) -> float:
        return max(self.x_of_column.values()) + 1.5 * _COLUMN

    @property
    def bottom(self) -> float:
        return _TOP + (self.n_layers + 1) * _LAYER

    def y_of(self, layer: int) -> float:
        return self.bottom - (layer + 1) * _LAYER

    def point(self, node: Node | None) -> tuple[float, float]:
        if node is None:
            return self.right, _TOP
        # a neuron and a head of one layer and token stay apart
        aside = 4 if node.kind == "head" else -4
        return self.x_of_column[node.position] + aside, self.y_of(node.layer)


def _layout(circuit: Circuit) -> _Layout:
    nodes = [node for node in _nodes(circuit) if node is not None]
    used = sorted({node.position for node in nodes})
    x, x_of_column = _LEFT + _COLUMN / 2, {}
    previous = -1
    for column in used:
        # columns that hold no unit are left out; a gap stands for them
        if x_of_column:
            x += _COLUMN if column == previous + 1 else 1.5 * _COLUMN
        # a wider gap stands where an answer begins
        for start in _answer_starts(circuit):
            if previous < start <= column:
                x += 2 * _COLUMN
        x_of_column[column] = x
        previous = column
    return _Layout(x_of_column, n_layers=1 + max(node.layer for node in nodes))


def _answer_starts(circuit: Circuit) -> tuple[int, int]:
    """The columns where the safe and the unsafe answer begin."""
    return circuit.n_prompt, circuit.n_prompt + circuit.n_safe


def _nodes(circuit: Circuit) -> list[Node | None]:
    """Every end of an edge once; None is the margin."""
    ends: list[Node | None] = []
    for edge in circuit.edges:
        ends += [edge.source, edge.target]
    return list(dict.fromkeys(ends))


def _drawn_edges(circuit: Circuit, layout: _Layout) -> list[dict[str, object]]:
    """The edges as the template draws them: the largest last, on top of the others."""
    # effects on the margin and on activations have different units: each kind is sized by its own largest
    # A set of dead neurons does nothing: all its edges are 0.
    largest_outward = max((abs(edge.predicted) for edge in circuit.outward), default=0.0) or 1.0
    largest_inward = max((abs(edge.predicted) for edge in circuit.inward), default=0.0) or 1.0
    drawn = []
    for edge in sorted(circuit.edges, key=lambda edge: abs(edge.predicted)):
        (x, y), (to_x, to_y) = layout.point(edge.source), layout.point(edge.target)
        size = abs(edge.predicted) / (largest_outward if edge.target is None else largest_inward)
        half_y = (y + to_y) / 2
        drawn.append(
            {
                "path": f"M{x:.0f} {y:.0f} C{x:.0f} {half_y:.0f} {to_x:.0f} {half_y:.0f} {to_x:.0f} {to_y:.0f}",
                "points": f"{x:.0f} {y:.0f} {to_x:.0f} {to_y:.0f}",
                "value": edge.predicted,
                "width": round(0.5 + 4 * size, 2),
                "size": round(size, 3),
                "ends": f"{_key(edge.source)} {_key(edge.target)}",
                "title": _edge_title(edge),
            }
        )
    return drawn


def _edge_title(edge: Edge) -> str:
    target = edge.target.name if edge.target else "margin"
    measured = f", measured {edge.measured:+.3f}" if edge.measured is not None else ""
    return f"{edge.source.name} to {target}: predicted {edge.predicted:+.3f}{measured}"


def _drawn_nodes(circuit: Circuit, layout: _Layout) -> list[dict[str, object]]:
    """The units and the margin as the template draws them."""
    targets: set[Node | None] = {edge.source for edge in circuit.outward}
    targets |= {edge.target for edge in circuit.inward}
    # a selected neuron may be a source at another token, too
    selected = {node.name for node in targets if node is not None}
    drawn = []
    for node in _nodes(circuit):
        x, y = layout.point(node)
        if node is None:
            kind = {
                "name": "margin",
                "is_head": False,
                "is_selected": False,
                "label": "margin",
                "title": "margin of safe over unsafe",
            }
        else:
            kind = {
                "name": node.name,
                "is_head": node.kind == "head",
                "is_selected": node.name in selected,
                "label": node.name if node in targets else "",
                "title": f"{node.name} at {circuit.tokens[node.position]!r}",
            }
        drawn.append({"key": _key(node), "x": x, "y": y, **kind})
    return drawn


def _column_labels(circuit: Circuit, layout: _Layout) -> list[tuple[str, float, bool]]:
    """The token under each column, where it is drawn, and whether it belongs to an answer."""
    labels = []
    for column, x in layout.x_of_column.items():
        labels.append((visible(circuit.tokens[column]), x - 4, column >= circuit.n_prompt))
    return labels


def _part_labels(circuit: Circuit, layout: _Layout) -> list[tuple[str, float]]:
    """The names of prompt and answers, and where each begins."""
    labels = [("prompt", _LEFT)]
    for name, start in zip(("safe answer", "unsafe answer"), _answer_starts(circuit), strict=True):
        first = min((x for column, x in layout.x_of_column.items() if column >= start), default=layout.right)
        labels.append((name, first - _COLUMN / 2))
    return labels


def _key(node: Node | None) -> str:
    return "margin" if node is None else f"{node.name}@{node.position}"
