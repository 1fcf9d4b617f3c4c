"""Weights that are taken out by hooks: what an ablation makes of them, and what subtracts their part of a product."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.editing.ablated_positions import Positions, is_ablated
from dean_interp.editing.values import Value, new_weights
from dean_interp.errors import InputError
from dean_interp.models.experts import by_expert
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import OnProduct, weight
from dean_interp.models.neurons import routed_ids
from dean_interp.models.notes import AblatedWeights, WeightChange
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection


def weight_changes(
    model: HookedModel,
    selection: Selection,
    *,
    value: Value,
    positions: Positions,
    outer: AblatedWeights,
) -> dict[Site, WeightChange]:
    """What an ablation makes of the selected weights of each matrix."""
    changes = {}
    for site, units in selection.units.items():
        if site.unit == "weight" and len(units):
            _refuse_router(site)
            new = new_weights(value, model, site, units)
            old = _current_weights(model, site, units, outer=outer, positions=positions)
            changes[site] = WeightChange(units, old, new)
    return changes


def _refuse_router(site: Site) -> None:
    if site.part == "router":
        raise InputError(
            "weights of a router cannot be ablated by hooks, since tokens are sent to experts before its product can "
            "be changed: write the change into the model (create_edit), or silence experts"
        )


def remover(
    model: HookedModel,
    site: Site,
    change: WeightChange,
    positions: Positions,
) -> OnProduct:
    """A hook that subtracts `x[..., i] * (old - new)` of the given weights from the product.

    The chosen weights lie in a block of the rows and columns that hold any, zero elsewhere. A few weights make a small
    block; where it would be most of the matrix, the matrix itself costs no more.
    """
    matrix = weight(model, site).detach()
    units = change.units.to(matrix.device)
    rows = units // matrix.shape[1]
    columns = units % matrix.shape[1]
    excess = torch.zeros_like(matrix)
    excess[rows, columns] = (change.old - change.new).to(matrix)
    if site.is_of_experts:
        return _expert_remover(model, site, excess, positions)
    rows = rows.unique()
    columns = columns.unique()
    is_large = 2 * len(rows) * len(columns) > matrix.numel()
    block = excess if is_large else excess[rows][:, columns].clone()

    def remove(x: Tensor, product: Tensor) -> Tensor:
        if positions != "all":
            here = is_ablated(model, x, positions)
            x = x * here[..., None]
        if is_large:
            return product - x @ block.to(x.device)
        x_of_rows = x.index_select(-1, rows.to(x.device))
        removed = x_of_rows @ block.to(x.device)
        # index_copy is several times faster over many positions than index_add.
        written = columns.to(product.device)
        rest = product.index_select(-1, written) - removed
        return product.index_copy(-1, written, rest)

    return remove


def joined(outer: WeightChange | None, inner: WeightChange) -> WeightChange:
    """The changes of two nested ablations; where both change a weight the inner one counts."""
    if outer is None:
        return inner
    only_outer = ~torch.isin(outer.units, inner.units)
    units = torch.cat([outer.units[only_outer], inner.units])
    order = units.argsort()
    old = torch.cat([outer.old[only_outer], inner.old])
    new = torch.cat([outer.new[only_outer], inner.new])
    return WeightChange(units[order], old[order], new[order])


def _expert_remover(
    model: HookedModel,
    site: Site,
    excess: Float[Tensor, "d_in d_out"],
    positions: Positions,
) -> OnProduct:
    """The same for the matrices of routed experts, which lie side by side in `excess`."""
    axis = 0 if site.part == "experts.out" else 1
    blocks = excess.chunk(site.n_experts, axis)
    changed = {expert: block.clone() for expert, block in enumerate(blocks) if bool(block.any())}

    def remove(x: Tensor, product: Tensor) -> Tensor:
        if positions != "all":
            here = is_ablated(model, x[:, :, 0], positions)
            x = x * here[..., None, None]
        # One row a slot: what an expert reads and writes for one token.
        read = x.flatten(0, 2)
        written = product.flatten(0, 2).clone()
        for expert, slots in by_expert(routed_ids(model, site)):
            if expert in changed:
                block = changed[expert].to(read.device)
                written[slots] -= read[slots] @ block
        return written.reshape(product.shape)

    return remove


def _current_weights(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
    *,
    outer: AblatedWeights,
    positions: Positions,
) -> Float[Tensor, " unit"]:
    """What the weights are under the ablations that are open already."""
    matrix = weight(model, site).detach()
    rows = units // matrix.shape[1]
    columns = units % matrix.shape[1]
    current = matrix[rows, columns].clone()
    for (changed_site, changed_positions), change in outer.items():
        if changed_site != site:
            continue
        is_changed = torch.isin(units, change.units)
        if not is_changed.any():
            continue
        if changed_positions != positions:
            raise InputError(
                f"some of these weights of {site} are ablated at positions={changed_positions!r} already: nest alike"
            )
        places = torch.searchsorted(change.units, units[is_changed])
        current[is_changed] = change.new[places].to(current)
    return current
