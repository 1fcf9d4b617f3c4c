"""Edits of a model in memory: made from what an ablation would do, written in, taken out again bit by bit."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.editing.ablation import refuse_foreign, weights_that_make
from dean_interp.editing.edit import (
    Edit,
    EditState,
    TensorChange,
    entries,
    joint_edit_state,
    refuse_state,
    tensor_hash,
    tensor_state,
)
from dean_interp.editing.values import Mean, Restore, Scale, Value, Zero, described, new_weights
from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel, versions
from dean_interp.models.matrices import bias, stored_name, weight
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site
from dean_interp.selection.selection import Selection


def create_edit(model: HookedModel, selection: Selection, *, value: Value = Zero()) -> Edit:  # noqa: B008 - frozen
    """The edit that does to the weights what `ablate(model, selection, value=value)` does by hooks.

    Neurons are silenced or scaled by their rows of `out`. Their means go into the bias of `out`.

    Raises:
        InputError: a value that weights cannot hold (noise, resampling, a projection), means without a bias to carry
            them, a selection that is empty or of another model, a `HookedTransformer` (no checkpoint's tensors).
    """
    if not adapter_of(model).wraps_checkpoint:
        raise InputError("an edit is made from a checkpoint's own tensors: load the model without hooked_transformer")
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to edit")
    refuse_foreign(model, selection)
    if isinstance(value, Restore):
        selection = weights_that_make(model, selection, value.other)
    changes: dict[str, TensorChange] = {}
    for site, units in selection.units.items():
        if not len(units):
            continue
        if site.unit == "weight":
            changes |= _change(model, site, units, new_weights(value, model, site, units))
            continue
        if not isinstance(value, Zero | Scale | Mean):
            raise InputError(f"weights cannot do what {type(value).__name__} does to neurons; Zero, Scale, Mean and "
                             "Restore can be written into a checkpoint")  # fmt: skip
        out = Site(site.layer, "out")
        rows = weight(model, out).detach()[units]
        n_columns = rows.shape[1]
        flat = (units[:, None] * n_columns + torch.arange(n_columns)).flatten()
        changes |= _change(model, out, flat, (rows * (value.alpha if isinstance(value, Scale) else 0.0)).flatten())
        if isinstance(value, Mean):
            changes |= _carried(model, out, value.scores.activation_mean[site][units].to(rows) @ rows)
    name = str(model.cfg.model_name)
    facts = {
        "model": Path(name).name if Path(name).is_dir() else name,  # not where a folder lies on this machine
        "architecture": type(model.original_model).__name__,
        "units": {str(site): n for site, n in selection.counts().items() if n},
        "selection": selection.fingerprint,
        "value": described(value),
        "prompt_hashes": sorted(selection.prompt_hashes),
        "versions": versions(),
    }
    return Edit(changes, facts)


def apply_edit(model: HookedModel, edit: Edit) -> None:
    """Write an edit into a model in memory: a bridge, or a `HookedTransformer` of the same raw weights.

    Raises `InputError`, before anything is changed, where the edit is of another model or there already.
    """
    _write(model, edit, expected="base")


def revert_edit(model: HookedModel, edit: Edit) -> None:
    """Take an edit out of a model again, bit by bit.

    Raises `InputError`, before anything is changed, where the model does not hold the edit.
    """
    _write(model, edit, expected="edited")


def edit_state(model: HookedModel, edit: Edit) -> EditState:
    """Whether a model is the edit's base, holds the edit, or is something else."""
    return joint_edit_state([tensor_state(_held(model, change), change) for change in edit.changes.values()])


def _write(model: HookedModel, edit: Edit, *, expected: EditState) -> None:
    refuse_offloaded(model, "writing an edit into a model in memory (a checkpoint folder is edited without loading it)")
    held = {name: _held(model, change) for name, change in edit.changes.items()}
    state = joint_edit_state([tensor_state(held[name], change) for name, change in edit.changes.items()])
    refuse_state(state, expected, edit, str(model.cfg.model_name))
    with torch.no_grad():
        for name, change in edit.changes.items():
            values = change.new if expected == "base" else change.old
            held[name][entries(change)] = values.to(held[name])


def _held(model: HookedModel, change: TensorChange) -> Tensor:
    """The model's tensor in the checkpoint's layout, as a view that can be written to."""
    if change.is_bias:
        held = bias(model, change.site)
        if held is None:
            raise InputError(f"{model.cfg.model_name} has no bias at {change.site}, which this edit changes")
        return held
    matrix = weight(model, change.site)
    return matrix.t() if change.is_transposed else matrix


def _change(model: HookedModel, site: Site, units: Tensor, new: Tensor) -> dict[str, TensorChange]:
    """The change of some entries of a matrix, given as flat indices of `(d_in, d_out)`."""
    name, is_transposed = stored_name(model, site)
    matrix = weight(model, site).detach()
    rows, columns = units // matrix.shape[1], units % matrix.shape[1]
    old = matrix[rows, columns]
    stored = matrix.t() if is_transposed else matrix
    indices = columns * stored.shape[1] + rows if is_transposed else units
    order = indices.argsort()
    return {name: TensorChange(site, False, is_transposed, tuple(stored.shape), indices[order], old[order].cpu(),
                         new[order].to(old).cpu(), tensor_hash(stored))}  # fmt: skip


def _carried(model: HookedModel, site: Site, added: Float[Tensor, " d_model"]) -> dict[str, TensorChange]:
    """The bias of a matrix with what the silenced neurons' means wrote."""
    held = bias(model, site)
    if held is None:
        raise InputError(
            f"mean ablation writes the means into the bias of '{site.part}', which {model.cfg.model_name} does not "
            "have: use zero, or ablate by hooks"
        )
    name = stored_name(model, site)[0].removesuffix("weight") + "bias"
    held = held.detach()
    return {name: TensorChange(site, True, False, tuple(held.shape), torch.arange(len(held)), held.cpu().clone(),
                         (held + added).cpu(), tensor_hash(held))}  # fmt: skip
