"""The page of a circuit: a graph of units by layer and token, and how far its edges can be believed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from markupsafe import Markup

from dean_interp.circuits.graph import Circuit
from dean_interp.circuits.trace import trace_circuit
from dean_interp.data.examples import Example
from dean_interp.models.load import HookedModel
from dean_interp.models.tokens import Template
from dean_interp.report.circuit_figures import edge_data, predicted_against_measured
from dean_interp.report.circuit_graph import drawn_graph
from dean_interp.report.page import Page, percent_in_two_digits, rendered
from dean_interp.report.pictures import figure_caption, figure_element
from dean_interp.selection.selection import Selection

_GRAPH = (
    "Filled circle: a neuron of the set; circle: another neuron; square: an attention head. Solid orange: setting the "
    "source to 0 raises the target (its size, or the margin); dashed blue: lowers it. Tokens that hold no unit are "
    "left out. Width: predicted effect, edges into the set and edges to the margin each against their largest."
)
"""What the marks of the graph are."""
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
            token = circuit.tokens[edge.source.position]
            strongest = (
                f"Silencing {edge.source.name} at {token!r} alone moves the margin by {edge.measured:+.3f} "
                f"(predicted {edge.predicted:+.3f}: the largest) from {circuit.margin:+.3f} nats per token. "
            )
        if not largest.n:
            return f"{strongest}No unit of a layer before feeds one of the set."
        agreement = "have no rank correlation (it needs three edges that differ)"
        if not math.isnan(largest.rank_correlation):
            agreement = f"agree with a rank correlation of {largest.rank_correlation:.2f}"
        sizes = [percent_in_two_digits(check.mean_size) for check in (largest, random)]
        return (
            f"{strongest}Over the {largest.n} largest edges into the set predicted and measured effects {agreement}; "
            f"they move their targets by {sizes[0]} on average, random edges by {sizes[1]}."
        )

    @property
    def _graph_caption(self) -> Markup:
        """What the graph's marks are, and its edges as data."""
        circuit = self.circuit
        n_inward, n_outward = len(circuit.inward), len(circuit.outward)
        return figure_caption(
            edge_data(circuit, circuit.edges),
            title="Circuit",
            caption=_GRAPH,
            n=f"{n_inward} edges into the set and {n_outward} to the margin, on one prompt",
        )

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        circuit = self.circuit
        checked = predicted_against_measured(circuit)
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
            figure=figure_element(checked, "Predicted against measured effects"),
            graph_caption=self._graph_caption,
            **drawn_graph(circuit),
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
