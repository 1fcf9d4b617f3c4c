"""What an edit must not do: break the model, or silence a super weight.

A **super weight** (arXiv 2411.07191) is a single weight of an MLP's `out` without which a language model loses its
mind. It shows itself in one forward pass: one neuron's activation and one output channel are far larger than all
others, and their weight accounts for the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.models.experts import by_expert
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites, on_products, weight
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neurons import routed_ids
from dean_interp.models.sites import Site
from dean_interp.models.templates import text_ids
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.selection.selection import Selection

PERPLEXITY_LIMIT = 1.2
"""Times the original's perplexity on general text."""
# an activation or output is a spike from so many times the median over neurons, or channels, of their largest size
_SPIKE = 100.0
# the share of the output that the one weight must account for
_SHARE = 0.5
# any text does; this is the paper's
_TEXT = "Apple Inc. is a worldwide tech company."


@dataclass(frozen=True)
class SuperWeight:
    """One weight of `out`: from a neuron to a channel of the residual stream."""

    site: Site
    """The matrix."""
    neuron: int
    """Its row: of routed experts counted expert by expert."""
    channel: int
    activation: float
    output: float

    @property
    def layer(self) -> int:
        """The matrix's layer."""
        return self.site.layer

    def __str__(self) -> str:
        return f"{self.site}[{self.neuron}, {self.channel}]"


@own_torch_settings()
@torch.inference_mode()
def super_weights(model: HookedModel, text: str = _TEXT) -> list[SuperWeight]:
    """Weights of `out` that one huge activation turns into one huge output, at most one a matrix.

    There is one where the largest activation and the largest output are each 100 times the median over neurons and
    channels of their largest size, and the product of activation and weight is at least half of the output. Of routed
    experts those count that the text reaches, with what they write before the router's weight.
    """
    ids = text_ids(native_tokenizer(model), text)
    tokens = torch.tensor([ids], device=model.cfg.device)
    weights: list[SuperWeight] = []

    def look(site: Site, x: Tensor, product: Tensor) -> None:
        inputs = x.reshape(-1, x.shape[-1]).float()
        outputs = product.reshape(-1, product.shape[-1]).float()
        # the largest output, and the largest activation at its position
        n_channels = outputs.shape[1]
        position, channel = divmod(int(outputs.abs().argmax()), n_channels)
        neuron = int(inputs[position].abs().argmax())
        activation = inputs[position, neuron]
        output = outputs[position, channel]
        input_sizes = inputs.abs().amax(0)
        output_sizes = outputs.abs().amax(0)
        if site.is_of_experts:
            # a position is a slot, whose expert has neurons of its own
            experts = routed_ids(model, site.neurons)
            expert = int(experts.flatten()[position])
            neuron += expert * inputs.shape[1]
            input_sizes = torch.cat([inputs[slots].abs().amax(0) for _, slots in by_expert(experts)])
        both_are_spikes = _is_spike(activation, input_sizes) and _is_spike(output, output_sizes)
        matrix = weight(model, site).detach()
        carried = activation * matrix[neuron, channel].float()
        if both_are_spikes and carried / output > _SHARE:
            super_weight = SuperWeight(
                site=site,
                neuron=neuron,
                channel=channel,
                activation=float(activation),
                output=float(output),
            )
            weights.append(super_weight)

    looks = {site.out: partial(look, site.out) for site in neuron_sites(model)}
    with on_products(model, looks):
        model(tokens, return_type="logits")
    return weights


def held_super_weights(selection: Selection, known: Sequence[SuperWeight]) -> list[SuperWeight]:
    """Those that a selection holds, as weights or by their neuron."""
    return [super_weight for super_weight in known if _holds(selection, super_weight)]


def _holds(selection: Selection, super_weight: SuperWeight) -> bool:
    out = super_weight.site
    neurons = out.neurons
    if out in selection.shapes:
        # a weight's index counts its matrix row by row
        n_channels = selection.shapes[out][1]
        index = super_weight.neuron * n_channels + super_weight.channel
        return index in selection.units[out]
    return neurons in selection.shapes and super_weight.neuron in selection.units[neurons]


def _is_spike(value: Tensor, sizes: Float[Tensor, " column"]) -> bool:
    """Whether a value is far larger than the median over columns of their largest size."""
    return bool(value.abs() > _SPIKE * sizes.median())
