"""The record of a circuit: its edges, with what attribution predicts of each and what an intervention measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu, spearmanr

from dean_interp.frames import Framed
from dean_interp.models.neuron_names import NeuronName


class Node(NamedTuple):
    """A unit at one token; `position` counts the columns of `Circuit.tokens`."""

    kind: Literal["neuron", "head"]
    layer: int
    index: int
    position: int
    owner: str = ""
    """The expert that a neuron belongs to (`models.neuron_names.NeuronName`)."""

    @property
    def name(self) -> str:
        """`L17.1042`, `L17.E5.42` or `L17.H3`."""
        if self.kind == "head":
            return f"L{self.layer}.H{self.index}"
        return str(self.neuron_name)

    @property
    def neuron_name(self) -> NeuronName:
        """The name of a neuron in its parts."""
        return NeuronName(self.layer, self.index, self.owner)


@dataclass(frozen=True)
class Edge:
    """What setting `source` to 0 does to `target`: a selected neuron (share of its activation) or the margin (nats)."""

    source: Node
    target: Node | None
    """None stands for the margin."""
    predicted: float
    measured: float | None = None
    """None where it was not checked."""


@dataclass(frozen=True)
class EdgeCheck:
    """Predicted against measured effects over some edges."""

    n: int
    rank_correlation: float
    """Spearman's; NaN where there is none."""
    mean_size: float
    """Mean absolute measured effect."""


@dataclass(frozen=True)
class Circuit(Framed):
    """What feeds a set of neurons on one example, and what these neurons do to its margin."""

    tokens: tuple[str, ...]
    """The prompt's tokens, then the safe answer's, then the unsafe answer's."""
    n_prompt: int
    """Tokens of the prompt."""
    n_safe: int
    """Tokens of the safe answer."""
    margin: float
    """`log p(safe) - log p(unsafe)`, each per token, in nats."""
    edges: tuple[Edge, ...]
    """Edges from the selected neurons to the margin, then edges from neurons and heads to the selected neurons; each
    kind has the largest predicted effect first."""
    random: tuple[Edge, ...]
    """Edges into the same neurons from sources drawn at random, all of them measured."""

    def __repr__(self) -> str:
        into_set = f"{len(self.inward)} edges into the set"
        to_margin = f"{len(self.outward)} to a margin of {self.margin:+.3f}"
        return f"Circuit({len(self.tokens)} tokens, {into_set}, {to_margin})"

    def to_pandas(self) -> pd.DataFrame:
        """One row an edge: source, target, their tokens, predicted and measured effect, whether drawn at random."""
        rows = [self._row(edge, is_random=False) for edge in self.edges]
        rows += [self._row(edge, is_random=True) for edge in self.random]
        return pd.DataFrame(rows)

    def _row(self, edge: Edge, *, is_random: bool) -> dict[str, object]:
        target = edge.target
        return {
            "source": edge.source.name,
            "at": self.tokens[edge.source.position],
            "target": target.name if target else "margin",
            "target_at": self.tokens[target.position] if target else "",
            "predicted": edge.predicted,
            "measured": edge.measured,
            "random": is_random,
        }

    @property
    def inward(self) -> list[Edge]:
        """The edges into the selected neurons."""
        return [edge for edge in self.edges if edge.target is not None]

    @property
    def outward(self) -> list[Edge]:
        """The edges from the selected neurons to the margin."""
        return [edge for edge in self.edges if edge.target is None]

    @property
    def checks(self) -> dict[str, EdgeCheck]:
        """Predicted against measured: the largest edges into the set, random ones, and the edges to the margin."""
        return {
            "largest edges into the set": _check(self.inward),
            "random edges into the set": _check(self.random),
            "edges to the margin": _check(self.outward),
        }

    @property
    def p(self) -> float:
        """One-sided p that the largest edges do more than random ones (Mann-Whitney, measured sizes)."""
        largest = _measured_sizes(self.inward)
        random = _measured_sizes(self.random)
        if not largest or not random:
            return 1.0
        return float(mannwhitneyu(largest, random, alternative="greater").pvalue)


def _measured_sizes(edges: Sequence[Edge]) -> list[float]:
    """The sizes of the effects that were measured."""
    return [abs(edge.measured) for edge in edges if edge.measured is not None]


def _check(edges: Sequence[Edge]) -> EdgeCheck:
    """Predicted against measured effects over those of the edges that were measured."""
    checked = [edge for edge in edges if edge.measured is not None]
    n = len(checked)
    nan = float("nan")
    if not checked:
        return EdgeCheck(n, rank_correlation=nan, mean_size=nan)
    predicted = np.array([edge.predicted for edge in checked])
    measured = np.array([edge.measured for edge in checked])
    mean_size = float(np.abs(measured).mean())
    # Two points always lie on a line, and a constant has no ranks.
    are_ranked = bool(np.ptp(predicted)) and bool(np.ptp(measured))
    if n < 3 or not are_ranked:
        return EdgeCheck(n, rank_correlation=nan, mean_size=mean_size)
    correlation, _ = np.asarray(spearmanr(predicted, measured))
    return EdgeCheck(n, rank_correlation=float(correlation), mean_size=mean_size)
