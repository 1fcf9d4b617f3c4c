"""Each expert's own matrices, as views: what edits are made of, and written into.

The experts of a layer are one wide MLP, whose matrices can only be shown as copies of their stacks (`models.matrices`).
The matrix of a single expert is a view of its stack. So nothing as large as a stack is copied here, and what is written
into an expert's matrix is in the model. A dense matrix is the only one of its site, and its expert is None.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.experts import RoutedExperts, by_expert, routed_experts
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import parameter, weight
from dean_interp.models.sites import Site


@dataclass(frozen=True)
class OwnMatrices:
    """The matrices of a site: one an expert, or the only one."""

    site: Site
    values: Tensor
    """The stack of all experts as it is stored, or the dense matrix, `(d_in, d_out)`."""
    experts: RoutedExperts | None

    def of(self, expert: int | None) -> Float[Tensor, "d_in d_out"]:
        """The matrix of an expert: a view of the parameter, or of its copy on the CPU where it is offloaded."""
        if self.experts is None or expert is None:
            return self.values
        return self.experts.own_matrix(_part(self.site), self.values, expert)

    def split(
        self,
        units: Int[Tensor, " unit"],
    ) -> Iterator[tuple[int | None, Tensor, Tensor]]:
        """Flat indices of the site by expert: the expert, their places in `units`, and what they are in its matrix."""
        if self.experts is None:
            yield None, torch.arange(len(units)), units
            return
        n_in, n_out = self.of(0).shape
        if self.site == self.site.neurons.out:
            # The experts' matrices stand one below the other.
            size = n_in * n_out
            owners = units // size
            own = units % size
        else:
            # They stand side by side.
            width = n_out * self.site.n_experts
            rows = units // width
            columns = units % width
            owners = columns // n_out
            own = rows * n_out + columns % n_out
        for expert, places in by_expert(owners):
            yield expert, places, own[places]

    def name(self, expert: int | None, tensor: str) -> str:
        """What an edit calls the matrix of an expert, which lies in the checkpoint's tensor of a name.

        It says which part it is where `gate` and `in` share the stack: `model.layers.1.mlp.experts.gate_up_proj[5].in`.
        """
        if self.experts is None or expert is None:
            return tensor
        part = _part(self.site)
        is_shared = part != "out" and "gate" in self.experts.parts
        if is_shared:
            return f"{tensor}[{expert}].{part}"
        return f"{tensor}[{expert}]"


def own_matrices(model: HookedModel, site: Site) -> OwnMatrices:
    """The matrices of a site. Raises `InputError` where the model has no such experts, or another number of them."""
    n_layers = len(model.blocks)
    if not 0 <= site.layer < n_layers:
        raise InputError(f"{model.cfg.model_name} has {n_layers} layers, and no {site}")
    if not site.is_of_experts:
        return OwnMatrices(site, weight(model, site), None)
    stored, _ = parameter(model, site)
    experts = routed_experts(model, site.layer)
    n_experts = experts.n_experts if experts else 0
    if experts is None or n_experts != site.n_experts:
        raise InputError(f"layer {site.layer} of {model.cfg.model_name} has {n_experts} routed experts, and no {site}")
    values = adapter_of(model).values(site) if stored.is_meta else stored
    return OwnMatrices(site, values.detach(), experts)


def entries(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
) -> Float[Tensor, " unit"]:
    """Some weights of a site, by their flat indices in `(d_in, d_out)`."""
    matrices = own_matrices(model, site)
    values = matrices.values.detach().new_empty(len(units))
    for expert, places, own in matrices.split(units):
        matrix = matrices.of(expert).detach()
        n_out = matrix.shape[1]
        row = own // n_out
        column = own % n_out
        values[places] = matrix[row, column]
    return values


def units_of_expert(
    site: Site,
    expert: int | None,
    own: Int[Tensor, " unit"],
    shape: tuple[int, int],
) -> Int[Tensor, " unit"]:
    """Flat indices of an expert's own matrix, `(d_in, d_out)`, as its site counts them: the inverse of `split`."""
    if expert is None:
        return own
    n_in, n_out = shape
    if site == site.neurons.out:
        return expert * n_in * n_out + own
    row = own // n_out
    column = own % n_out
    return (row * site.n_experts + expert) * n_out + column


def shape_of_all(site: Site, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of a site whose experts have matrices of a shape, `(d_in, d_out)`."""
    n_in, n_out = shape
    if site == site.neurons.out:
        return n_in * site.n_experts, n_out
    return n_in, n_out * site.n_experts


def _part(site: Site) -> str:
    """Which of an expert's matrices a site is: `gate`, `in` or `out`."""
    return site.part.removeprefix("experts.")
