"""One pass over a pair of answers whose activations are kept with their graph: what attribution takes gradients of."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.circuits.answer_pair import AnswerPair, margins
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.neurons import read_neurons, routed_ids
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.scoring.capture import frozen_parameters


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

    def by_row(
        self,
        site: Site,
        values: Tensor,
        units: Int[Tensor, " unit"],
    ) -> Float[Tensor, "row pos unit"]:
        """What some neurons have of values at their hook point: 0 where a token is not sent to their expert."""
        ids = self.ids.get(site)
        read = read_neurons(self.pair.model, site, values, units, ids=ids)
        # Some models (OPT) join row and position in one axis.
        return read.reshape(*self.batch.tokens.shape, -1)

    def experts_at(self, site: Site, column: int) -> list[int]:
        """The experts that a column's token is sent to."""
        rows, position = self.pair.rows(column)
        ids = self.ids[site]
        return ids[rows[0], position].tolist()


@contextmanager
def kept_pass(pair: AnswerPair) -> Iterator[KeptPass]:
    """Run the pair once; while open, the activations of all neurons and heads are kept with their graph."""
    activations: dict[str, Tensor] = {}
    ids: dict[Site, Int[Tensor, "row pos slot"]] = {}
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for site in pair.neuron_shapes:
        hooks.append((site.hook_name, _keep_activation(activations, site.hook_name)))
    for name in pair.head_hooks.values():
        hooks.append((name, _keep_activation(activations, name)))
    for site in pair.neuron_shapes:
        if site.is_of_experts:
            hooks.append((site.hook_name, _keep_ids(pair, ids, site)))
    model = pair.model
    batch = pair.batch(1)
    try:
        # No parameter needs a gradient, so the graph begins at the first activation that is kept.
        with (
            torch.enable_grad(),
            frozen_parameters(model),
            model.hooks(fwd_hooks=hooks),
            answer_positions(model, batch),
        ):
            logits = forward(model, batch)[0].float()
            margin = margins(logits, batch)[0]
            yield KeptPass(pair, batch, activations=activations, ids=ids, margin=margin)
    finally:
        activations.clear()


def _keep_activation(activations: dict[str, Tensor], name: str) -> Callable[..., Tensor]:
    """A hook that keeps what its hook point holds, with the graph."""

    def hook(activation: Tensor, hook: object) -> Tensor:
        if not activation.requires_grad:
            activation.requires_grad_(True)
        activations[name] = activation
        return activation

    return hook


def _keep_ids(pair: AnswerPair, ids: dict[Site, Tensor], site: Site) -> Callable[..., None]:
    """A hook that keeps which experts of a site the tokens are sent to."""

    def hook(activation: Tensor, hook: object) -> None:
        ids[site] = routed_ids(pair.model, site).detach()

    return hook
