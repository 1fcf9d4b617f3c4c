"""An ablation as a small file: which numbers of a checkpoint change, and what undoes it, bit by bit.

An edit names tensors as the checkpoint does and counts their entries in the checkpoint's layout, so that a checkpoint
can be edited without loading the model (`editing.checkpoint`). Of a tensor it sets single numbers
(`editing.tensor_change`) or multiplies rows (`editing.row_scaling`). It carries a hash of every tensor that it changes,
taken before the change. An edit is refused on any other tensor, on one that has the edit already, and where the edit's
file was changed after it was made.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import AfterValidator, TypeAdapter
from torch import Tensor

from dean_interp.editing.edit_file import (
    WrittenChange,
    fault,
    joint_fault,
    place_of,
    read_change,
    written_facts,
    written_tensors,
)
from dean_interp.editing.row_scaling import AnyChange, RowScaling
from dean_interp.editing.tensor_change import EditState, TensorChange
from dean_interp.editing.value_names import AND
from dean_interp.editing.values import Given, Multiply
from dean_interp.errors import InputError
from dean_interp.files import raise_if_damaged, read_tensors, write_tensors
from dean_interp.models.own_matrices import shape_of_all, units_of_expert
from dean_interp.models.sites import Site, parse_site
from dean_interp.selection.gates import Gates
from dean_interp.selection.selection import Selection

_FORMAT = "dean_interp.edit.2"


@dataclass(frozen=True)
class Edit:
    """Changes by the name of the tensor, and where they come from."""

    changes: Mapping[str, AnyChange]
    facts: Mapping[str, Any]
    """The model's name, what was selected and by which prompts, the value, versions."""

    def __len__(self) -> int:
        return sum(len(change) for change in self.changes.values())

    def __repr__(self) -> str:
        return f"Edit({len(self)} numbers in {len(self.changes)} tensors of {self.facts['model']})"

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the edit."""
        facts = json.dumps(dict(self.facts), sort_keys=True)
        digest = hashlib.sha256(facts.encode())
        for name, change in sorted(self.changes.items()):
            facts_of_change = json.dumps(written_facts(name, change))
            digest.update(facts_of_change.encode())
            for part, tensor in written_tensors(change).items():
                digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def gates(self) -> Gates:
        """The gates that a gates edit was made of, at the sites that it changes; 1 for all other neurons there.

        Raises `InputError` for an edit that does something else, too.
        """
        multipliers: dict[Site, Tensor] = {}
        for name, change in self.changes.items():
            if not isinstance(change, RowScaling):
                raise InputError(f"this edit sets numbers of {name}, which no gates do")
            # The neurons of a layer's experts are counted expert by expert.
            n_neurons = change.d_mlp * change.site.n_experts
            gate = multipliers.setdefault(change.site.neurons, torch.ones(n_neurons))
            first = (change.expert or 0) * change.d_mlp
            gate[first + change.rows] = change.multipliers
        return Gates(multipliers, frozenset(self.facts["prompt_hashes"]))

    @property
    def equals_hooks(self) -> bool:
        """Whether `hooked` gives the same model: without changed biases, and without products that are rounded more."""
        changes = self.changes.values()
        is_exact = not any(change.is_bias or change.is_rounded for change in changes)
        are_alike = len(set(map(type, changes))) <= 1
        return is_exact and are_alike

    def hooked(self) -> tuple[Selection, Given | Multiply]:
        """The same change by hooks: `ablate(model, selection, value=value)`.

        Raises `InputError` for a changed bias, and for an edit that sets numbers and multiplies rows.
        """
        if any(change.is_bias for change in self.changes.values()):
            raise InputError("this edit changes biases (mean ablation): hooks do the same with value=Mean(scores)")
        entries = [change for change in self.changes.values() if isinstance(change, TensorChange)]
        if not entries:
            gates = self.gates
            return gates.selection, Multiply(gates)
        if len(entries) < len(self.changes):
            raise InputError("this edit sets numbers and multiplies rows: hooks do the same in two nested ablations")
        by_site: dict[Site, list[TensorChange]] = {}
        for change in entries:
            by_site.setdefault(change.site, []).append(change)
        units, shapes, values = {}, {}, {}
        for site, changes in by_site.items():
            units[site], values[site], shapes[site] = _as_weights(site, changes)
        prompt_hashes = frozenset(self.facts["prompt_hashes"])
        return Selection(units, shapes, prompt_hashes), Given(values)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors, changes = {}, []
        for i, (name, change) in enumerate(self.changes.items()):
            for part, tensor in written_tensors(change).items():
                tensors[place_of(i, part)] = tensor
            changes.append(written_facts(name, change))
        content = {"changes": changes, "facts": dict(self.facts), "digest": self.digest}
        write_tensors(path, _FORMAT, tensors, content)


@dataclass(frozen=True)
class _RequiredFacts:
    model: str
    architecture: str
    units: dict[str, int]
    value: str
    prompt_hashes: list[str]


def _with_required_facts(facts: dict[str, Any]) -> dict[str, Any]:
    TypeAdapter(_RequiredFacts).validate_python(facts)
    return facts


@dataclass(frozen=True)
class _EditFile:
    changes: list[WrittenChange]
    facts: Annotated[dict[str, Any], AfterValidator(_with_required_facts)]
    """Unchanged, all of them: the digest was made from these."""
    digest: str


def load_edit(path: str | Path) -> Edit:
    """An edit from its file. Raises `InputError` where it is missing, damaged, changed since, or something else."""
    tensors, written = read_tensors(path, _FORMAT, _EditFile)
    changes = {}
    for i, written_change in enumerate(written.changes):
        try:
            changes[written_change.name] = read_change(written_change, i, tensors)
        except KeyError as error:
            raise InputError(f"{path} is damaged (it has no {error})") from error
    edit = Edit(changes, written.facts)
    if edit.digest != written.digest:
        raise InputError(f"{path} was changed after it was made (its digest does not match): make the edit anew")
    raise_if_damaged(path, len(changes) < len(written.changes), "it changes one tensor twice")
    for name, change in changes.items():
        what = fault(change)
        raise_if_damaged(path, what is not None, f"the change of {name!r}: {what}")
    what = joint_fault(changes.values())
    raise_if_damaged(path, what is not None, str(what))
    return edit


def stack(first: Edit, second: Edit) -> Edit:
    """Two edits of one base as one. Raises `InputError` where they differ on a number, or in their base."""
    changes = dict(first.changes)
    for name, change in second.changes.items():
        if name in changes:
            changes[name] = _stacked(name, changes[name], change)
        else:
            changes[name] = change
    prompt_hashes = {*first.facts["prompt_hashes"], *second.facts["prompt_hashes"]}
    facts = {
        **first.facts,
        "units": _units_of_both(first, second),
        "selection": _joined_fact(first, second, "selection"),
        "value": _joined_fact(first, second, "value"),
        "prompt_hashes": sorted(prompt_hashes),
        "stacked": _digests(first) + _digests(second),
    }
    return Edit(changes, facts)


def _joined_fact(first: Edit, second: Edit, name: str) -> str:
    """What two edits say of themselves, each thing once: a stack passes for neither of them."""
    said = [*str(first.facts.get(name, "")).split(AND), *str(second.facts.get(name, "")).split(AND)]
    return AND.join(dict.fromkeys(said))


def _units_of_both(first: Edit, second: Edit) -> dict[str, int]:
    """How many units either edit changes at each site."""
    counts = dict(first.facts["units"])
    for name, n_units in second.facts["units"].items():
        site = parse_site(name)
        n_shared = len(_whole_units(first, site) & _whole_units(second, site)) if name in counts else 0
        counts[name] = counts.get(name, 0) + n_units - n_shared
    return counts


def _whole_units(edit: Edit, site: Site) -> set[tuple[int | None, int]]:
    """The units of a site that an edit changes, with their expert."""
    units = set()
    for change in edit.changes.values():
        if change.site == site.matrix and not change.is_bias:
            units |= {(change.expert, unit) for unit in change.units(site.unit).tolist()}
    return units


def _digests(edit: Edit) -> list[str]:
    """The digests of the edits that were stacked to make one, or its own."""
    return edit.facts.get("stacked", [edit.digest])


def _stacked(name: str, first: AnyChange, second: AnyChange) -> AnyChange:
    """Two changes of one tensor as one."""
    if first.base != second.base:
        raise InputError(f"the edits are of different models: {name} is not the same before them")
    match first, second:
        case TensorChange(), TensorChange():
            return first.stacked(second, name)
        case RowScaling(), RowScaling():
            return first.stacked(second, name)
    raise InputError(f"one edit sets numbers of {name}, the other multiplies rows of it: they cannot be stacked")


def compare(first: Edit, second: Edit) -> dict[str, dict[str, int]]:
    """By tensor: how many numbers both set alike, both set differently, and only one of them sets; for gates, rows."""
    counts = {}
    for name in sorted({*first.changes, *second.changes}):
        by_first = _settings(first, name)
        by_second = _settings(second, name)
        shared = by_first.keys() & by_second.keys()
        n_alike = sum(by_first[place] == by_second[place] for place in shared)
        counts[name] = {
            "alike": n_alike,
            "different": len(shared) - n_alike,
            "first_only": len(by_first) - len(shared),
            "second_only": len(by_second) - len(shared),
        }
    return counts


def _as_weights(
    site: Site,
    changes: Sequence[TensorChange],
) -> tuple[Int[Tensor, " unit"], Float[Tensor, " unit"], tuple[int, int]]:
    """What changes of a site's matrices are to hooks: its weights, their new values, and the site's shape."""
    units_of_each = []
    shape = (0, 0)
    for change in changes:
        n_rows, n_columns = change.shape
        shape = (n_rows, n_columns)
        indices = change.indices
        # A selection counts in (d_in, d_out): entry (row, column) of the transpose is entry (column, row) there.
        if change.is_transposed:
            shape = (n_columns, n_rows)
            row = indices // n_columns
            column = indices % n_columns
            indices = column * n_rows + row
        units_of_each.append(units_of_expert(site, change.expert, indices, shape))
    units = torch.cat(units_of_each)
    new = torch.cat([change.new for change in changes])
    order = units.argsort()
    # The experts of a layer are alike.
    return units[order], new[order], shape_of_all(site, shape)


def _settings(edit: Edit, name: str) -> dict[tuple[str, int], float]:
    """What an edit sets in a tensor, by place."""
    return edit.changes[name].settings() if name in edit.changes else {}


def joint_edit_state(states: Sequence[EditState]) -> EditState:
    """The state that all tensors share; `other` where they differ. `both` agrees with either."""
    distinct = set(states) - {"both"} or {"both"}
    return distinct.pop() if len(distinct) == 1 else "other"


def refuse_state(state: EditState, expected: EditState, edit: Edit, what: str) -> None:
    """Raise `InputError` where `what`, a model or folder, is not in the expected state."""
    if state in (expected, "both"):
        return
    if state == "other":
        raise InputError(
            f"{what} is neither the base of this edit nor its result: the edit was made from {edit.facts['model']}, "
            "whose tensors had other values (another checkpoint, another dtype, or another edit on top)"
        )
    if state == "edited":
        raise InputError(f"{what} holds this edit already")
    raise InputError(f"{what} does not hold this edit")
