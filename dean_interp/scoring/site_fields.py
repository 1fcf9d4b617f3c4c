"""The fields of scores that hold a tensor for each site, and whether those that a file holds are whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dean_interp.files import is_ascending, is_finite, raise_if_damaged
from dean_interp.models.sites import Site
from dean_interp.scoring.top import Top

PER_SITE = ("activation_mean", "activation_norm", "groups", "slots", "signed", "squared")
"""The fields of `Scores`, beside `values`, that hold a tensor for each site."""
Also = Literal["signed", "squared"]
"""The fields that hold another mean of the effects whose mean (or mean size) the scores are."""


def empty_fields() -> dict[str, dict[Site, Any]]:
    """`values` and the fields of `PER_SITE`, each without a site."""
    return {name: {} for name in ("values", *PER_SITE)}


def in_order(fields: Mapping[str, Mapping[Site, Any]]) -> dict[str, dict[Site, Any]]:
    """The fields with their sites in ascending order."""
    ordered = {}
    for name, by_site in fields.items():
        ordered[name] = dict(sorted(by_site.items()))
    return ordered


def refuse_damaged(
    path: str | Path,
    fields: Mapping[str, Mapping[Site, Any]],
    loss: Tensor,
) -> None:
    """Raise `InputError` where a file's tensors do not fit each other, or hold numbers that are not finite.

    Args:
        path: the file, for the message.
        fields: `values` and the fields of `PER_SITE`, by site.
        loss: the examples' losses.
    """
    values = fields["values"]
    has_scores = bool(values) and _is_scores(loss, 1)
    raise_if_damaged(path, not has_scores, "no scores, or a loss that is not finite")
    for site, value in values.items():
        _refuse_damaged_values(path, site, value)
    for name in PER_SITE:
        for site, tensor in fields[name].items():
            value = values.get(site)
            fits = value is not None and _fits(name, site, tensor, value)
            raise_if_damaged(path, not fits, f"the {name} of {site} are not finite, or not of its units")


def _refuse_damaged_values(path: str | Path, site: Site, value: Tensor | Top) -> None:
    """Raise `InputError` where the scores of a site are not finite, of another shape, or not those of its units."""
    n_axes = 1 if site.unit == "neuron" else 2
    if isinstance(value, Top):
        has_all = len(value.indices) == len(value.values)
        is_in_order = has_all and is_ascending(value.indices, value.numel())
        raise_if_damaged(path, not is_in_order, f"the indices of {site} are not its units in order")
        # What was kept of a matrix lies along one axis.
        is_whole = _is_scores(value.values, n_axes - 1)
    else:
        is_whole = _is_scores(value, n_axes)
    raise_if_damaged(path, not is_whole, f"a score of {site} is not finite, or its shape is another")


def _fits(name: str, site: Site, tensor: Tensor, value: Tensor | Top) -> bool:
    """Whether a tensor of a field is one of a site with these scores."""
    if name in get_args(Also):
        scores = value.values if isinstance(value, Top) else value
        has_shape = tensor.shape == scores.shape
        return has_shape and _is_scores(tensor, scores.dim())
    length = value.shape[0]
    if name == "slots":
        length = site.n_experts
    elif name == "groups" and isinstance(value, Top):
        length = len(value.values)
    n_axes = 2 if name == "groups" else 1
    has_length = tensor.shape[-1:] == (length,)
    return has_length and _is_scores(tensor, n_axes)


def _is_scores(tensor: Tensor, n_axes: int) -> bool:
    """Whether a tensor holds finite floats along so many axes."""
    is_float = tensor.dtype in (torch.float32, torch.float64)
    return is_float and is_finite(tensor, n_axes)
