"""The graph of a circuit as its page draws it: units by token and layer, and the edges between them."""

from dataclasses import dataclass

from dean_interp.circuits.graph import Circuit, Edge, Node
from dean_interp.report.page import minus, visible

# In pixels; where the page is wider or narrower, columns move apart or together.
_LEFT, _TOP, _FOOT = 44.0, 36.0, 110.0
_COLUMN, _LAYER = 40.0, 20.0
_RIGHT = 3 * _COLUMN
_NARROWEST = 0.5
"""How near columns come to each other, as a share of `_COLUMN`: labels are still apart."""


def drawn_graph(circuit: Circuit) -> dict[str, object]:
    """What the template draws: places in pixels, titles and classes."""
    layout = _layout(circuit)
    layers = range(layout.n_layers)
    return {
        "edges": _drawn_edges(circuit, layout),
        "nodes": _drawn_nodes(circuit, layout),
        "layers": [(layer, layout.y_of(layer)) for layer in layers],
        "columns": _column_labels(circuit, layout),
        "parts": _part_labels(circuit, layout),
        "left": _LEFT,
        "right": _RIGHT,
        "narrowest": _NARROWEST,
        "bottom": layout.bottom + 8,
        "width": layout.right + _RIGHT,
        "height": layout.bottom + _FOOT,
    }


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
        # A neuron and a head of one layer and token stay apart.
        aside = 4 if node.kind == "head" else -4
        x = self.x_of_column[node.position] + aside
        return x, self.y_of(node.layer)


def _layout(circuit: Circuit) -> _Layout:
    nodes = [node for node in _nodes(circuit) if node is not None]
    used = sorted({node.position for node in nodes})
    x = _LEFT + _COLUMN / 2
    x_of_column = {}
    previous = -1
    for column in used:
        # Columns that hold no unit are left out; a gap stands for them.
        if x_of_column:
            x += _COLUMN if column == previous + 1 else 1.5 * _COLUMN
        # A wider gap stands where an answer begins.
        for start in _answer_starts(circuit):
            if previous < start <= column:
                x += 2 * _COLUMN
        x_of_column[column] = x
        previous = column
    last_layer = max(node.layer for node in nodes)
    return _Layout(x_of_column, n_layers=last_layer + 1)


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
    # Effects on the margin and on activations have different units: each kind is sized by its own largest.
    largest_outward = _largest_effect(circuit.outward)
    largest_inward = _largest_effect(circuit.inward)
    drawn = []
    for edge in sorted(circuit.edges, key=lambda edge: abs(edge.predicted)):
        largest = largest_outward if edge.target is None else largest_inward
        size = abs(edge.predicted) / largest
        x, y = layout.point(edge.source)
        to_x, to_y = layout.point(edge.target)
        half_y = (y + to_y) / 2
        start = f"{x:.0f} {y:.0f}"
        end = f"{to_x:.0f} {to_y:.0f}"
        drawn.append(
            {
                "path": f"M{start} C{x:.0f} {half_y:.0f} {to_x:.0f} {half_y:.0f} {end}",
                "points": f"{start} {end}",
                "value": edge.predicted,
                "width": round(0.5 + 4 * size, 2),
                "size": round(size, 3),
                "ends": " ".join(map(_key, (edge.source, edge.target))),
                "title": _edge_title(edge),
            }
        )
    return drawn


def _largest_effect(edges: list[Edge]) -> float:
    """The largest predicted size; 1 where a set of dead neurons does nothing."""
    sizes = [abs(edge.predicted) for edge in edges]
    return max(sizes, default=0.0) or 1.0


def _edge_title(edge: Edge) -> str:
    target = edge.target.name if edge.target else "margin"
    title = f"{edge.source.name} to {target}: predicted {edge.predicted:+.3f}"
    if edge.measured is not None:
        title += f", measured {edge.measured:+.3f}"
    return minus(title)


def _drawn_nodes(circuit: Circuit, layout: _Layout) -> list[dict[str, object]]:
    """The units and the margin as the template draws them."""
    targets: set[Node | None] = {edge.source for edge in circuit.outward}
    targets.update(edge.target for edge in circuit.inward)
    # A selected neuron may be a source at another token, too.
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
        # From the highest layer the line to the margin runs to the right, along a label that stands there.
        is_highest = node is not None and node.layer == layout.n_layers - 1
        place = {"key": _key(node), "x": x, "y": y, "is_highest": is_highest}
        drawn.append(place | kind)
    return drawn


def _column_labels(circuit: Circuit, layout: _Layout) -> list[tuple[str, float, bool]]:
    """The token under each column, where it is drawn, and whether it belongs to an answer."""
    labels = []
    for column, x in layout.x_of_column.items():
        token = visible(circuit.tokens[column])
        is_in_answer = column >= circuit.n_prompt
        labels.append((token, x - 4, is_in_answer))
    return labels


def _part_labels(circuit: Circuit, layout: _Layout) -> list[tuple[str, float]]:
    """The names of prompt and answers, and where each begins."""
    labels = [("prompt", _LEFT)]
    names = ("safe answer", "unsafe answer")
    for name, start in zip(names, _answer_starts(circuit), strict=True):
        places = [x for column, x in layout.x_of_column.items() if column >= start]
        first = min(places, default=layout.right)
        labels.append((name, first - _COLUMN / 2))
    return labels


def _key(node: Node | None) -> str:
    if node is None:
        return "margin"
    return f"{node.name}@{node.position}"
