"""Edits of a model in memory: made from an ablation, written into the weights, and taken out again bit by bit."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.editing.ablation import refuse_foreign, weights_that_make
from dean_interp.editing.edit import Edit, joint_edit_state, refuse_state
from dean_interp.editing.row_scaling import AnyChange, RowScaling
from dean_interp.editing.scaling_rows import row_scaling
from dean_interp.editing.stored_views import refuse_copy, stored_views
from dean_interp.editing.tensor_change import EditState, TensorChange, refuse_not_finite, tensor_hash
from dean_interp.editing.value_names import described
from dean_interp.editing.values import Mean, Multiply, Restore, Scale, Value, Zero, at_site, new_weights
from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel, versions
from dean_interp.models.matrices import bias, shape, stored_name
from dean_interp.models.notes import notes
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.own_matrices import entries, own_matrices
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection


@own_torch_settings()
def create_edit(model: HookedModel, selection: Selection, *, value: Value = Zero()) -> Edit:  # noqa: B008 - frozen
    """The edit that does to the weights what `ablate(model, selection, value=value)` does by hooks.

    Neurons are silenced, scaled or gated by their rows of `out`. Their means go into the bias of `out`. Of routed
    experts each has changes of its own.

    Raises:
        InputError: a value that weights cannot hold (noise, resampling, a projection), means without a bias to carry
            them (none carries those of routed experts), a value that makes a weight too large for the checkpoint's
            number format, a selection that is empty or of another model, a `HookedTransformer` (no checkpoint's
            tensors).
    """
    if not adapter_of(model).wraps_checkpoint:
        raise InputError("an edit is made from a checkpoint's own tensors: load the model without hooked_transformer")
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to edit")
    refuse_foreign(model, selection)
    if isinstance(value, Restore):
        selection = weights_that_make(model, selection, value.other)
    changes: dict[str, AnyChange] = {}
    for site, units in selection.units.items():
        if not len(units):
            continue
        if site.unit == "weight":
            new = new_weights(value, model, site, units)
            changes |= _weight_changes(model, site, units, new)
        elif isinstance(value, Multiply):
            changes |= _row_scalings(model, site, units, value.gates)
        else:
            changes |= _neuron_changes(model, site, units, value)
    name = str(model.cfg.model_name)
    # A folder's name, and not where it lies on this machine.
    if Path(name).is_dir():
        name = Path(name).name
    facts = {
        "model": name,
        "architecture": type(model.original_model).__name__,
        "units": {str(site): n for site, n in selection.counts().items() if n},
        "selection": selection.fingerprint,
        "value": described(value),
        "prompt_hashes": sorted(selection.prompt_hashes),
        "versions": versions(),
    }
    return Edit(changes, facts)


@own_torch_settings()
def create_gates_edit(model: HookedModel, gates: Gates) -> Edit:
    """The edit that does to the weights what `gated(model, gates)` does by hooks, rounded to the checkpoint's format.

    Its file takes one bit a number that changes. Raises `InputError` as `create_edit` does.
    """
    return create_edit(model, gates.selection, value=Multiply(gates))


@own_torch_settings()
def apply_edit(model: HookedModel, edit: Edit) -> None:
    """Write an edit into a model in memory: a bridge, or a `HookedTransformer` of the same raw weights.

    Until it is taken out, `measure` refuses the prompts that the edit was made from. Where it is interrupted, it puts
    back what it changed. Raises `InputError`, before anything is changed, where the edit is of another model or there.
    """
    _write(model, edit, expected="base")
    notes(model).edited_by.append(frozenset(edit.facts["prompt_hashes"]))


@own_torch_settings()
def revert_edit(model: HookedModel, edit: Edit) -> None:
    """Take an edit out of a model again, bit by bit.

    Where it is interrupted, the model holds the edit as before. Raises `InputError`, before anything is changed, where
    the model does not hold the edit.
    """
    _write(model, edit, expected="edited")
    with suppress(ValueError):  # of a model from an edited folder nothing is noted
        notes(model).edited_by.remove(frozenset(edit.facts["prompt_hashes"]))


def edit_state(model: HookedModel, edit: Edit) -> EditState:
    """Whether a model is the edit's base, holds the edit, or is something else.

    Raises `InputError` where the model has no such tensors.
    """
    states: list[EditState] = [change.state(view) for change, view in stored_views(model, edit)]
    return joint_edit_state(states)


def _write(model: HookedModel, edit: Edit, *, expected: EditState) -> None:
    """Write an edit's other values into a model whose state is `expected`."""
    refuse_offloaded(model, "writing an edit into a model in memory (a checkpoint folder is edited without loading it)")
    state = edit_state(model, edit)
    refuse_state(state, expected, edit, str(model.cfg.model_name))
    for change, view in stored_views(model, edit):
        if not change.is_bias:
            refuse_copy(model, change.site, view)
    begun: tuple[Tensor, Tensor] | None = None
    with torch.no_grad():
        try:
            for change, view in stored_views(model, edit):
                # What was half written is neither the one nor the other: it is put back from a copy.
                begun = view, view.clone()
                _switch(change, view, expected)
        except BaseException:
            if begun is not None:
                view, copy = begun
                view.copy_(copy)
            _put_back(model, edit, expected)
            raise


