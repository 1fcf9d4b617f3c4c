"""Attribution patching: what setting a unit to 0 does to a target, to first order.

The predicted effect is `-activation * gradient` at the source's hook point, over all paths from the source to the
target (Nanda 2023; Syed et al., arXiv 2310.10348).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.circuits.graph import Edge, Node
from dean_interp.circuits.kept_pass import KeptPass
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection


def edges_to_margin(kept: KeptPass, selection: Selection, n: int) -> list[Edge]:
    """The `n` largest edges from the selected neurons to the margin, at any column; largest first.

    A neuron has no edge at a token that is not sent to its expert.
    """
    pair = kept.pair
    hooks = [site.hook_name for site in selection.units]
    effects = effects_on(kept, kept.margin, hooks)
    sizes = []
    for site, units in selection.units.items():
        of_site = effects.of(site.hook_name)
        effect = of_site[:, units.to(of_site.device)]
        is_seen = _are_seen(kept, site, units)
        # Unit by unit, and of each unit column by column.
        for number, column in is_seen.T.nonzero().tolist():
            neuron = (site, int(units[number]))
            size = float(effect[column, number])
            sizes.append((size, neuron, column))
    sizes.sort(key=lambda row: -abs(row[0]))
    edges = []
    for size, neuron, column in sizes[:n]:
        source = pair.node(neuron, column)
        edges.append(Edge(source, target=None, predicted=size))
    return edges


def _are_seen(kept: KeptPass, site: Site, units: Int[Tensor, " unit"]) -> Bool[Tensor, "column unit"]:
    """Whether the token of a column is one that a neuron's expert sees; in a dense layer all are."""
    ones = torch.ones_like(kept.activations[site.hook_name])
    by_row = kept.by_row(site, ones, units)
    return kept.pair.by_column(by_row) > 0


def sources_of(kept: KeptPass, target: Node) -> "SourceEffects":
    """What every unit that comes before a neuron does to its activation at its column."""
    pair = kept.pair
    rows, position = pair.rows(target.position)
    site, index = pair.neuron(target)
    unit = torch.tensor([index])
    by_row = kept.by_row(site, kept.activations[site.hook_name], unit)
    activation = by_row[rows[0], position, 0]
    # Neurons of earlier layers come before it, and heads of its own layer too.
    hooks = [site.hook_name for site in pair.neuron_shapes if site.layer < target.layer]
    hooks += [name for layer, name in pair.head_hooks.items() if layer <= target.layer]
    # It sees the columns up to its own, but not those of the other answer.
    columns = []
    for column in range(target.position + 1):
        is_of_prompt = column < pair.n_prompt
        if is_of_prompt or pair.rows(column)[0] == rows:
            columns.append(column)
    return SourceEffects(
        target=target,
        effects=effects_on(kept, activation, hooks),
        columns=columns,
        scale=float(activation.detach().abs()) or 1.0,
    )


