"""The tensors of a model in memory that an edit changes, in the checkpoint's layout: views that can be written to."""

from collections.abc import Iterator

from torch import Tensor

from dean_interp.editing.edit import Edit
from dean_interp.editing.row_scaling import AnyChange
from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import bias, parameter
from dean_interp.models.own_matrices import OwnMatrices, own_matrices
from dean_interp.models.sites import Site


def stored_views(model: HookedModel, edit: Edit) -> Iterator[tuple[AnyChange, Tensor]]:
    """Each change with the model's tensor in the checkpoint's layout, as a view that can be written to."""
    matrices: OwnMatrices | None = None
    for change in edit.changes.values():
        if change.is_bias:
            yield change, _existing_bias(model, change)
            continue
        # The changes of a layer's experts follow each other: what is offloaded is fetched once for all of them.
        if matrices is None or matrices.site != change.site:
            matrices = own_matrices(model, change.site)
        matrix = matrices.of(change.expert)
        yield change, matrix.t() if change.is_transposed else matrix


def refuse_copy(model: HookedModel, site: Site, view: Tensor) -> None:
    """Raise `InputError` where a change would be written into a copy, and the model would stay as it is."""
    stored, _ = parameter(model, site)
    if view.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        raise InputError(
            f"{site} of this {adapter_of(model).kind} is kept in another layout, into which no edit is written: load "
            "the model without hooked_transformer"
        )


def _existing_bias(model: HookedModel, change: AnyChange) -> Tensor:
    tensor = bias(model, change.site)
    if tensor is None:
        raise InputError(f"{model.cfg.model_name} has no bias at {change.site}, which this edit changes")
    return tensor
