"""Attribution patching: what setting a unit to 0 does to a target, to first order.

The predicted effect is `-activation * gradient` at the source's hook point, over all paths from the source to the
target (Nanda 2023; Syed et al., arXiv 2310.10348).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.circuits.answer_pair import AnswerPair, margins
from dean_interp.circuits.graph import Edge, Node
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.neurons import read_neurons, routed_ids
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.selection.selection import Selection


@dataclass(frozen=True)
class KeptPass:
    """One pass over a pair whose activations are kept with their graph."""

    pair: AnswerPair
    batch: Batch
    activations: Mapping[str, Tensor]
    """By hook point, of all neurons and heads."""
    ids: Mapping[Site, Int[Tensor, "row pos slot"]]
    """The experts that the tokens were sent to, of every site of routed experts."""
    margin: Float[Tensor, ""]

    def edges_to_margin(self, selection: Selection, n: int) -> list[Edge]:
        """Edges from the selected neurons, at the columns where they do most to the margin; largest first.

        A neuron has no edge at a token that is not sent to its expert.
        """
        effects = self.effects_on(self.margin, [site.hook_name for site in selection.units])
        found = []
        for site, units in selection.units.items():
            effect = effects.of(site.hook_name)[:, units.to(self.margin.device)]
            ones = torch.ones_like(self.activations[site.hook_name])
            is_seen = self.pair.by_column(self.by_row(site, ones, units)) > 0
            for place in is_seen.T.flatten().nonzero()[:, 0].tolist():
                unit, column = divmod(place, len(effect))
                found.append((float(effect[column, unit]), site, int(units[unit]), column))
        found.sort(key=lambda each: -abs(each[0]))
        return [Edge(self.pair.node((site, unit), column), None, size) for size, site, unit, column in found[:n]]

    def sources_of(self, target: Node) -> "SourceEffects":
        """What every unit that comes before a neuron does to its activation at its column."""
        pair = self.pair
        rows, position = pair.rows(target.position)
        site, index = pair.neuron(target)
        value = self.by_row(site, self.activations[site.hook_name], torch.tensor([index]))[rows[0], position, 0]
        # neurons of earlier layers come before it, and heads of its own layer too
        hooks = [site.hook_name for site in pair.neuron_shapes if site.layer < target.layer]
        hooks += pair.head_hooks[: target.layer + 1]
        # it sees the columns up to its own, but not those of the other answer
        columns = []
        for column in range(target.position + 1):
            if column < pair.n_prompt or pair.rows(column)[0] == rows:
                columns.append(column)
        return SourceEffects(
            target=target,
            effects=self.effects_on(value, hooks),
            columns=columns,
            scale=float(value.detach().abs()) or 1.0,
        )

    def effects_on(self, target: Float[Tensor, ""], hooks: Sequence[str]) -> "Effects":
        """First-order effect on the target of setting each unit to 0 at each column; a head is one unit."""
        activations = [self.activations[name] for name in hooks]
        gradients = torch.autograd.grad(target, activations, retain_graph=True, allow_unused=True)
        products = {}
        for name, activation, gradient in zip(hooks, activations, gradients, strict=True):
            products[name] = torch.zeros_like(activation)
            if gradient is not None:
                products[name] = -gradient * activation.detach()
        return Effects(self, products)

    def by_row(self, site: Site, values: Tensor, units: Int[Tensor, " unit"]) -> Float[Tensor, "row pos unit"]:
        """What some neurons have of values at their hook point: 0 where a token is not sent to their expert."""
        read = read_neurons(self.pair.model, site, values, units, ids=self.ids.get(site))
        # some models (OPT) join row and position in one axis
        return read.reshape(*self.batch.tokens.shape, -1)

    def experts_at(self, site: Site, column: int) -> list[int]:
        """The experts that a column's token is sent to."""
        rows, position = self.pair.rows(column)
        return self.ids[site][rows[0], position].tolist()


@dataclass(frozen=True)
class Effects:
    """To first order, what setting each unit to 0 at each column does to a target."""

    kept: KeptPass
    products: Mapping[str, Tensor]
    """`-activation * gradient` by hook point, as the pass has it."""

    @property
    def n_units(self) -> dict[str, int]:
        """How many units a token has at each hook point; of routed experts those of its own experts."""
        counts = {}
        for name, product in self.products.items():
            site = self.site(name)
            counts[name] = self.kept.pair.n_heads
            if site is not None:
                counts[name] = product.shape[-2:].numel() if site.is_of_experts else product.shape[-1]
        return counts

    def site(self, name: str) -> Site | None:
        """The site of the neurons at a hook point; None where it is one of heads."""
        return next((site for site in self.kept.pair.neuron_shapes if site.hook_name == name), None)

    def of(self, name: str, units: Int[Tensor, " unit"] | None = None) -> Float[Tensor, "column unit"]:
        """The effects of some units of a hook point (None: of all).

        They are made when asked for: with all experts they are many numbers.
        """
        site, product, pair = self.site(name), self.products[name].float(), self.kept.pair
        if site is None:
            by_row = product.reshape(*self.kept.batch.tokens.shape, pair.n_heads, -1).sum(-1)
        elif site.is_of_experts:
            asked = torch.arange(pair.neuron_shapes[site][0]) if units is None else units
            return pair.by_column(self.kept.by_row(site, product, asked))
        else:
            by_row = product.reshape(*self.kept.batch.tokens.shape, -1)
        effects = pair.by_column(by_row)
        return effects if units is None else effects[:, units.to(effects.device)]

    def node(self, name: str, unit: int, column: int) -> Node:
        """A unit of a hook point at a column."""
        site = self.site(name)
        if site is None:
            return Node("head", int(name.split(".")[1]), unit, column)
        return self.kept.pair.node((site, unit), column)

    def unit_at(self, name: str, place: int, column: int) -> int:
        """The number of the unit in one of the `n_units` places that a token has."""
        site = self.site(name)
        if site is None or not site.is_of_experts:
            return place
        slot, index = divmod(place, self.products[name].shape[-1])
        return self.kept.experts_at(site, column)[slot] * self.products[name].shape[-1] + index


