"""Attribution patching: what setting a unit to 0 does to a target, to first order.

The predicted effect is `-activation * gradient` at the source's hook point, over all paths from the source to the
target (Nanda 2023; Syed et al., arXiv 2310.10348).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.circuits.answer_pair import AnswerPair, margins
from dean_interp.circuits.graph import Edge, Node
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.tokens import Batch
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class SourceEffects:
    """What every unit that comes before a neuron does to its activation."""

    target: Node
    effects: Mapping[str, Float[Tensor, "column unit"]]
    """By hook point; a head is one unit."""
    head_hooks: Sequence[str]
    columns: list[int]
    """The columns that the target can see."""
    scale: float
    """The size of the target's activation, which effects are shares of."""

    def largest(self, n: int) -> list[Edge]:
        """The edges with the largest effect."""
        edges = []
        for name, effect in self.effects.items():
            seen = effect[self.columns].abs().flatten()
            for place in seen.topk(min(n, seen.numel())).indices.tolist():
                column, unit = divmod(place, effect.shape[1])
                edges.append(self._edge(name, self.columns[column], unit))
        return largest(edges, n)

    def random(self, n: int, generator: np.random.Generator) -> list[Edge]:
        """Edges drawn at random, each unit and column as likely as any other."""
        names = list(self.effects)
        n_units = np.array([effect.shape[1] for effect in self.effects.values()])
        edges = []
        for hook in generator.choice(len(names), n, p=n_units / n_units.sum()):
            column = int(generator.choice(self.columns))
            unit = int(generator.integers(n_units[hook]))
            edges.append(self._edge(names[hook], column, unit))
        return edges

    def _edge(self, name: str, column: int, unit: int) -> Edge:
        kind = "head" if name in self.head_hooks else "neuron"
        layer = int(name.split(".")[1])
        return Edge(Node(kind, layer, unit, column), self.target, float(self.effects[name][column, unit]) / self.scale)


@dataclass(frozen=True)
class KeptPass:
    """One pass over a pair whose activations are kept with their graph."""

    pair: AnswerPair
    batch: Batch
    activations: Mapping[str, Tensor]
    """By hook point, of all neurons and heads."""
    margin: Float[Tensor, ""]

    def edges_to_margin(self, selection: Selection, n: int) -> list[Edge]:
        """Edges from the selected neurons, at the columns where they do most to the margin; largest first."""
        effects = self.effects_on(self.margin, self.pair.neuron_hooks)
        edges = []
        for site, units in selection.units.items():
            for index in units.tolist():
                for column in range(self.pair.n_columns):
                    source = Node("neuron", site.layer, index, column)
                    edges.append(Edge(source, None, float(effects[site.hook_name][column, index])))
        return largest(edges, n)

    def sources_of(self, target: Node) -> SourceEffects:
        """What every unit that comes before a neuron does to its activation at its column."""
        pair = self.pair
        rows, position = pair.rows(target.position)
        value = self._by_row(self.activations[pair.neuron_hooks[target.layer]])[rows[0], position, target.index]
        # neurons of earlier layers come before it, and heads of its own layer too
        hooks = [*pair.neuron_hooks[: target.layer], *pair.head_hooks[: target.layer + 1]]
        # it sees the columns up to its own, but not those of the other answer
        columns = []
        for column in range(target.position + 1):
            if column < pair.n_prompt or pair.rows(column)[0] == rows:
                columns.append(column)
        return SourceEffects(
            target=target,
            effects=self.effects_on(value, hooks),
            head_hooks=pair.head_hooks,
            columns=columns,
            scale=float(value.detach().abs()) or 1.0,
        )

    def effects_on(self, target: Float[Tensor, ""], hooks: Sequence[str]) -> dict[str, Float[Tensor, "column unit"]]:
        """First-order effect on the target of setting each unit to 0 at each column; a head is one unit."""
        activations = [self.activations[name] for name in hooks]
        gradients = torch.autograd.grad(target, activations, retain_graph=True, allow_unused=True)
        effects = {}
        for name, activation, gradient in zip(hooks, activations, gradients, strict=True):
            product = torch.zeros_like(activation)
            if gradient is not None:
                product = -gradient * activation.detach()
            product = self._by_row(product).float()
            if name in self.pair.head_hooks:
                product = product.unflatten(-1, (self.pair.n_heads, -1)).sum(-1)
            effects[name] = self.pair.by_column(product)
        return effects

    def _by_row(self, values: Tensor) -> Float[Tensor, "row pos unit"]:
        # some models (OPT) join row and position in one axis
        return values.reshape(*self.batch.tokens.shape, -1)


@contextmanager
def kept_pass(pair: AnswerPair) -> Iterator[KeptPass]:
    """Run the pair once; while open, the activations of all neurons and heads are kept with their graph."""
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: object) -> Tensor:
            # no parameter needs a gradient, so the graph begins at the first activation that is kept
            if not activation.requires_grad:
                activation.requires_grad_(True)
            activations[name] = activation
            return activation

        return hook

    batch = pair.batch(1)
    hooks = [(name, keep(name)) for name in (*pair.neuron_hooks, *pair.head_hooks)]
    needed_gradient = {parameter: parameter.requires_grad for parameter in pair.model.parameters()}
    try:
        for parameter in needed_gradient:
            parameter.requires_grad_(False)
        with torch.enable_grad(), pair.model.hooks(fwd_hooks=hooks), answer_positions(pair.model, batch):
            logits = forward(pair.model, batch)[0].float()
            yield KeptPass(pair, batch, activations, margins(logits, batch)[0])
    finally:
        activations.clear()
        for parameter, needed in needed_gradient.items():
            parameter.requires_grad_(needed)


def largest(edges: Sequence[Edge], n: int | None = None) -> list[Edge]:
    """The `n` edges with the largest predicted effect (None: all), largest first."""
    return sorted(edges, key=lambda edge: -abs(edge.predicted))[:n]
