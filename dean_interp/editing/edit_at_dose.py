"""Any edit at a dose, by hooks: 0 is the original, 1 the edit, what lies between is part of its change.

Below 0 is the opposite change, above 1 more of the same. At a dose `d` a gate `g` is `1 + d * (g - 1)`, held to
`selection.gates.LIMITS`, and a weight is `old + d * (new - old)`. A selection stands for the edit that silences it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.editing.ablation import ablate, refuse_foreign
from dean_interp.editing.apply import edit_state
from dean_interp.editing.edit import Edit, load_edit, refuse_state
from dean_interp.editing.reusable import reusable
from dean_interp.editing.values import Given, Multiply, Scale, Value, Zero
from dean_interp.errors import InputError
from dean_interp.files import format_of, refuse_folder, refuse_unreadable
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.matrices import weight
from dean_interp.models.sites import Site
from dean_interp.selection.gates import Gates, dosed, gates_of, load_gates
from dean_interp.selection.selection import Selection, load_selection

AnyEdit = Gates | Selection | Edit
"""What can be applied at a dose."""

LARGEST_DOSE = 1000.0
_READERS: Mapping[str, Callable[[str | Path], AnyEdit]] = {
    "gates": load_gates,
    "selection": load_selection,
    "edit": load_edit,
}


def load_any_edit(path: str | Path) -> AnyEdit:
    """Gates, a selection or an edit, whichever the file holds.

    Raises `InputError` where it is missing, damaged, or something else.
    """
    # A format is written `dean_interp.gates.1`: the package, the kind and its version.
    kind = f"{format_of(path)}..".split(".")[1]
    if kind in _READERS:
        return _READERS[kind](path)
    refuse_folder(path, tuple(_READERS))
    if not Path(path).is_file():
        raise InputError(f"no file {path}: give a gates file, a selection file or an edit file")
    refuse_unreadable(path)
    raise InputError(f"{path} is not a gates file, a selection file or an edit file, or it is damaged")


def refuse_dose(dose: float) -> None:
    """Raise `InputError` for a dose that is no number, or too large for any model to mean something."""
    if not (math.isfinite(dose) and abs(dose) <= LARGEST_DOSE):
        raise InputError(
            f"dose must be from -{LARGEST_DOSE:g} to {LARGEST_DOSE:g} (0 is the original, 1 the edit), got {dose}"
        )


def refuse_other_base(model: HookedModel, edit: AnyEdit) -> None:
    """Raise `InputError` where an edit is not of this model, changes nothing, or is in the weights already."""
    selection, _ = as_hooks(edit)
    if not len(selection):
        raise InputError(f"{edit!r} changes nothing")
    refuse_foreign(model, selection)
    if isinstance(edit, Edit):
        refuse_state(edit_state(model, edit), "base", edit, str(model.cfg.model_name))


@reusable
@contextmanager
def at_dose(model: HookedModel, edit: AnyEdit, dose: float, *, units: Selection | None = None) -> Iterator[None]:
    """While open, the model has the edit at a dose, by hooks alone.

    Args:
        model: it is left as it was.
        edit: gates, an edit, or a selection, which is silenced.
        dose: 0 is the original, 1 the edit, -1 the opposite.
        units: change these units alone, of those that the edit changes; None: all of them.

    Raises:
        InputError: a dose out of range, an edit of another model, one that hooks cannot do.
    """
    refuse_dose(dose)
    if dose == 0:
        yield
        return
    selection, value = as_hooks(edit)
    if units is not None:
        if len(units) and not units.units.keys() & selection.units.keys():
            raise InputError(
                f"units must be among those that the edit changes, at {', '.join(map(str, sorted(selection.units)))}; "
                f"got {', '.join(map(str, sorted(units.units)))}"
            )
        selection, value = _only(selection, value, units)
        if not len(selection):
            yield
            return
    value_at_dose = _value_at_dose(model, selection, value, dose)
    with ablate(model, selection, value=value_at_dose):
        yield


def as_hooks(edit: AnyEdit) -> tuple[Selection, Multiply | Given | Zero]:
    """What an edit is to `ablate`. Raises `InputError` for an edit that hooks cannot do."""
    match edit:
        case Gates():
            return edit.selection, Multiply(edit)
        case Selection():
            is_of_neurons = all(site.unit == "neuron" for site in edit.shapes)
            value = Multiply(gates_of(edit)) if is_of_neurons else Zero()
            return edit, value
        case Edit():
            return edit.hooked()


def _only(
    selection: Selection, value: Multiply | Given | Zero, units: Selection
) -> tuple[Selection, Multiply | Given | Zero]:
    """The part of a change that is a change of some units."""
    none = torch.zeros(0, dtype=torch.int64)
    kept, weights = {}, {}
    for site, changed in selection.units.items():
        is_kept = torch.isin(changed, units.units.get(site, none))
        kept[site] = changed[is_kept]
        if isinstance(value, Given):
            weights[site] = value.weights[site][is_kept]
    only = replace(selection, units=kept)
    if isinstance(value, Given):
        return only, Given(weights)
    return only, value


def _value_at_dose(
    model: HookedModel,
    selection: Selection,
    value: Multiply | Given | Zero,
    dose: float,
) -> Value:
    match value:
        case Multiply(gates):
            # Dose 1 is the edit, also where a user's gates are beyond the usual limits.
            return Multiply(gates if dose == 1 else dosed(gates, dose))
        case Zero():
            return Scale(1 - dose)
        case Given(weights):
            between = {}
            for site, new in weights.items():
                old = _weights(model, selection, site)
                # Exactly the old weights at dose 0, and the new ones at dose 1.
                between[site] = torch.lerp(old, new.to(old), dose)
            return Given(between)


def _weights(model: HookedModel, selection: Selection, site: Site) -> Float[Tensor, " unit"]:
    """The selected weights of a matrix as they are in the model, in float32 on the CPU."""
    matrix = weight(model, site).detach()
    units = selection.units[site]
    rows = units // matrix.shape[1]
    columns = units % matrix.shape[1]
    return matrix[rows, columns].float().cpu()