def effects_on(kept: KeptPass, target: Float[Tensor, ""], hooks: Sequence[str]) -> "Effects":
    """First-order effect on the target of setting each unit to 0 at each column; a head is one unit."""
    # Before the neurons of a first layer without heads there is no unit.
    if not hooks:
        return Effects(kept, {})
    activations = [kept.activations[name] for name in hooks]
    gradients = torch.autograd.grad(target, activations, retain_graph=True, allow_unused=True)
    products = {}
    for name, activation, gradient in zip(hooks, activations, gradients, strict=True):
        # What the target does not depend on has no gradient.
        if gradient is None:
            products[name] = torch.zeros_like(activation)
        else:
            products[name] = -gradient * activation.detach()
    return Effects(kept, products)


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
            if site is None:
                counts[name] = self.kept.pair.n_heads
            elif site.is_of_experts:
                counts[name] = product.shape[-2:].numel()
            else:
                counts[name] = product.shape[-1]
        return counts

    def site(self, name: str) -> Site | None:
        """The site of the neurons at a hook point; None where it is one of heads."""
        for site in self.kept.pair.neuron_shapes:
            if site.hook_name == name:
                return site
        return None

    def of(
        self,
        name: str,
        units: Int[Tensor, " unit"] | None = None,
    ) -> Float[Tensor, "column unit"]:
        """The effects of some units of a hook point (None: of all).

        They are made when asked for: with all experts they are many numbers.
        """
        site = self.site(name)
        product = self.products[name].float()
        pair = self.kept.pair
        if site is not None and site.is_of_experts:
            n_neurons = pair.neuron_shapes[site][0]
            chosen = torch.arange(n_neurons) if units is None else units
            by_row = self.kept.by_row(site, product, chosen)
            return pair.by_column(by_row)
        # The numbers of a head are added up, those of a neuron stand alone.
        shape = self.kept.batch.tokens.shape
        if site is None:
            by_row = product.reshape(*shape, pair.n_heads, -1).sum(-1)
        else:
            by_row = product.reshape(*shape, -1)
        effects = pair.by_column(by_row)
        if units is None:
            return effects
        return effects[:, units.to(effects.device)]

    def node(self, name: str, unit: int, column: int) -> Node:
        """A unit of a hook point at a column."""
        site = self.site(name)
        if site is None:
            layer = int(name.split(".")[1])
            return Node("head", layer, unit, column)
        return self.kept.pair.node((site, unit), column)

    def unit_at(self, name: str, place: int, column: int) -> int:
        """The number of the unit in one of the `n_units` places that a token has."""
        site = self.site(name)
        if site is None or not site.is_of_experts:
            return place
        d_expert = self.products[name].shape[-1]
        slot, index = divmod(place, d_expert)
        expert = self.kept.experts_at(site, column)[slot]
        return expert * d_expert + index


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
            sizes = effect[self.columns].abs().flatten()
            n_largest = min(n, sizes.numel())
            for place in sizes.topk(n_largest).indices.tolist():
                place_of_column, number = divmod(place, effect.shape[1])
                column = self.columns[place_of_column]
                unit = number if units is None else int(units[number])
                size = float(effect[column, number])
                edges.append(self._edge(name, column, unit, size))
        return largest(edges, n)

    def _units(self, among: Selection | None) -> dict[str, Int[Tensor, " unit"] | None]:
        """The hook points of all sources, with None for all their units; or those that a selection has units at."""
        if among is None:
            return dict.fromkeys(self.effects.products)
        units = {}
        for site, indices in among.units.items():
            if len(indices) and site.hook_name in self.effects.products:
                units[site.hook_name] = indices
        return units

    def random(self, n: int, generator: np.random.Generator) -> list[Edge]:
        """Edges drawn at random, each unit and column as likely as any other.

        Of routed experts those of the column's token: the others do nothing there, which would be no comparison.
        """
        names = list(self.effects.products)
        if not names:
            return []
        n_units = np.array(list(self.effects.n_units.values()))
        shares = n_units / n_units.sum()
        drawn = []
        for number in generator.choice(len(names), n, p=shares):
            column = int(generator.choice(self.columns))
            place = int(generator.integers(n_units[number]))
            unit = self.effects.unit_at(names[number], place, column)
            drawn.append((names[number], column, unit))
        # The effects at a hook point are made once.
        effects: dict[str, Tensor] = {}
        edges = []
        for name, column, unit in drawn:
            if name not in effects:
                effects[name] = self.effects.of(name)
            size = float(effects[name][column, unit])
            edges.append(self._edge(name, column, unit, size))
        return edges

    def _edge(self, name: str, column: int, unit: int, effect: float) -> Edge:
        """The edge from a unit to the target, with its effect as a share of the target's activation."""
        source = self.effects.node(name, unit, column)
        return Edge(source, self.target, predicted=effect / self.scale)


def largest(edges: Sequence[Edge], n: int | None = None) -> list[Edge]:
    """The `n` edges with the largest predicted effect (None: all), largest first."""
    largest_first = sorted(edges, key=lambda edge: -abs(edge.predicted))
    return largest_first[:n]