@dataclass(frozen=True)
class SourceEffects:
    """What every unit that comes before a neuron does to its activation."""

    target: Node
    effects: Effects
    columns: list[int]
    """The columns that the target can see."""
    scale: float
    """The size of the target's activation, which effects are shares of."""

    def largest(self, n: int, *, among: Selection | None = None) -> list[Edge]:
        """The edges with the largest effect: from any unit, or from the neurons of a selection alone."""
        edges = []
        for name, units in self._units(among).items():
            effect = self.effects.of(name, units)
            seen = effect[self.columns].abs().flatten()
            for place in seen.topk(min(n, seen.numel())).indices.tolist():
                place_of_column, number = divmod(place, effect.shape[1])
                column = self.columns[place_of_column]
                unit = number if units is None else int(units[number])
                edges.append(self._edge(name, column, unit, float(effect[column, number])))
        return largest(edges, n)

    def _units(self, among: Selection | None) -> dict[str, Int[Tensor, " unit"] | None]:
        """The hook points of all sources, with None for all their units; or those that a selection has units at."""
        if among is None:
            return dict.fromkeys(self.effects.products)
        units = {site.hook_name: indices for site, indices in among.units.items() if len(indices)}
        return {name: indices for name, indices in units.items() if name in self.effects.products}

    def random(self, n: int, generator: np.random.Generator) -> list[Edge]:
        """Edges drawn at random, each unit and column as likely as any other.

        Of routed experts those of the column's token: the others do nothing there, which would be no comparison.
        """
        names = list(self.effects.products)
        n_units = np.array(list(self.effects.n_units.values()))
        drawn = []
        for hook in generator.choice(len(names), n, p=n_units / n_units.sum()):
            column = int(generator.choice(self.columns))
            unit = self.effects.unit_at(names[hook], int(generator.integers(n_units[hook])), column)
            drawn.append((names[hook], column, unit))
        effects = {name: self.effects.of(name) for name in dict.fromkeys(name for name, _, _ in drawn)}
        return [self._edge(name, column, unit, float(effects[name][column, unit])) for name, column, unit in drawn]

    def _edge(self, name: str, column: int, unit: int, effect: float) -> Edge:
        return Edge(self.effects.node(name, unit, column), self.target, effect / self.scale)


@contextmanager
def kept_pass(pair: AnswerPair) -> Iterator[KeptPass]:
    """Run the pair once; while open, the activations of all neurons and heads are kept with their graph."""
    activations: dict[str, Tensor] = {}
    ids: dict[Site, Int[Tensor, "row pos slot"]] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: object) -> Tensor:
            # no parameter needs a gradient, so the graph begins at the first activation that is kept
            if not activation.requires_grad:
                activation.requires_grad_(True)
            activations[name] = activation
            return activation

        return hook

    def keep_ids(site: Site) -> Callable[..., None]:
        def hook(_: Tensor, hook: object) -> None:
            ids[site] = routed_ids(pair.model, site).detach()

        return hook

    batch = pair.batch(1)
    sites = list(pair.neuron_shapes)
    hooks = [(name, keep(name)) for name in (*(site.hook_name for site in sites), *pair.head_hooks)]
    hooks += [(site.hook_name, keep_ids(site)) for site in sites if site.is_of_experts]
    needed_gradient = {parameter: parameter.requires_grad for parameter in pair.model.parameters()}
    try:
        for parameter in needed_gradient:
            parameter.requires_grad_(False)
        with torch.enable_grad(), pair.model.hooks(fwd_hooks=hooks), answer_positions(pair.model, batch):
            logits = forward(pair.model, batch)[0].float()
            yield KeptPass(pair, batch, activations, ids, margins(logits, batch)[0])
    finally:
        activations.clear()
        for parameter, needed in needed_gradient.items():
            parameter.requires_grad_(needed)


def largest(edges: Sequence[Edge], n: int | None = None) -> list[Edge]:
    """The `n` edges with the largest predicted effect (None: all), largest first."""
    return sorted(edges, key=lambda edge: -abs(edge.predicted))[:n]
