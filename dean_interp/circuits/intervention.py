"""Interventions: what setting the source of an edge to 0 really does to its target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.circuits.answer_pair import AnswerPair, margins
from dean_interp.circuits.graph import Edge, Node
from dean_interp.models.loss import answer_positions, forward
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
    by_hook: dict[str, list[tuple[int, Node]]] = {}
    for i, node in enumerate(silenced):
        if node is not None:
            hooks = pair.head_hooks if node.kind == "head" else pair.neuron_hooks
            by_hook.setdefault(hooks[node.layer], []).append((i, node))
    activations: dict[Node, Tensor] = {}
    hooks = [(name, _silence(pair, batch, nodes)) for name, nodes in by_hook.items()]
    hooks += [(pair.neuron_hooks[node.layer], _observe(pair, batch, node, activations)) for node in observed]
    with pair.model.hooks(fwd_hooks=hooks), answer_positions(pair.model, batch):
        logits = forward(pair.model, batch)[0].float()
    return _Effects(margins(logits, batch), activations)


def _silence(pair: AnswerPair, batch: Batch, nodes: Sequence[tuple[int, Node]]) -> Callable[..., Tensor]:
    """A hook that sets nodes of its hook point to 0, each in the rows of its own intervention."""

    def hook(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        flat = changed.view(*batch.tokens.shape, -1)
        for i, node in nodes:
            rows, position = pair.rows(node.position)
            width = flat.shape[-1] // pair.n_heads if node.kind == "head" else 1
            for row in rows:
                flat[2 * i + row, position, node.index * width : (node.index + 1) * width] = 0
        return changed

    return hook


def _observe(pair: AnswerPair, batch: Batch, node: Node, activations: dict[Node, Tensor]) -> Callable[..., None]:
    """A hook that notes a neuron's activation under every intervention."""
    rows, position = pair.rows(node.position)

    def hook(activation: Tensor, hook: object) -> None:
        flat = activation.reshape(*batch.tokens.shape, -1)
        activations[node] = flat[rows[0] :: 2, position, node.index].float()

    return hook
