"""Activations and gradients at hook points, streamed: each pair is handed on the moment its gradient arrives.

No parameter needs a gradient. All of them are frozen and the embedding's output requires one, so a backward pass costs
no weight gradients, and nothing is held per parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.sites import Site, output_weight
from dean_interp.models.tokens import Batch

Accumulate = Callable[[Site, Float[Tensor, "batch pos d_mlp"], Float[Tensor, "batch pos d_mlp"]], None]


def stream_gradients(
    model: HookedModel, batch: Batch, sites: Sequence[Site], accumulate: Accumulate
) -> Float[Tensor, " example"]:
    """One forward and one backward pass; `accumulate(site, activation, gradient)` is called once a site, last first.

    The gradient is that of the sum over examples of each example's mean cross-entropy (nats) over its answer tokens,
    so an example's rows hold the gradient of its own loss. Returns the losses, in the order of the answers' numbers.
    """

    def hook_for(site: Site) -> Callable[..., None]:
        def on_activation(activation: Tensor, hook: object) -> None:
            value = activation.detach()  # the hook must not hold the tensor that holds it, or neither is ever freed
            activation.register_hook(lambda gradient: accumulate(site, value, gradient))

        return on_activation

    hooks = [("hook_embed", lambda embedded, hook: embedded.requires_grad_(True))]
    hooks += [(site.hook_name, hook_for(site)) for site in sites]
    with torch.enable_grad(), _frozen(model), model.hooks(fwd_hooks=hooks), answer_positions(model, batch):
        losses = _answer_losses(forward(model, batch)[0], batch)
        losses.sum().backward()
    return losses.detach()


def check_hook_gradient(model: HookedModel, batch: Batch, layer: int) -> None:
    """Refuse a model whose hook point is not what it seems: hook gradient against parameter gradient in one layer.

    For neuron i that writes row i of `W_out`, the sum over positions of activation times gradient equals
    `sum_j W_out[i, j] * dL/dW_out[i, j]`, exactly, whenever `W_out` reads what the hook point holds.
    """
    site = Site(layer, "neurons")
    at_hook: list[Tensor] = []
    stream_gradients(model, batch, [site], lambda _, value, gradient: at_hook.append((value * gradient).sum((0, 1))))
    weight, transposed = output_weight(model, layer)
    with torch.enable_grad(), _frozen(model), answer_positions(model, batch):
        weight.requires_grad_(True)
        loss = _answer_losses(forward(model, batch)[0], batch).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
    at_weight = (weight.detach() * gradient).sum(0 if transposed else 1)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    if (at_weight - at_hook[0]).abs().max() > tolerance * at_weight.abs().max() + 1e-12:
        raise RuntimeError(
            f"{model.cfg.model_name}: the gradient at {site.hook_name} does not agree with that of the weight it "
            "feeds; scores of this architecture would be wrong"
        )


def _answer_losses(logits: Float[Tensor, "answer_token d_vocab"], batch: Batch) -> Float[Tensor, " example"]:
    nats = torch.nn.functional.cross_entropy(logits.float(), batch.target, reduction="none")
    answers, index, counts = torch.unique(batch.answer, return_inverse=True, return_counts=True)
    return torch.zeros(len(answers), device=nats.device).index_add(0, index, nats) / counts


@contextmanager
def _frozen(model: HookedModel) -> Iterator[None]:
    """No parameter requires a gradient while open; each has its own setting back after."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, setting in wanted:
            parameter.requires_grad_(setting)
