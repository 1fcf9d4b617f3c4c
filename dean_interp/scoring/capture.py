"""What units see and the gradients they get, streamed: each pair is handed on the moment its gradient arrives.

No parameter needs a gradient. All of them are frozen, and the graph begins at the first site that is watched: a pass
costs no weight gradients, holds nothing per parameter, and leaves out the backward pass below that site.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.matrices import OnProduct, on_products, parameter
from dean_interp.models.offload import held_once, is_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch

Accumulate = Callable[[Site, Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_out"]], None]


def stream_gradients(
    model: HookedModel,
    batch: Batch,
    sites: Sequence[Site],
    accumulate: Accumulate,
    *,
    signs: Float[Tensor, " answer"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, " answer"]:
    """One forward and one backward pass; `accumulate(site, x, gradient)` is called once a site, last first.

    At a site of neurons `x` is their activation and `gradient` its gradient; at a matrix `x` is what it reads and
    `gradient` that of what it writes. The gradient is that of the sum over answers of each one's mean cross-entropy
    (nats) over its tokens, times its sign where there are `signs` (in the order of the answers' numbers), so an
    answer's row holds the gradient of its own loss. Returns the losses in that order, without signs.

    `scale` multiplies the neurons' activations on their way on; `x` stays what they were.
    """

    def watch(site: Site, value: Tensor, written: Tensor) -> None:
        # detached, or the hook would hold the tensor that holds it; some models (OPT) join batch and pos
        value, shape = value.detach().reshape(*batch.tokens.shape, -1), batch.tokens.shape
        if not written.requires_grad:  # nothing before it is watched: the graph begins here
            written.requires_grad_(True)
        written.register_hook(lambda gradient: accumulate(site, value, gradient.reshape(*shape, -1)))

    def on_activation(site: Site) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: object) -> Tensor:
            passed = activation if scale == 1 else activation * scale
            watch(site, activation, passed)
            return passed  # some bridges (OPT) hand a view to hooks, which only leads on if it is given back

        return hook

    def on_product(site: Site) -> OnProduct:
        return lambda x, product: watch(site, x, product)

    hooks = [(site.hook_name, on_activation(site)) for site in sites if site.unit == "neuron"]
    products = {site: on_product(site) for site in sites if site.unit == "weight"}
    with (
        torch.enable_grad(),
        _frozen(model),
        model.hooks(fwd_hooks=hooks),
        on_products(model, products),
        answer_positions(model, batch),
    ):
        losses = _answer_losses(forward(model, batch)[0], batch)
        (losses if signs is None else losses * signs).sum().backward()
    return losses.detach()


@torch.inference_mode()
def stream_activations(
    model: HookedModel, batch: Batch, sites: Sequence[Site], accumulate: Callable[[Site, Tensor], None]
) -> Float[Tensor, " answer"]:
    """One forward pass; `accumulate(site, x)` is called once a site with what its neurons are, or its matrix reads.

    Returns every answer's mean cross-entropy (nats), in the order of their numbers.
    """

    def on_activation(site: Site) -> Callable[..., None]:
        return lambda activation, hook: accumulate(site, activation.reshape(*batch.tokens.shape, -1))

    def on_product(site: Site) -> OnProduct:
        return lambda x, product: accumulate(site, x.reshape(*batch.tokens.shape, -1))

    hooks = [(site.hook_name, on_activation(site)) for site in sites if site.unit == "neuron"]
    products = {site: on_product(site) for site in sites if site.unit == "weight"}
    with model.hooks(fwd_hooks=hooks), on_products(model, products), answer_positions(model, batch):
        return _answer_losses(forward(model, batch)[0], batch)


def check_hook_gradients(model: HookedModel, batch: Batch, sites: Sequence[Site]) -> None:
    """Refuse a model whose hook points are not what they seem: hook gradients against parameters' own.

    For a matrix the product over all positions of what it reads and the gradient of what it writes is its gradient. For
    neuron i, which writes row i of `W_out`, the sum over positions of activation times gradient equals
    `sum_j W_out[i, j] * dL/dW_out[i, j]`. Both are exact whenever the weights read what the hook points hold.
    """
    if not sites:
        return
    at_hook: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor, gradient: Tensor) -> None:
        if site.unit == "neuron":
            at_hook[site] = (x.float() * gradient.float()).sum((0, 1))
        else:
            at_hook[site] = x.flatten(0, 1).float().T @ gradient.flatten(0, 1).float()

    stream_gradients(model, batch, sites, keep)
    matrices = {site: parameter(model, Site(site.layer, "out") if site.unit == "neuron" else site) for site in sites}
    with torch.enable_grad(), _frozen(model), answer_positions(model, batch):
        for weight, _ in matrices.values():
            weight.requires_grad_(True)
        loss = _answer_losses(forward(model, batch)[0], batch).sum()
        gradients = torch.autograd.grad(loss, [weight for weight, _ in matrices.values()])
    for (site, (weight, as_matrix)), gradient in zip(matrices.items(), gradients, strict=True):
        expected = as_matrix(weight.detach() * gradient if site.unit == "neuron" else gradient).float()
        expected = expected.sum(1) if site.unit == "neuron" else expected
        tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
        if (expected - at_hook[site]).abs().max() > tolerance * expected.abs().max() + 1e-12:
            place = site.hook_name if site.unit == "neuron" else f"the hook points of {site}"
            raise RuntimeError(
                f"{model.cfg.model_name}: the gradient at {place} does not agree with that of the weight it feeds; "
                "scores of this architecture would be wrong"
            )


def _answer_losses(logits: Float[Tensor, "answer_token d_vocab"], batch: Batch) -> Float[Tensor, " answer"]:
    nats = torch.nn.functional.cross_entropy(logits.float(), batch.target, reduction="none")
    answers, index, counts = torch.unique(batch.answer, return_inverse=True, return_counts=True)
    return torch.zeros(len(answers), device=nats.device).index_add(0, index, nats) / counts


@contextmanager
def _frozen(model: HookedModel) -> Iterator[None]:
    """No parameter requires a gradient while open, each has its own setting back after."""
    owned = [
        (module, name) for module in model.modules() for name, one in module._parameters.items() if one is not None
    ]
    wanted = [(module, name, getattr(module, name).requires_grad) for module, name in owned]
    try:
        for module, name, _ in wanted:
            getattr(module, name).requires_grad_(False)
        with held_once(model) if is_offloaded(model) else nullcontext():
            yield
    finally:
        for (
            module,
            name,
            setting,
        ) in wanted:  # by name: what is brought for a pass is another object after it
            getattr(module, name).requires_grad_(setting)
