"""The page of a circuit: a graph of units by layer and token, and how far its edges can be believed."""

from dataclasses import dataclass

from dean_interp.circuits.graph import Circuit, Edge, Node
from dean_interp.report.figures import predicted_against_measured, to_svg
from dean_interp.report.page import Page, rendered

_LEFT, _STEP, _LAYER, _TOP, _FOOT = 44.0, 40.0, 20.0, 36.0, 110.0
_START = 15  # percent of the largest edge that is shown at first


@dataclass(frozen=True)
class CircuitPage(Page):
    """A circuit's record and its page; in a notebook it shows itself."""

    circuit: Circuit
    title: str = "What feeds the neurons, and what they feed"
    command: str = ""
    """What makes the page again, where a command made it."""
    frame_rem = 50

    def __repr__(self) -> str:
        return f"CircuitPage({self.circuit!r})"

    @property
    def headline(self) -> str:
        """What was found, and how far it held when it was tried."""
        into, random, _ = self.circuit.checks.values()
        first = next((edge for edge in self.circuit.edges if edge.target is None), None)
        strongest = ""
        if first:
            token = self.circuit.tokens[first.source.position]
            strongest = (
                f"Silencing {first.source.name} at {token!r} alone moves the margin by {first.measured:+.3f} "
                f"(predicted {first.predicted:+.3f}: the largest) from {self.circuit.margin:+.3f} nats per token. "
            )
        return (
            f"{strongest}Over the {into.n} largest edges into the set predicted and measured effects agree with a rank "
            f"correlation of {into.rank_correlation:.2f}; they move their targets by {into.mean_size:.0%} on average, "
            f"random edges by {random.mean_size:.2%}."
        )

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        circuit = self.circuit
        ends = (circuit.n_prompt, circuit.n_prompt + circuit.n_safe)
        x_of = _columns(circuit, ends)
        right = max(x_of.values()) + 1.5 * _STEP
        last = max(edge.source.layer for edge in circuit.edges)
        last = max([last, *(edge.target.layer for edge in circuit.edges if edge.target)])
        bottom = _TOP + (last + 2) * _LAYER

        def place(node: Node | None) -> tuple[float, float]:
            if node is None:
                return right, _TOP
            beside = 4 if node.kind == "head" else -4  # both kinds of one layer and token stay apart
            return x_of[node.position] + beside, bottom - (node.layer + 1) * _LAYER

        largest = {
            is_out: max((abs(one.predicted) for one in circuit.edges if (one.target is None) == is_out), default=1.0)
            for is_out in (False, True)
        }

        def drawn(edge: Edge) -> dict[str, object]:
            (x, y), (u, v) = place(edge.source), place(edge.target)
            size = abs(edge.predicted) / largest[edge.target is None]
            measured = f", measured {edge.measured:+.3f}" if edge.measured is not None else ""
            return {
                "path": f"M{x:.0f} {y:.0f} C{x:.0f} {(y + v) / 2:.0f} {u:.0f} {(y + v) / 2:.0f} {u:.0f} {v:.0f}",
                "value": edge.predicted, "width": round(0.5 + 4 * size, 2), "size": round(size, 3),
                "ends": f"{_key(edge.source)} {_key(edge.target)}",
                "said": f"{edge.source.name} to {edge.target.name if edge.target else 'margin'}: predicted "
                f"{edge.predicted:+.3f}{measured}",
            }  # fmt: skip

        targets = {edge.target for edge in circuit.edges} | {
            edge.source for edge in circuit.edges if edge.target is None
        }
        units = {node: None for edge in circuit.edges for node in (edge.source, edge.target)}
        nodes = [
            {"key": _key(one), "x": place(one)[0], "y": place(one)[1], "coupled": one is not None and one in targets,
             "head": one is not None and one.kind == "head",
             "label": "margin" if one is None else one.name if one in targets else "",
             "said": "margin of safe over unsafe" if one is None else f"{one.name} at {circuit.tokens[one.position]!r}"}
            for one in units
        ]  # fmt: skip
        begins = [min((x for i, x in x_of.items() if i >= start), default=right) for start in ends]
        return rendered(
            "circuit.html.j2",
            title=self.title,
            headline=self.headline,
            circuit=circuit,
            command=self.command,
            figure=to_svg(predicted_against_measured(circuit), "Predicted against measured effects"),
            drawn=[drawn(edge) for edge in sorted(circuit.edges, key=lambda one: abs(one.predicted))],
            nodes=nodes,
            layers=[(layer, bottom - (layer + 1) * _LAYER) for layer in range(last + 1)],
            columns=[
                (circuit.tokens[i].strip() or repr(circuit.tokens[i]).strip("'"), x - 4, i >= ends[0])
                for i, x in x_of.items()
            ],
            parts=[
                ("prompt", _LEFT),
                *zip(("safe answer", "unsafe answer"), (x - _STEP / 2 for x in begins), strict=True),
            ],
            left=_LEFT,
            bottom=bottom + 8,
            width=right + 3 * _STEP,
            height=bottom + _FOOT,
            start=_START,
        )


def _columns(circuit: Circuit, ends: tuple[int, int]) -> dict[int, float]:
    """Where each token that holds a unit is drawn; a gap stands for those between that hold none."""
    used = sorted({node.position for edge in circuit.edges for node in (edge.source, edge.target) if node})
    x, found = _LEFT + _STEP / 2, {}
    for before, position in zip([-1, *used], used, strict=False):
        x += 0 if not found else _STEP * (1 if position == before + 1 else 1.5)
        x += sum(2 * _STEP for start in ends if before < start <= position)
        found[position] = x
    return found


def _key(node: Node | None) -> str:
    return "margin" if node is None else f"{node.name}@{node.position}"