def _put_back(model: HookedModel, edit: Edit, expected: EditState) -> None:
    """Make every tensor what it is in the state `expected`, where some are in the other one."""
    for change, view in stored_views(model, edit):
        state = change.state(view)
        if state not in (expected, "both"):
            _switch(change, view, state)


def _switch(change: AnyChange, view: Tensor, state: EditState) -> None:
    """Write the new values into a tensor that is the base, or the old ones into one that is edited."""
    if state == "base":
        change.write(view)
    else:
        change.undo(view)


def _neuron_changes(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " neuron"],
    value: Value,
) -> dict[str, TensorChange]:
    """The change of some neurons' rows of `out`, which are what they write, and for means of its bias."""
    if not isinstance(value, Zero | Scale | Mean):
        raise InputError(
            f"weights cannot do what {type(value).__name__} does to neurons; Zero, Scale, Multiply, Mean "
            "and Restore can be written into a checkpoint"
        )
    if isinstance(value, Mean) and site.is_of_experts:
        raise InputError(
            f"mean ablation writes the means into a bias, and the neurons of {site} reach only the tokens that are "
            "sent to their expert: use zero, or ablate by hooks"
        )
    # The weights of a neuron's row of `out` follow each other in the flat order.
    _, d_model = shape(model, site.out)
    weights = units[:, None] * d_model + torch.arange(d_model)
    rows = entries(model, site.out, weights.flatten()).unflatten(0, (-1, d_model))
    alpha = value.alpha if isinstance(value, Scale) else 0.0
    new = rows * alpha
    changes = _weight_changes(model, site.out, weights.flatten(), new.flatten())
    # A neuron that is always at its mean adds the same vector at every position: mean @ rows goes into the bias.
    if isinstance(value, Mean):
        means = at_site(value.scores.activation_mean, site, f"the scores of {value.scores.behaviour}")
        mean = means[units].to(rows)
        changes |= _bias_change(model, site.out, mean @ rows)
    return changes


def _row_scalings(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " neuron"],
    gates: Gates,
) -> dict[str, RowScaling]:
    """The changes of some neurons' rows of `out` by gates: one, or one an expert."""
    if site not in gates.multipliers:
        raise InputError(f"the gates hold nothing for {site}")
    name, is_transposed = stored_name(model, site.out)
    matrices = own_matrices(model, site.out)
    # A neuron's row begins where the rows before it end.
    _, d_model = shape(model, site.out)
    first_weights = units * d_model
    changes = {}
    for expert, places, first_weights_of_expert in matrices.split(first_weights):
        matrix = matrices.of(expert).detach()
        name_of_expert = matrices.name(expert, name)
        changes[name_of_expert] = row_scaling(
            matrix.t() if is_transposed else matrix,
            site.out,
            first_weights_of_expert // d_model,
            gates.multipliers[site][units[places]],
            is_transposed=is_transposed,
            expert=expert,
        )
    return changes


def _weight_changes(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " weight"],
    new: Float[Tensor, " weight"],
) -> dict[str, TensorChange]:
    """The changes of some weights of a site, given as flat indices of `(d_in, d_out)`: one, or one an expert."""
    name, is_transposed = stored_name(model, site)
    matrices = own_matrices(model, site)
    changes = {}
    for expert, places, units_of_expert in matrices.split(units):
        matrix = matrices.of(expert).detach()
        change = _weight_change(matrix, site, units_of_expert, new[places], is_transposed=is_transposed)
        name_of_expert = matrices.name(expert, name)
        changes[name_of_expert] = replace(change, expert=expert)
    return changes


def _weight_change(
    matrix: Float[Tensor, "d_in d_out"],
    site: Site,
    units: Int[Tensor, " weight"],
    new: Float[Tensor, " weight"],
    *,
    is_transposed: bool,
) -> TensorChange:
    """The change of some entries of one matrix."""
    d_in, d_out = matrix.shape
    row = units // d_out
    column = units % d_out
    old = matrix[row, column]
    # The edit counts in the checkpoint's layout, where the matrix may lie transposed, and in ascending order.
    if is_transposed:
        stored = matrix.t()
        indices = column * d_in + row
    else:
        stored = matrix
        indices = units
    order = indices.argsort()
    new = new.to(old)
    refuse_not_finite(new, f"the new weights of {site}")
    return TensorChange(
        site=site,
        is_bias=False,
        is_transposed=is_transposed,
        shape=tuple(stored.shape),
        indices=indices[order],
        old=old[order].cpu(),
        new=new[order].cpu(),
        base=tensor_hash(stored),
    )


def _bias_change(
    model: HookedModel,
    site: Site,
    added: Float[Tensor, " d_model"],
) -> dict[str, TensorChange]:
    """The change of a matrix's bias to which a vector is added."""
    parameter = bias(model, site)
    if parameter is None:
        raise InputError(
            f"mean ablation writes the means into the bias of '{site.part}', which {model.cfg.model_name} does not "
            "have: use zero, or ablate by hooks"
        )
    name = stored_name(model, site)[0].removesuffix("weight") + "bias"
    old = parameter.detach()
    new = old + added
    refuse_not_finite(new, f"the new biases of {site}")
    change = TensorChange(
        site=site,
        is_bias=True,
        is_transposed=False,
        shape=tuple(old.shape),
        indices=torch.arange(len(old)),
        old=old.cpu().clone(),
        new=new.cpu(),
        base=tensor_hash(old),
    )
    return {name: change}
