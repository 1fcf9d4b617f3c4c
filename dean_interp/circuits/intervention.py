"""Interventions: what setting the source of an edge to 0 really does to its target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.circuits.answer_pair import AnswerPair, margins
from dean_interp.circuits.graph import Edge, Node
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.neurons import read_neurons, with_neurons
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.progress import progress_bar

_PER_BATCH = 16
"""Interventions a pass."""
_ROWS_EACH = 2
"""Each has the pair's two rows for itself."""


@dataclass(frozen=True)
class _Effects:
    """What some interventions make of the margin and of the observed neurons."""

    margins: Float[Tensor, " intervention"]
    activations: Mapping[Node, Float[Tensor, " intervention"]]


@torch.inference_mode()
def measured(pair: AnswerPair, edges: Sequence[Edge]) -> list[Edge]:
    """The edges with their measured effects, in the same order: one intervention an edge."""
    before = _effects(pair, [None], _targets(edges))
    starts = range(0, len(edges), _PER_BATCH)
    checked = []
    for start in progress_bar(starts, desc="intervening", unit="batch", leave=False):
        batch_edges = edges[start : start + _PER_BATCH]
        sources = [edge.source for edge in batch_edges]
        after = _effects(pair, sources, _targets(batch_edges))
        for i, edge in enumerate(batch_edges):
            change = _change(edge.target, before, after, i)
            checked.append(replace(edge, measured=change))
    return checked


def _change(target: Node | None, before: _Effects, after: _Effects, intervention: int) -> float:
    """What an intervention does to the margin (None), or to a neuron as a share of its activation."""
    if target is None:
        margin = float(before.margins[0])
        return float(after.margins[intervention] - margin)
    activation = float(before.activations[target][0])
    changed = float(after.activations[target][intervention])
    return (changed - activation) / (abs(activation) or 1.0)


def _targets(edges: Sequence[Edge]) -> list[Node]:
    """The neurons that the edges lead to, each once."""
    targets = [edge.target for edge in edges if edge.target is not None]
    return list(dict.fromkeys(targets))


def _effects(
    pair: AnswerPair,
    silenced: Sequence[Node | None],
    observed: Sequence[Node],
) -> _Effects:
    """The margin and the activations of the observed neurons under each intervention (None: nothing is silenced).

    All interventions share one pass: each has a copy of the pair's two rows.
    """
    batch = pair.batch(len(silenced))
    # The nodes of one hook point share a hook.
    heads: dict[str, list[tuple[int, Node]]] = {}
    neurons: dict[Site, list[tuple[int, Node]]] = {}
    for i, node in enumerate(silenced):
        if node is None:
            continue
        if node.kind == "head":
            name = pair.head_hooks[node.layer]
            heads.setdefault(name, []).append((i, node))
        else:
            site, _ = pair.neuron(node)
            neurons.setdefault(site, []).append((i, node))
    activations: dict[Node, Tensor] = {}
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for name, nodes in heads.items():
        hooks.append((name, _silence_heads(pair, batch, nodes)))
    for site, nodes in neurons.items():
        hooks.append((site.hook_name, _silence_neurons(pair, batch, site, nodes)))
    # An observed neuron is seen as it is behind the interventions.
    for node in observed:
        site, _ = pair.neuron(node)
        hooks.append((site.hook_name, _observe(pair, batch, node, activations)))
    with pair.model.hooks(fwd_hooks=hooks), answer_positions(pair.model, batch):
        logits = forward(pair.model, batch)[0].float()
    return _Effects(margins(logits, batch), activations)


def _silence_heads(
    pair: AnswerPair,
    batch: Batch,
    nodes: Sequence[tuple[int, Node]],
) -> Callable[..., Tensor]:
    """A hook that sets heads of its hook point to 0, each in the rows of its own intervention."""

    def hook(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        flat = changed.view(*batch.tokens.shape, -1)
        width = flat.shape[-1] // pair.n_heads
        for i, node in nodes:
            rows, position = pair.rows(node.position)
            start = node.index * width
            head = slice(start, start + width)
            first = _ROWS_EACH * i
            for row in rows:
                flat[first + row, position, head] = 0
        return changed

    return hook


def _silence_neurons(
    pair: AnswerPair,
    batch: Batch,
    site: Site,
    nodes: Sequence[tuple[int, Node]],
) -> Callable[..., Tensor]:
    """A hook that sets neurons of a site to 0, each in the rows of its own intervention."""
    indices = [pair.neuron(node)[1] for _, node in nodes]
    units = torch.tensor(sorted(set(indices)))

    def hook(activation: Tensor, hook: object) -> Tensor:
        read = read_neurons(pair.model, site, activation, units)
        # Some models (OPT) join row and position in one axis.
        changed = read.reshape(*batch.tokens.shape, -1).clone()
        for (i, node), index in zip(nodes, indices, strict=True):
            rows, position = pair.rows(node.position)
            place = int((units == index).nonzero())
            first = _ROWS_EACH * i
            for row in rows:
                changed[first + row, position, place] = 0
        changed = changed.reshape(read.shape)
        return with_neurons(pair.model, site, activation, units, changed)

    return hook


def _observe(
    pair: AnswerPair,
    batch: Batch,
    node: Node,
    activations: dict[Node, Tensor],
) -> Callable[..., None]:
    """A hook that notes a neuron's activation under every intervention."""
    site, index = pair.neuron(node)
    rows, position = pair.rows(node.position)
    unit = torch.tensor([index])

    def hook(activation: Tensor, hook: object) -> None:
        read = read_neurons(pair.model, site, activation, unit)
        by_row = read.reshape(*batch.tokens.shape)
        # One of each intervention's rows is enough.
        of_interventions = by_row[rows[0] :: _ROWS_EACH, position]
        activations[node] = of_interventions.float()

    return hook
