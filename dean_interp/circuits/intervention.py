"""Interventions: what setting the source of an edge to 0 really does to its target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.circuits.answer_pair import AnswerPair, margins
from dean_interp.circuits.graph import Edge, Node
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.neuron_names import Neuron
from dean_interp.models.neurons import read_neurons, with_neurons
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.progress import progress_bar

_PER_BATCH = 16
"""Interventions a pass; each takes two rows."""


@dataclass(frozen=True)
class _Effects:
    margins: Float[Tensor, " intervention"]
    activations: Mapping[Node, Float[Tensor, " intervention"]]


@torch.inference_mode()
def measured(pair: AnswerPair, edges: Sequence[Edge]) -> list[Edge]:
    """The edges with their measured effects, in the same order: one intervention an edge."""
    before = _effects(pair, [None], _targets(edges))
    margin = float(before.margins[0])
    checked = []
    for start in progress_bar(range(0, len(edges), _PER_BATCH), desc="intervening", unit="batch", leave=False):
        some = edges[start : start + _PER_BATCH]
        after = _effects(pair, [edge.source for edge in some], _targets(some))
        for i, edge in enumerate(some):
            if edge.target is None:
                change = float(after.margins[i] - margin)
            else:
                activation = float(before.activations[edge.target][0])
                change = (float(after.activations[edge.target][i]) - activation) / (abs(activation) or 1.0)
            checked.append(replace(edge, measured=change))
    return checked


def _targets(edges: Sequence[Edge]) -> list[Node]:
    """The neurons that the edges lead to, each once."""
    targets = [edge.target for edge in edges if edge.target is not None]
    return list(dict.fromkeys(targets))


def _effects(pair: AnswerPair, silenced: Sequence[Node | None], observed: Sequence[Node]) -> _Effects:
    """The margin and the activations of the observed neurons under each intervention (None: nothing is silenced).

    All interventions share one pass: each has a copy of the pair's two rows.
    """
    batch = pair.batch(len(silenced))
    heads: dict[str, list[tuple[int, Node]]] = {}
    neurons: dict[Site, list[tuple[int, Node]]] = {}
    for i, node in enumerate(silenced):
        if node is not None and node.kind == "head":
            heads.setdefault(pair.head_hooks[node.layer], []).append((i, node))
        elif node is not None:
            neurons.setdefault(pair.neuron(node)[0], []).append((i, node))
    activations: dict[Node, Tensor] = {}
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    hooks += [(name, _silence_heads(pair, batch, nodes)) for name, nodes in heads.items()]
    hooks += [(site.hook_name, _silence_neurons(pair, batch, site, nodes)) for site, nodes in neurons.items()]
    for node in observed:
        site, index = pair.neuron(node)
        hooks.append((site.hook_name, _observe(pair, batch, (site, index), node, activations)))
    with pair.model.hooks(fwd_hooks=hooks), answer_positions(pair.model, batch):
        logits = forward(pair.model, batch)[0].float()
    return _Effects(margins(logits, batch), activations)


def _silence_heads(pair: AnswerPair, batch: Batch, nodes: Sequence[tuple[int, Node]]) -> Callable[..., Tensor]:
    """A hook that sets heads of its hook point to 0, each in the rows of its own intervention."""

    def hook(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        flat = changed.view(*batch.tokens.shape, -1)
        for i, node in nodes:
            rows, position = pair.rows(node.position)
            width = flat.shape[-1] // pair.n_heads
            for row in rows:
                flat[2 * i + row, position, node.index * width : (node.index + 1) * width] = 0
        return changed

    return hook


def _silence_neurons(
    pair: AnswerPair, batch: Batch, site: Site, nodes: Sequence[tuple[int, Node]]
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
            for row in rows:
                changed[2 * i + row, position, int((units == index).nonzero())] = 0
        return with_neurons(pair.model, site, activation, units, changed.reshape(read.shape))

    return hook


def _observe(
    pair: AnswerPair, batch: Batch, neuron: Neuron, node: Node, activations: dict[Node, Tensor]
) -> Callable[..., None]:
    """A hook that notes a neuron's activation under every intervention."""
    (rows, position), (site, index) = pair.rows(node.position), neuron

    def hook(activation: Tensor, hook: object) -> None:
        read = read_neurons(pair.model, site, activation, torch.tensor([index])).reshape(*batch.tokens.shape)
        activations[node] = read[rows[0] :: 2, position].float()

    return hook
