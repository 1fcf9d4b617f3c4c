"""Activations and their gradients, streamed: each pair is handed on the moment its gradient arrives.

No parameter needs a gradient. All of them are frozen, and the graph begins at the first site that is watched. So a pass
computes no weight gradients, holds nothing per parameter, and leaves out the backward pass below that site.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.models.experts import by_expert
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.matrices import OnProduct, on_products, parameter
from dean_interp.models.neurons import effect_of_rows, routed_ids
from dean_interp.models.offload import held_once, is_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch

Accumulate = Callable[[Site, Float[Tensor, "batch pos *slot d_in"], Float[Tensor, "batch pos *slot d_out"]], None]
"""Routed experts have an axis for the experts of a token, their slots (`models.experts`)."""


def stream_gradients(
    model: HookedModel,
    batch: Batch,
    sites: Sequence[Site],
    accumulate: Accumulate,
    *,
    signs: Float[Tensor, " answer"] | None = None,
    scale: float = 1.0,
    targets: Callable[[Tensor, Batch], Tensor] | None = None,
) -> Float[Tensor, " answer"]:
    """Run one forward and one backward pass. `accumulate(site, x, gradient)` is called once a site, last first.

    At a site of neurons `x` is their activation and `gradient` its gradient; at a matrix `x` is what it reads and
    `gradient` that of what it writes. The gradient is that of the sum over answers of each one's mean cross-entropy
    (nats) over its tokens, times its sign where there are `signs` (in the order of the answers' numbers; any number
    will do), so an answer's row holds the gradient of its own loss. Returns the losses in that order, without signs.

    `scale` multiplies the activations that the neurons pass on; `x` are the activations before that. `targets` gives
    other tokens than the answers' own to predict, from the logits at their places and the batch.
    """

    def watch(site: Site, x: Tensor, output: Tensor) -> None:
        # `x` is detached, or the hook would hold the tensor that holds it.
        x = _by_row(site, x.detach(), batch)
        # Where nothing before this site is watched the graph begins here.
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(lambda gradient: accumulate(site, x, _by_row(site, gradient, batch)))

    def on_activation(site: Site) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: object) -> Tensor:
            passed_on = activation if scale == 1 else activation * scale
            watch(site, activation, passed_on)
            # Some bridges (OPT) give hooks a view, which is part of the graph only if it is returned.
            return passed_on

        return hook

    def on_product(site: Site) -> OnProduct:
        return lambda x, product: watch(site, x, product)

    hooks = _hooked(model, batch, sites, on_activation=on_activation, on_product=on_product)
    with torch.enable_grad(), frozen_parameters(model), hooks:
        logits = forward(model, batch)[0]
        target = batch.target if targets is None else targets(logits.detach(), batch)
        losses = _answer_losses(logits, batch, target)
        signed = losses if signs is None else losses * signs
        signed.sum().backward()
    return losses.detach()


@torch.inference_mode()
def stream_activations(
    model: HookedModel,
    batch: Batch,
    sites: Sequence[Site],
    accumulate: Callable[[Site, Tensor], None],
) -> Float[Tensor, " answer"]:
    """Run one forward pass. `accumulate(site, x)` is called once a site, with its neurons or what its matrix reads.

    Returns every answer's mean cross-entropy (nats), in the order of their numbers.
    """

    def on_activation(site: Site) -> Callable[..., None]:
        def hook(activation: Tensor, hook: object) -> None:
            accumulate(site, _by_row(site, activation, batch))

        return hook

    def on_product(site: Site) -> OnProduct:
        def hook(x: Tensor, product: Tensor) -> None:
            accumulate(site, _by_row(site, x, batch))

        return hook

    with _hooked(model, batch, sites, on_activation=on_activation, on_product=on_product):
        logits = forward(model, batch)[0]
        return _answer_losses(logits, batch, batch.target)


def _by_row(site: Site, values: Tensor, batch: Batch) -> Float[Tensor, "batch pos *slot width"]:
    """The values with an axis for rows and one for positions, which some models (OPT) join."""
    if site.is_of_experts:
        return values
    return values.reshape(*batch.tokens.shape, -1)


def sampled_targets(
    logits: Float[Tensor, "answer_token d_vocab"],
    batch: Batch,
) -> Int[Tensor, " answer_token"]:
    """A token drawn from the model's own prediction at each place of an answer.

    The draws of an answer depend on its number alone, so they are the same whatever batch it is in.
    """
    uniform = torch.zeros(len(batch.answer), dtype=torch.float64)
    answers = batch.answer.cpu()
    for answer in answers.unique().tolist():
        is_of_answer = answers == answer
        n_tokens = int(is_of_answer.sum())
        generator = torch.Generator().manual_seed(answer)
        uniform[is_of_answer] = torch.rand(n_tokens, generator=generator, dtype=torch.float64)
    # The first token at which the cumulative probability passes the uniform number (inversion).
    probabilities = logits.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    passed = uniform.to(logits.device)
    token = torch.searchsorted(cumulative, passed[:, None])[:, 0]
    # Rounding may leave the last cumulative probability below the number.
    last_token = logits.shape[-1] - 1
    return token.clamp(max=last_token)


def check_hook_gradients(model: HookedModel, batch: Batch, sites: Sequence[Site]) -> None:
    """Refuse a model whose hook points do not hold what its weights read: compare hook and parameter gradients.

    For a matrix the product over all positions of what it reads and the gradient of what it writes is its gradient. For
    neuron i, which writes row i of `W_out`, the sum over positions of activation times gradient equals
    `sum_j W_out[i, j] * dL/dW_out[i, j]`. Both are exact whenever the weights read what the hook points hold.

    Raises `RuntimeError` where they differ by more than rounding.
    """
    if not sites:
        return
    at_hooks = _effects_at_hooks(model, batch, sites)
    at_parameters = _effects_at_parameters(model, batch, sites)
    for site, expected in at_parameters.items():
        stored, _ = parameter(model, site.matrix)
        tolerance = 1e-4 if stored.dtype == torch.float32 else 5e-2
        difference = (expected - at_hooks[site]).abs().max()
        size = expected.abs().max()
        if difference > tolerance * size + 1e-12:
            hook_point = site.hook_name if site.unit == "neuron" else f"the hook points of {site}"
            raise RuntimeError(
                f"{model.cfg.model_name}: the gradient at {hook_point} does not agree with that of the weight it "
                "feeds; scores of this architecture would be wrong"
            )


def _effects_at_hooks(model: HookedModel, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """From hook points: the sum of activation times gradient of each neuron, the gradient of each matrix."""
    effects: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor, gradient: Tensor) -> None:
        if site.unit == "neuron":
            by_row = effect_of_rows(model, site, x, gradient)
            effects[site] = by_row.sum(0)
        elif site.is_of_experts:
            effects[site] = _of_expert_matrices(model, site, x, gradient)
        else:
            read = x.flatten(0, 1).float()
            written = gradient.flatten(0, 1).float()
            effects[site] = read.T @ written

    stream_gradients(model, batch, sites, keep)
    return effects


def _of_expert_matrices(
    model: HookedModel,
    site: Site,
    x: Float[Tensor, "batch pos slot d_read"],
    gradient: Float[Tensor, "batch pos slot d_written"],
) -> Float[Tensor, "d_in d_out"]:
    """The gradient of all experts' matrices, side by side as in one wide MLP."""
    read = x.flatten(0, 2).float()
    written = gradient.flatten(0, 2).float()
    # An expert that no token was sent to has a gradient of 0.
    n_in = read.shape[1]
    n_out = written.shape[1]
    unseen = read.new_zeros(n_in, n_out)
    blocks = [unseen] * site.n_experts
    for expert, slots in by_expert(routed_ids(model, site)):
        blocks[expert] = read[slots].T @ written[slots]
    side_by_side = 0 if site.part == "experts.out" else 1
    return torch.cat(blocks, side_by_side)


