"""Directions of behaviours in the residual stream: the mean over safe answers minus that over unsafe ones.

The difference in means is that of contrastive activation addition (arXiv 2312.06681, section 3) and of directional
ablation (arXiv 2406.11717, section 2.3). There it is taken at one token; here at all tokens of an answer, whose mean is
what an example counts with.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.arms.answer_statistics import DEPTHS, AnswerStatistics, answer_statistics, layer_at
from dean_interp.arms.arm import ArmExamples
from dean_interp.errors import InputError, NothingToChangeError
from dean_interp.models.sites import residual_hook

_NOTHING = 1e-6
"""A difference that is smaller than this share of the stream's norm is rounding."""


@dataclass(frozen=True)
class MeanDifferences:
    """The directions of both behaviours after one layer, from unsafe to safe."""

    layer: int
    units: Float[Tensor, "behaviour d_model"]
    """The two directions, each of length 1, in float64."""
    norm: float
    """The mean norm of the residual stream over answer tokens, each answer counting equally."""


def mean_differences(examples: ArmExamples, depth: float) -> MeanDifferences:
    """The directions after the layer at `depth` of the model.

    Raises:
        InputError: as `answer_statistics`; a depth at which nothing is read.
        NothingToChangeError: a behaviour whose safe and unsafe answers do not differ there.
    """
    if depth not in DEPTHS:
        raise InputError(f"depth must be one of {DEPTHS}, got {depth}")
    layer = layer_at(examples.model, depth)
    both = answer_statistics(examples, "residual")
    norms = [statistics.of("norm", residual_hook(layer)).flatten() for statistics in both]
    norm = float(torch.cat(norms).double().mean())
    units = []
    for statistics, behaviour in zip(both, examples.scoring, strict=False):
        difference = _difference(statistics, layer)
        length = difference.norm()
        if float(length) <= _NOTHING * norm:
            raise NothingToChangeError(
                f"safe and unsafe answers of '{behaviour.name}' do not differ after layer {layer}"
            )
        units.append(difference / length)
    return MeanDifferences(layer, torch.stack(units), norm)


def _difference(statistics: AnswerStatistics, layer: int) -> Float[Tensor, " d_model"]:
    means = statistics.of("mean", residual_hook(layer)).double()
    safe, unsafe = means.unbind(1)
    return (safe - unsafe).mean(0)
