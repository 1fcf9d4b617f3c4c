"""The highest scores of a site: what is kept of a matrix, and which units they are."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site


@dataclass(frozen=True)
class Top:
    """The highest scores of one matrix, by size. No other score of the matrix is larger than `threshold`."""

    shape: tuple[int, ...]
    indices: Int[Tensor, " kept"]
    """Ascending flat indices."""
    values: Float[Tensor, " kept"]
    threshold: float

    def numel(self) -> int:
        """How many units the site has in all."""
        return torch.Size(self.shape).numel()

    def cpu(self) -> "Top":
        """The same in the CPU's memory."""
        indices = self.indices.cpu()
        values = self.values.cpu()
        return replace(self, indices=indices, values=values)


def thinned(
    behaviour: str,
    site: Site,
    value: Float[Tensor, "..."] | Top,
    fraction: float,
) -> Float[Tensor, "..."] | Top:
    """The top `fraction` of a matrix's scores, by size. Scores of neurons, and a top that holds no more, stay.

    Raises `InputError` where a score is NaN.
    """
    if site.unit == "neuron" or fraction == 1:
        return value
    count = max(1, int(fraction * value.numel()))
    is_top = isinstance(value, Top)
    if is_top and count >= len(value.indices):
        return value
    scores = value.values if is_top else value.flatten()
    refuse_nan(behaviour, site, scores)
    chosen = highest(scores.abs(), count)
    kept = scores[chosen]
    return Top(
        shape=tuple(value.shape),
        indices=value.indices[chosen] if is_top else chosen,
        values=kept,
        threshold=float(kept.abs().min()),
    )


def at_kept(
    tensor: Float[Tensor, "..."],
    value: Float[Tensor, "..."] | Top,
    kept: Float[Tensor, "..."] | Top,
) -> Float[Tensor, "..."]:
    """What of a tensor goes with the scores that were kept.

    Args:
        tensor: one number for each of `value`, in its shape (of a top: in its order, along the last axis).
        value: the scores of a site.
        kept: the same, or the highest of them.
    """
    if kept is value or not isinstance(kept, Top):
        return tensor
    if isinstance(value, Top):
        places = torch.searchsorted(value.indices, kept.indices)
        return tensor[..., places]
    return tensor.flatten()[kept.indices]


def refuse_nan(behaviour: str, site: Site, values: Float[Tensor, "..."]) -> None:
    """Raise `InputError` where a score is NaN."""
    if bool(values.isnan().any()):
        raise InputError(f"the scores of {behaviour} are NaN at {site}: nothing can be ranked by them")


def highest(values: Float[Tensor, " unit"], count: int) -> Int[Tensor, " chosen"]:
    """Indices of the `count` highest values, ascending; ties at the threshold go to the lower index."""
    if not count:
        return torch.zeros(0, dtype=torch.int64)
    threshold = values.topk(count).values[-1]
    above = (values > threshold).nonzero()[:, 0]
    tied = (values == threshold).nonzero()[:, 0]
    n_tied = count - len(above)
    chosen = torch.cat([above, tied[:n_tied]])
    return chosen.sort().values


def rounded_up(fraction: float) -> float:
    """A fraction to print: four digits of it, rounded so that it selects no less."""
    exponent = math.floor(math.log10(fraction))
    scale = 10 ** (3 - exponent)
    # A product that is a whole number but for the rounding of floats stays that number.
    scaled = fraction * scale * (1 - 1e-12)
    return math.ceil(scaled) / scale
