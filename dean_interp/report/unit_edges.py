"""The edges of a circuit as the pages of the units at their two ends show them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dean_interp.circuits.graph import Edge
from dean_interp.study.site_records import CircuitRecord, SiteRecords


@dataclass(frozen=True)
class UnitEdge:
    """An edge between two units, or to the margin, as the page of one of them shows it."""

    other: str
    """The unit at its other end; empty for the margin."""
    other_token: str
    token: str
    """The token at which the unit of the page has it."""
    circuit: str
    """The name of the circuit's page."""
    prompt: str
    predicted: float
    measured: float | None


@dataclass(frozen=True)
class UnitEdges:
    """The edges of one unit on all prompts, the largest first."""

    into: tuple[UnitEdge, ...] = ()
    out: tuple[UnitEdge, ...] = ()

    @property
    def neighbour(self) -> str:
        """The unit at the other end of its largest edge to another unit; empty where it has none."""
        to_units = [edge for edge in (*self.into, *self.out) if edge.other]
        if not to_units:
            return ""
        largest = max(to_units, key=lambda edge: abs(edge.predicted))
        return largest.other


def edges_of_units(records: SiteRecords) -> dict[str, UnitEdges]:
    """The edges of every unit by its name."""
    names = [unit.name for unit in records.run.units]
    into: dict[str, list[UnitEdge]] = {name: [] for name in names}
    outward: dict[str, list[UnitEdge]] = {name: [] for name in names}
    for record in records.circuits:
        for edge in record.circuit.edges:
            outward[edge.source.name].append(_seen_from_source(edge, record))
            if edge.target is not None:
                into[edge.target.name].append(_seen_from_target(edge, record))
    edges = {}
    for name in names:
        edges[name] = UnitEdges(_largest_first(into[name]), _largest_first(outward[name]))
    return edges


def _seen_from_source(edge: Edge, record: CircuitRecord) -> UnitEdge:
    tokens, target = record.circuit.tokens, edge.target
    return UnitEdge(
        other=target.name if target else "",
        other_token=tokens[target.position] if target else "",
        token=tokens[edge.source.position],
        circuit=circuit_name(record),
        prompt=prompt_name(record),
        predicted=edge.predicted,
        measured=edge.measured,
    )


def _seen_from_target(edge: Edge, record: CircuitRecord) -> UnitEdge:
    assert edge.target is not None
    tokens = record.circuit.tokens
    return UnitEdge(
        other=edge.source.name,
        other_token=tokens[edge.source.position],
        token=tokens[edge.target.position],
        circuit=circuit_name(record),
        prompt=prompt_name(record),
        predicted=edge.predicted,
        measured=edge.measured,
    )


def _largest_first(edges: Sequence[UnitEdge]) -> tuple[UnitEdge, ...]:
    """Edges to units, then those to the margin, whose effects have another unit."""
    return tuple(sorted(edges, key=lambda edge: (not edge.other, -abs(edge.predicted))))


def circuit_name(record: CircuitRecord) -> str:
    """The name of a circuit's page. Behaviours are numbered in it, since their names may hold what a link cannot."""
    return f"{record.place}.{record.number}"


def prompt_name(record: CircuitRecord) -> str:
    """What a traced prompt is called."""
    return f"{record.behaviour} {record.number}"
