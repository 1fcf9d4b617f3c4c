"""How differently neurons fire where a safe and where an unsafe answer is predicted: sums, and Cohen's d of them.

Sums have three rows: positions that predict a token of a safe answer, those that predict one of an unsafe answer, and
all positions without padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.sizes import site_shape
from dean_interp.models.tokens import Batch
from dean_interp.scoring.reads import slots_where, summed_where

N_COMPARED = 10
"""A neuron is compared where it is seen at so many tokens of safe answers, and at as many of unsafe ones."""
_STEADY = 1e-6
"""A smaller variance, as a share of the mean square, is rounding of the sums."""


def refuse_few_tokens(behaviour: str, answer_lengths: Sequence[int]) -> None:
    """Raise `InputError` where no neuron can be compared; safe and unsafe answers take turns."""
    n_safe = sum(answer_lengths[::2])
    n_unsafe = sum(answer_lengths[1::2])
    if min(n_safe, n_unsafe) < N_COMPARED:
        raise InputError(
            f"activation_contrast needs {N_COMPARED} tokens of safe and of unsafe answers at least; those of "
            f"'{behaviour}' have {n_safe} and {n_unsafe}"
        )


def contrast_sums(model: HookedModel, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Zeros: sums over positions of safe (row 0) and unsafe answers (row 1) and over all (row 2), and their counts."""
    device = model.cfg.device
    sums = {}
    for site in sites:
        (width,) = site_shape(model, site)
        sums[f"sum/{site}"] = torch.zeros(3, width, device=device)
        sums[f"square/{site}"] = torch.zeros(3, width, device=device)
        sums[f"slots/{site}"] = torch.zeros(3, site.n_experts, device=device)
    return sums


def add_to_contrast(
    model: HookedModel,
    batch: Batch,
    site: Site,
    x: Float[Tensor, "batch pos *slot width"],
    *,
    sums: Mapping[str, Tensor],
) -> None:
    """Add the activations of a site's neurons in a batch to the sums, in place."""
    x = x.to(batch.tokens.device).float()
    safe, unsafe = _answer_positions(batch)
    total = sums[f"sum/{site}"]
    square = sums[f"square/{site}"]
    slots = sums[f"slots/{site}"]
    for row, where in enumerate((safe, unsafe, batch.real)):
        total[row] += summed_where(model, site, x, where)
        square[row] += summed_where(model, site, x.square(), where)
        slots[row] += slots_where(model, site, where) if site.is_of_experts else where.sum()


def _answer_positions(batch: Batch) -> list[Bool[Tensor, "batch pos"]]:
    """Where a token of a safe answer is predicted, and where one of an unsafe answer is."""
    masks = []
    # Safe answers have even numbers.
    for kind in (0, 1):
        is_kind = batch.answer % 2 == kind
        rows = batch.read_row[is_kind]
        positions = batch.read_pos[is_kind]
        mask = torch.zeros_like(batch.real)
        mask[rows, positions] = True
        masks.append(mask)
    return masks


@dataclass(frozen=True)
class AnswerContrast:
    """What the sums say of the neurons of each site, on the CPU."""

    values: Mapping[Site, Float[Tensor, " unit"]]
    """Cohen's d of safe against unsafe answers; 0 where fewer than `N_COMPARED` tokens of a group are seen."""
    means: Mapping[Site, Float[Tensor, " unit"]]
    """The mean activation over all positions."""
    norms: Mapping[Site, Float[Tensor, " unit"]]
    """The root mean square of the activation over all positions."""


def answer_contrast(sites: Sequence[Site], sums: Mapping[str, Tensor]) -> AnswerContrast:
    """Contrast, mean and norm of the neurons of each site, from the sums over all batches."""
    values: dict[Site, Tensor] = {}
    means: dict[Site, Tensor] = {}
    norms: dict[Site, Tensor] = {}
    for site in sites:
        total = sums[f"sum/{site}"]
        square = sums[f"square/{site}"]
        # Of experts each neuron is counted where its expert is.
        units_per_expert = total.shape[1] // site.n_experts
        slots = sums[f"slots/{site}"]
        counts = slots.repeat_interleave(units_per_expert, 1).clamp(min=1)
        # The spread of a few tokens says nothing: a single one has none.
        is_compared = (counts[:2] >= N_COMPARED).all(0)
        contrast = _cohens_d(total[:2], square[:2], counts[:2]) * is_compared
        mean = total[2] / counts[2]
        mean_square = square[2] / counts[2]
        values[site] = contrast.cpu()
        means[site] = mean.cpu()
        norms[site] = mean_square.sqrt().cpu()
    return AnswerContrast(values, means, norms)


def _cohens_d(
    total: Float[Tensor, "2 unit"],
    square: Float[Tensor, "2 unit"],
    counts: Float[Tensor, "2 unit"],
) -> Float[Tensor, " unit"]:
    """The difference of two means, first minus second, in pooled standard deviations, from sums over positions.

    Sums in float32 round the variance of a neuron that hardly varies: it counts as `_STEADY` mean squares at least.
    """
    mean = total / counts
    mean_square = square / counts
    variances = mean_square - mean.square()
    pooled = variances.mean(0).maximum(_STEADY * mean_square.mean(0))
    deviation = pooled.sqrt().clamp(min=1e-12)
    return (mean[0] - mean[1]) / deviation
