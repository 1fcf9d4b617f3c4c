"""Directional ablation: the part along the behaviours' directions is taken out of the residual stream everywhere.

arXiv 2406.11717, section 2.4, equation 4: `x' = x - r r^T x`, at every layer and every position, for the stream before
attention and before the MLP. Here it is taken out of what the first layer reads, of what each layer's attention writes,
and of the stream after each layer: at dose 1 no layer's attention or MLP reads anything along the directions. The two
behaviours' directions go together: an orthonormal basis of their span.

The dose is the share that is taken out at each of these places. It ends at 1, all of it: a larger one would turn the
sign of what a layer wrote anew in every later layer. The shares of all places add up: in a model of 30 layers most is
gone at a dose of 0.1. A direction and its opposite are one ablation, so it does not know which answer is safe: labels
that are flipped in all topics give the same change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.arms.answer_statistics import DEPTHS
from dean_interp.arms.arm import BYTES_OF_NUMBER, ArmExamples, Kind, Setting, Settings
from dean_interp.arms.hooked_change import hooked_state
from dean_interp.arms.mean_differences import mean_differences
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import residual_hook
from dean_interp.models.supported import refuse_missing_hooks
from dean_interp.study.store import State

_PARALLEL = 1e-6
"""A second axis that is shorter is none: the two directions differ by no more than rounding."""


@dataclass(frozen=True)
class AblatedDirections:
    """Directions whose part is taken out of the residual stream of all layers."""

    n_layers: int
    basis: Float[Tensor, "axis d_model"]
    """An orthonormal basis of the directions' span."""
    first_dose: float = 0.01
    largest_dose: float = 1.0

    @property
    def n_bytes(self) -> int:
        """A number is kept of each dimension, for each axis."""
        return BYTES_OF_NUMBER * self.basis.numel()

    def at(self, dose: float) -> State:
        """The model with `dose` times the part along the directions taken out, at every place."""

        def without(model: HookedModel, stream: Tensor) -> Tensor:
            # x' = x - dose * r r^T x, with every axis as an r.
            axes = self.basis.to(stream.device)
            values = stream.float()
            along = values @ axes.T
            removed = dose * along @ axes
            return (values - removed).to(stream)

        maps = dict.fromkeys(_places(self.n_layers), without)
        return hooked_state(maps, {"take out": self.basis}, dose)


@dataclass(frozen=True)
class DirectionalAblation:
    """Taking the differences of means out of the residual stream."""

    name: str = "directional ablation"
    kind: Kind = "residual stream"
    source: str = "arXiv 2406.11717, section 2.4"
    uses_labels: bool = True

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The layer that the directions are read after, as a share of the model's layers."""
        return {"depth": DEPTHS}

    def fit(self, examples: ArmExamples, settings: Settings) -> AblatedDirections:
        """The span of both behaviours' directions.

        Raises `InputError` as `mean_differences` does, and for a model with layers that have no attention.
        """
        n_layers = len(examples.model.blocks)
        refuse_missing_hooks(examples.model, _places(n_layers), self.name)
        directions = mean_differences(examples, float(settings["depth"]))
        return AblatedDirections(n_layers, span(directions.units))


def _places(n_layers: int) -> list[str]:
    """The hook points of all that the residual stream is made of."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.hook_attn_out", residual_hook(layer)]
    return names


def span(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "axis d_model"]:
    """An orthonormal basis of what vectors of length 1 span, in float32; the same for their opposites."""
    _, sizes, axes = torch.linalg.svd(vectors.double(), full_matrices=False)
    is_spanned = sizes > _PARALLEL
    axes = axes[is_spanned]
    # Of an axis and its opposite, the one whose largest number is positive.
    largest = axes.abs().argmax(1, keepdim=True)
    return (axes * axes.gather(1, largest).sign()).to(torch.float32)
