"""Where units are: sites, and their TransformerLens hook names."""

import re
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import Field, PlainValidator
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel

Unit = Literal["neuron", "weight"]
Modules = Literal["mlp", "attention", "all"]
MATRICES: dict[Modules, tuple[str, ...]] = {"mlp": ("gate", "in", "out"), "attention": ("q", "k", "v", "o")}
MATRICES["all"] = MATRICES["mlp"] + MATRICES["attention"]
PARTS = ("neurons", *MATRICES["all"])
_WRITTEN = re.compile(rf"L(0|[1-9][0-9]{{0,5}})\.({'|'.join(PARTS)})")


class Site(NamedTuple):
    """A place that holds units.

    `Site(3, "neurons")` is the `d_mlp` neurons of layer 3; `Site(3, "gate")`, `"in"` and `"out"` are the weights of one
    MLP matrix, `"q"`, `"k"`, `"v"` and `"o"` of one attention matrix, all `(d_in, d_out)`; heads lie side by side.
    """

    layer: int
    part: str

    def __str__(self) -> str:
        return f"L{self.layer}.{self.part}"

    @property
    def unit(self) -> Unit:
        """What kind of unit the site holds."""
        return "neuron" if self.part == "neurons" else "weight"

    @property
    def hook_name(self) -> str:
        """The hook point whose activation a site's neurons are, on both kinds of model."""
        assert self.unit == "neuron", "a matrix has a hook point on each side: see models.matrices"
        return f"blocks.{self.layer}.mlp.hook_post"


def parse_site(text: str) -> Site:
    """`"L3.neurons"` -> `Site(3, "neurons")`, the inverse of `str`."""
    match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise InputError(f"a site is written L<layer>.<part> with a part of {PARTS}, got {text!r:.60}")
    return Site(int(match[1]), match[2])


Size = Annotated[int, Field(gt=0, lt=2**31)]
Shape = tuple[Size] | tuple[Size, Size]
"""The shape of a site, as a file gives it."""
WrittenSite = Annotated[Site, PlainValidator(parse_site)]
"""A site, as a file gives it."""


def coordinates(site: Site, indices: Int[Tensor, " unit"], shape: tuple[int, ...]) -> dict[str, object]:
    """A table's columns for some units of a site: layer, part, and index or (for weights) row and column."""
    axes = ("index",) if len(shape) == 1 else ("row", "column")
    columns = zip(axes, np.unravel_index(indices.cpu().numpy(), shape), strict=True)
    return {"layer": site.layer, "part": site.part, **dict(columns)}


def residual_hook(layer: int) -> str:
    """The hook point of the residual stream after a layer, on both kinds of model."""
    return f"blocks.{layer}.hook_resid_post"


def neuron_sites(model: HookedModel) -> list[Site]:
    """One site a layer, in order."""
    return [Site(layer, "neurons") for layer in range(len(model.blocks))]
