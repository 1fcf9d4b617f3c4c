"""What an edit must not do: break the model, or silence one of the few weights that it stands on.

A **super weight** (arXiv 2411.07191) is a single weight of an MLP's `out` without which a language model loses its
mind. It shows itself in one forward pass: one neuron's activation and one output channel are far larger than all
others, and their weight accounts for the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.matrices import on_products, weight
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection

PERPLEXITY_LIMIT = 1.2
"""Times the original's perplexity on general text."""
_SPIKE = 100.0  # times the median over neurons, or channels, of their largest size
_SHARE = 0.5  # of the output that the one weight must account for
_TEXT = "Apple Inc. is a worldwide tech company."  # any text does; this is the paper's


@dataclass(frozen=True)
class SuperWeight:
    """One weight of `out`: from a neuron to a channel of the residual stream."""

    layer: int
    neuron: int
    channel: int
    activation: float
    output: float

    def __str__(self) -> str:
        return f"L{self.layer}.out[{self.neuron}, {self.channel}]"


@torch.inference_mode()
def super_weights(model: HookedModel, text: str = _TEXT) -> list[SuperWeight]:
    """Weights of `out` that one huge activation turns into one huge output, at most one a layer.

    A layer has one where its largest activation and its largest output are each 100 times the median over neurons and
    channels of their largest size, and the product of activation and weight is at least half of the output.
    """
    tokens = torch.tensor([native_tokenizer(model)(text).input_ids], device=model.cfg.device)
    found: list[SuperWeight] = []

    def look(site: Site, x: Tensor, product: Tensor) -> None:
        x, product = x.reshape(-1, x.shape[-1]).float(), product.reshape(-1, product.shape[-1]).float()
        place, channel = divmod(int(product.abs().argmax()), product.shape[1])
        neuron = int(x[place].abs().argmax())
        activation, output = x[place, neuron], product[place, channel]
        carried = activation * weight(model, site).detach()[neuron, channel].float()
        spikes = [value.abs() > _SPIKE * sizes.abs().amax(0).median() for value, sizes in
                  ((activation, x), (output, product))]  # fmt: skip
        if all(spikes) and carried / output > _SHARE:
            found.append(SuperWeight(site.layer, neuron, channel, float(activation), float(output)))

    sites = [Site(layer, "out") for layer in range(model.cfg.n_layers)]
    with on_products(model, {site: lambda x, product, site=site: look(site, x, product) for site in sites}):
        model(tokens, return_type="logits")
    return found


def held_super_weights(selection: Selection, known: Sequence[SuperWeight]) -> list[SuperWeight]:
    """Those that a selection holds, as weights or by their neuron."""
    held = []
    for one in known:
        out, neurons = Site(one.layer, "out"), Site(one.layer, "neurons")
        if out in selection.shapes:
            flat = one.neuron * selection.shapes[out][1] + one.channel
            held += [one] if flat in selection.units[out] else []
        elif neurons in selection.shapes and one.neuron in selection.units[neurons]:
            held.append(one)
    return held
