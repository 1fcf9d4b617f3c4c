"""Where units are: sites, and their TransformerLens hook names."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from transformers.pytorch_utils import Conv1D

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel, is_hooked_transformer

PARTS = ("neurons",)


class Site(NamedTuple):
    """A place that holds units: `Site(3, "neurons")` is the `d_mlp` neurons of layer 3."""

    layer: int
    part: str

    def __str__(self) -> str:
        return f"L{self.layer}.{self.part}"

    @property
    def hook_name(self) -> str:
        """The hook point whose activation the site's units are, on both kinds of model."""
        return f"blocks.{self.layer}.mlp.hook_post"


def parse_site(text: str) -> Site:
    """`"L3.neurons"` -> `Site(3, "neurons")`, the inverse of `str`."""
    layer, _, part = text.removeprefix("L").partition(".")
    if not text.startswith("L") or not layer.isdigit() or part not in PARTS:
        raise InputError(f"a site is written L<layer>.<part> with a part of {PARTS}, got {text!r}")
    return Site(int(layer), part)


def neuron_sites(model: HookedModel) -> list[Site]:
    """One site a layer, in order."""
    return [Site(layer, "neurons") for layer in range(model.cfg.n_layers)]


def output_weight(model: HookedModel, layer: int) -> tuple[torch.nn.Parameter, bool]:
    """The parameter that reads the neurons of `layer`, and whether it is stored as `(d_model, d_mlp)`.

    TransformerLens' own `W_out` is `(d_mlp, d_model)`; `nn.Linear` stores the transpose, GPT-2's `Conv1D` does not.
    """
    mlp = model.blocks[layer].mlp
    if is_hooked_transformer(model):
        return mlp.W_out, False
    module = mlp.out.original_component
    return module.weight, not isinstance(module, Conv1D)


def neuron_output_directions(model: HookedModel, layer: int) -> Float[torch.Tensor, "d_mlp d_model"]:
    """`W_out` of a layer: row `i` is what neuron `i` writes to the residual stream per unit of activation."""
    weight, transposed = output_weight(model, layer)
    return weight.T if transposed else weight