def _effects_at_parameters(model: HookedModel, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The same from the parameters' own gradients."""
    # A site feeds its own matrix, neurons the matrix `out`.
    parameters = [parameter(model, site.matrix) for site in sites]
    with torch.enable_grad(), frozen_parameters(model), answer_positions(model, batch):
        for stored, _ in parameters:
            stored.requires_grad_(True)
        logits = forward(model, batch)[0]
        loss = _answer_losses(logits, batch, batch.target).sum()
        stored_matrices = [stored for stored, _ in parameters]
        gradients = torch.autograd.grad(loss, stored_matrices)
    effects = {}
    for site, gradient, (stored, as_matrix) in zip(sites, gradients, parameters, strict=True):
        if site.unit == "neuron":
            products = stored.detach() * gradient
            effects[site] = as_matrix(products).float().sum(1)
        else:
            effects[site] = as_matrix(gradient).float()
    return effects


def _answer_losses(
    logits: Float[Tensor, "answer_token d_vocab"],
    batch: Batch,
    target: Int[Tensor, " answer_token"],
) -> Float[Tensor, " answer"]:
    """Each answer's mean cross-entropy over its tokens, nats."""
    nats = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
    answers, index, n_tokens = torch.unique(batch.answer, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(answers), device=nats.device)
    return totals.index_add(0, index, nats) / n_tokens


@contextmanager
def _hooked(
    model: HookedModel,
    batch: Batch,
    sites: Sequence[Site],
    *,
    on_activation: Callable[[Site], Callable[..., Tensor | None]],
    on_product: Callable[[Site], OnProduct],
) -> Iterator[None]:
    """While open, passes of the batch run the hooks of all sites and give the logits of its answer tokens."""
    activations = []
    products = {}
    for site in sites:
        if site.unit == "neuron":
            activations.append((site.hook_name, on_activation(site)))
        else:
            products[site] = on_product(site)
    with model.hooks(fwd_hooks=activations), on_products(model, products), answer_positions(model, batch):
        yield


@contextmanager
def frozen_parameters(model: HookedModel) -> Iterator[None]:
    """While open, no parameter requires a gradient. Each gets its own setting back after."""
    # Parameters are noted by module and name: one that was fetched for a pass is another object after it.
    settings = []
    for module in model.modules():
        for name, stored in module._parameters.items():
            if stored is not None:
                settings.append((module, name, stored.requires_grad))
    offloaded_weights = held_once(model) if is_offloaded(model) else nullcontext()
    try:
        for module, name, _ in settings:
            getattr(module, name).requires_grad_(False)
        with offloaded_weights:
            yield
    finally:
        for module, name, requires_grad in settings:
            getattr(module, name).requires_grad_(requires_grad)
