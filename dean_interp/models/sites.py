"""Where units are: sites, and their TransformerLens hook names."""

import re
from operator import index
from typing import Annotated, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int
from pydantic import Field, PlainValidator
from torch import Tensor

from dean_interp.errors import InputError, did_you_mean

Unit = Literal["neuron", "weight"]
Modules = Literal["mlp", "attention", "all", "router"]
"""Whose matrices: of MLPs (in a mixture of all experts), of attention, of both, or of what sends tokens to experts."""
NEURONS = ("neurons", "experts", "shared")
"""Parts that hold neurons: of a dense MLP, of a layer's routed experts, of the expert of every token."""
MATRICES: dict[Modules, tuple[str, ...]] = {
    "mlp": (
        *("gate", "in", "out"),
        *("experts.gate", "experts.in", "experts.out"),
        *("shared.gate", "shared.in", "shared.out"),
    ),
    "attention": ("q", "k", "v", "o"),
    "router": ("router",),
}
MATRICES["all"] = MATRICES["mlp"] + MATRICES["attention"]
PARTS = (*NEURONS, *MATRICES["all"], *MATRICES["router"])
_HOOKS = {"neurons": "hook_post", "experts": "hook_expert_post", "shared": "hook_shared_post"}
_WRITTEN = re.compile(rf"L(0|[1-9][0-9]{{0,5}})\.({'|'.join(PARTS)})(?::([1-9][0-9]{{0,5}}))?")


class _SiteFields(NamedTuple):
    layer: int
    part: str
    n_experts: int = 1


class Site(_SiteFields):
    """A place that holds units.

    `Site(3, "neurons")` is the `d_mlp` neurons of layer 3; `Site(3, "gate")`, `"in"` and `"out"` are the weights of one
    MLP matrix, `"q"`, `"k"`, `"v"` and `"o"` of one attention matrix, all `(d_in, d_out)`; heads lie side by side.

    In a mixture `Site(3, "experts", 8)` is the neurons of the 8 routed experts of layer 3, counted expert by expert,
    and `"experts.gate"`, `"experts.in"`, `"experts.out"` are their weights: the experts of a layer are one wide MLP, of
    whose neurons each token has some. `"shared"` is the expert of every token. `"router"` is the matrix that sends
    tokens to experts, `(d_model, n_experts)`: column `e` is what makes expert `e` likely.
    """

    __slots__ = ()

    def __new__(cls, layer: SupportsIndex, part: str, n_experts: int = 1) -> "Site":
        """A place in a layer.

        Args:
            layer: its number, from 0; an integer of numpy or pandas, too.
            part: the kind of place: one of `PARTS`.
            n_experts: the number of routed experts that share the site's units equally; 1 where there are none.

        Raises:
            InputError: a part that does not exist.
        """
        if part not in PARTS:
            raise InputError(f"no part of a layer is named {part!r}{did_you_mean(str(part), PARTS)}: parts are {PARTS}")
        return super().__new__(cls, index(layer), part, n_experts)

    def __str__(self) -> str:
        if self.is_of_experts:
            return f"L{self.layer}.{self.part}:{self.n_experts}"
        return f"L{self.layer}.{self.part}"

    @property
    def unit(self) -> Unit:
        """What kind of unit the site holds."""
        return "neuron" if self.part in NEURONS else "weight"

    @property
    def is_of_experts(self) -> bool:
        """Whether the units belong to routed experts, so that a token has only some of them."""
        return self.part.partition(".")[0] == "experts"

    @property
    def out(self) -> "Site":
        """The matrix that a site's neurons feed. Its row `i` is what neuron `i` writes."""
        part = "out" if self.part == "neurons" else f"{self.part}.out"
        return self._replace(part=part)

    @property
    def matrix(self) -> "Site":
        """The matrix that holds a site's units: itself, or the one that its neurons feed."""
        return self if self.unit == "weight" else self.out

    @property
    def neurons(self) -> "Site":
        """The neurons that an MLP matrix makes, or that it reads."""
        prefix, dot, _ = self.part.rpartition(".")
        return self._replace(part=prefix if dot else "neurons")

    @property
    def hook_name(self) -> str:
        """The hook point whose activation a site's neurons are, on both kinds of model."""
        assert self.unit == "neuron", "a matrix has a hook point on each side: see models.matrices"
        return f"blocks.{self.layer}.mlp.{_HOOKS[self.part]}"

    @property
    def ids_hook_name(self) -> str:
        """The hook point that says which of the routed experts a token was sent to."""
        return f"blocks.{self.layer}.mlp.hook_expert_ids"


def parse_site(text: str) -> Site:
    """`"L3.neurons"` -> `Site(3, "neurons")`, the inverse of `str`."""
    match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
    if match:
        layer, part, n_experts = match.groups()
        has_number = n_experts is not None
        if has_number == part.startswith("experts"):
            return Site(int(layer), part, int(n_experts or 1))
    raise InputError(
        f"a site is written L<layer>.<part> with a part of {PARTS}, and behind that of experts : and their number; "
        f"got {text!r:.60}"
    )


Size = Annotated[int, Field(gt=0, lt=2**31)]
Shape = tuple[Size] | tuple[Size, Size]
"""The shape of a site, as a file gives it."""
WrittenSite = Annotated[Site, PlainValidator(parse_site)]
"""A site, as a file gives it."""


def coordinates(site: Site, indices: Int[Tensor, " unit"], shape: tuple[int, ...]) -> dict[str, object]:
    """A table's columns for some units of a site: layer, part, and index, expert and index, or row and column."""
    if site.unit == "weight":
        axes = ("row", "column")
    elif site.is_of_experts:
        axes = ("expert", "index")
        shape = (site.n_experts, shape[0] // site.n_experts)
    else:
        axes = ("index",)
    places = np.unravel_index(indices.cpu().numpy(), shape)
    columns = dict(zip(axes, places, strict=True))
    return {"layer": site.layer, "part": site.part, **columns}


def residual_hook(layer: int) -> str:
    """The hook point of the residual stream after a layer, on both kinds of model."""
    return f"blocks.{layer}.hook_resid_post"
