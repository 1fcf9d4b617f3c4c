"""An ablation as a small file: which numbers of a checkpoint change, and what they were. It can be undone, bit by bit.

An edit names tensors as the checkpoint does and counts their entries in the checkpoint's layout, so that a checkpoint
can be edited without loading the model (`editing.checkpoint`). It carries a hash of every tensor that it changes, taken
before the change. An edit is refused on any other tensor, on one that has the edit already, and where the edit's file
was changed after it was made.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import AfterValidator, Field, TypeAdapter
from torch import Tensor

from dean_interp.editing.values import Given
from dean_interp.errors import InputError
from dean_interp.files import is_ascending, is_finite, raise_if_damaged, read_tensors, write_tensors
from dean_interp.models.sites import Shape, Site, WrittenSite
from dean_interp.selection.selection import Selection

_FORMAT = "dean_interp.edit.1"
_N_HASHED_AT_ONCE = 2**24
EditState = Literal["base", "edited", "both", "other"]
"""What a tensor is to an edit: as before, as after, both (the edit changes none of its numbers), or something else."""


@dataclass(frozen=True)
class TensorChange:
    """What an edit does to one tensor, in the checkpoint's layout (`(d_out, d_in)` for `nn.Linear`)."""

    site: Site
    is_bias: bool
    is_transposed: bool
    """Whether the checkpoint stores the transpose of the site's `(d_in, d_out)`."""
    shape: tuple[int, ...]
    indices: Int[Tensor, " entry"]
    """Flat indices of the entries that change, ascending."""
    old: Float[Tensor, " entry"]
    new: Float[Tensor, " entry"]
    base: str
    """SHA-256 of the whole tensor before the edit, over its values in float32."""


@dataclass(frozen=True)
class Edit:
    """Changes by the name of the tensor, and where they come from."""

    changes: Mapping[str, TensorChange]
    facts: Mapping[str, Any]
    """The model's name, what was selected and by which prompts, the value, versions."""

    def __len__(self) -> int:
        return sum(len(change.indices) for change in self.changes.values())

    def __repr__(self) -> str:
        return f"Edit({len(self)} numbers in {len(self.changes)} tensors of {self.facts['model']})"

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the edit."""
        digest = hashlib.sha256(json.dumps(dict(self.facts), sort_keys=True).encode())
        for name, change in sorted(self.changes.items()):
            digest.update(json.dumps(_written(name, change)).encode())
            for tensor in (change.indices, change.old.float(), change.new.float()):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def hooked(self) -> tuple[Selection, Given]:
        """The same change by hooks: `ablate(model, selection, value=value)`. Raises `InputError` for a changed bias."""
        if any(change.is_bias for change in self.changes.values()):
            raise InputError("this edit changes biases (mean ablation): hooks do the same with value=Mean(scores)")
        units, shapes, values = {}, {}, {}
        for change in self.changes.values():
            indices, shape = change.indices, change.shape
            # A selection counts in (d_in, d_out): entry (row, column) of the transpose is entry (column, row) there.
            if change.is_transposed:
                n_rows, n_columns = shape
                indices = indices % n_columns * n_rows + indices // n_columns
                shape = (n_columns, n_rows)
            order = indices.argsort()
            units[change.site] = indices[order]
            values[change.site] = change.new[order]
            shapes[change.site] = shape
        return Selection(units, shapes, frozenset(self.facts["prompt_hashes"])), Given(values)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        changes = list(self.changes.values())
        fits_int32 = all(math.prod(change.shape) < 2**31 for change in changes)
        indices = torch.cat([change.indices for change in changes])
        tensors = {
            "indices": indices.to(torch.int32 if fits_int32 else torch.int64),
            "old": torch.cat([change.old for change in changes]),
            "new": torch.cat([change.new for change in changes]),
        }
        written = [_written(name, change) for name, change in self.changes.items()]
        facts = {"changes": written, "facts": dict(self.facts), "digest": self.digest}
        write_tensors(path, _FORMAT, tensors, facts)


@dataclass(frozen=True)
class _WrittenChange:
    name: str
    site: WrittenSite
    is_bias: bool
    is_transposed: bool
    shape: Shape
    n: Annotated[int, Field(ge=0)]
    base: str


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
    changes: list[_WrittenChange]
    facts: Annotated[dict[str, Any], AfterValidator(_with_required_facts)]
    """Unchanged, all of them: the digest was made from these."""
    digest: str


def load_edit(path: str | Path) -> Edit:
    """An edit from its file. Raises `InputError` where it is missing, damaged, changed since, or something else."""
    tensors, written = read_tensors(path, _FORMAT, _EditFile)
    # The file holds the entries of all tensors one after the other: the first tensor's n, the second's n, and so on.
    ends = list(accumulate((change.n for change in written.changes), initial=0))
    columns = [tensors.get(kind, torch.empty(0, 0)) for kind in ("indices", "old", "new")]
    are_whole = all(column.dim() == 1 and len(column) == ends[-1] for column in columns)
    is_whole = are_whole and is_finite(torch.cat(columns[1:]), 1)
    raise_if_damaged(path, not is_whole, "its indices, old and new values are not as many numbers as it changes")
    changes = {}
    for change, (start, end) in zip(written.changes, pairwise(ends), strict=True):
        indices, old, new = (column[start:end] for column in columns)
        changes[change.name] = TensorChange(
            site=change.site,
            is_bias=change.is_bias,
            is_transposed=change.is_transposed,
            shape=change.shape,
            indices=indices.long(),
            old=old,
            new=new,
            base=change.base,
        )
    edit = Edit(changes, written.facts)
    if edit.digest != written.digest:
        raise InputError(f"{path} was changed after it was made (its digest does not match): make the edit anew")
    for name, change in changes.items():
        has_axes = len(change.shape) == (1 if change.is_bias else 2)
        is_whole = has_axes and is_ascending(change.indices, math.prod(change.shape))
        is_whole = is_whole and len(changes) == len(written.changes)
        raise_if_damaged(path, not is_whole, f"the change of {name!r} does not fit its shape")
    return edit


def stack(first: Edit, second: Edit) -> Edit:
    """Two edits of one base as one. Raises `InputError` where they differ on a number, or in their base."""
    changes = dict(first.changes)
    for name, change in second.changes.items():
        changes[name] = _stacked(name, changes[name], change) if name in changes else change
    facts = {
        **first.facts,
        "units": {**first.facts["units"], **second.facts["units"]},
        "prompt_hashes": sorted({*first.facts["prompt_hashes"], *second.facts["prompt_hashes"]}),
        "stacked": first.facts.get("stacked", [first.digest]) + second.facts.get("stacked", [second.digest]),
    }
    return Edit(changes, facts)


def _stacked(name: str, first: TensorChange, second: TensorChange) -> TensorChange:
    """Two changes of one tensor as one."""
    if first.base != second.base:
        raise InputError(f"the edits are of different models: {name} is not the same before them")
    # Entries that both change must get one value.
    in_both = torch.isin(first.indices, second.indices)
    by_first = first.new[in_both].float()
    by_second = second.new[torch.searchsorted(second.indices, first.indices[in_both])].float()
    if not torch.equal(by_first, by_second):
        n_differ = int((by_first != by_second).sum())
        raise InputError(f"the edits set {n_differ} numbers of {name} to different values: they cannot be stacked")
    # Entries that only the second changes are added, and all are put in order.
    only_second = ~torch.isin(second.indices, first.indices)
    indices = torch.cat([first.indices, second.indices[only_second]])
    order = indices.argsort()
    old = torch.cat([first.old, second.old[only_second]])
    new = torch.cat([first.new, second.new[only_second]])
    return replace(first, indices=indices[order], old=old[order], new=new[order])


def compare(first: Edit, second: Edit) -> dict[str, dict[str, int]]:
    """By tensor: how many numbers both set alike, both set differently, and only one of them sets."""
    counts = {}
    for name in sorted({*first.changes, *second.changes}):
        by_first, by_second = _new_values(first, name), _new_values(second, name)
        shared = by_first.keys() & by_second.keys()
        n_alike = sum(by_first[index] == by_second[index] for index in shared)
        counts[name] = {
            "alike": n_alike,
            "different": len(shared) - n_alike,
            "first_only": len(by_first) - len(shared),
            "second_only": len(by_second) - len(shared),
        }
    return counts


def _new_values(edit: Edit, name: str) -> dict[int, float]:
    """The numbers that an edit sets in a tensor, by their flat index."""
    if name not in edit.changes:
        return {}
    change = edit.changes[name]
    return dict(zip(change.indices.tolist(), change.new.tolist(), strict=True))


def tensor_state(tensor: Float[Tensor, "..."], change: TensorChange) -> EditState:
    """What a tensor in the checkpoint's layout is to a change. The tensor is only read."""
    if tuple(tensor.shape) != change.shape:
        return "other"
    now = tensor[entries(change)].cpu()
    is_old = torch.equal(now.float(), change.old.float())
    is_new = torch.equal(now, change.new.to(now.dtype))
    if not (is_old or is_new) or tensor_hash(tensor, undone=change) != change.base:
        return "other"
    if is_old and is_new:
        return "both"
    return "base" if is_old else "edited"


def joint_edit_state(states: Sequence[EditState]) -> EditState:
    """The state that all tensors share; `other` where they differ. `both` agrees with either."""
    distinct = set(states) - {"both"}
    if not distinct:
        return "both"
    return distinct.pop() if len(distinct) == 1 else "other"


def tensor_hash(tensor: Float[Tensor, "..."], *, undone: TensorChange | None = None) -> str:
    """SHA-256 of a tensor's values in float32, a piece at a time; with `undone`, of what it was before that change."""
    digest = hashlib.sha256()
    width = tensor[0].numel()
    n_rows = max(1, _N_HASHED_AT_ONCE // max(width, 1))
    for start in range(0, len(tensor), n_rows):
        rows = tensor[start : start + n_rows].detach()
        piece = rows.to(device="cpu", dtype=torch.float32, copy=True).flatten()
        if undone is not None:
            is_inside = (undone.indices >= start * width) & (undone.indices < (start + n_rows) * width)
            piece[undone.indices[is_inside] - start * width] = undone.old[is_inside].float()
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def refuse_state(state: EditState, expected: EditState, edit: Edit, what: str) -> None:
    """Raise `InputError` where `what`, a model or folder, is not in the expected state."""
    if state in (expected, "both"):
        return
    if state == "other":
        raise InputError(
            f"{what} is neither the base of this edit nor its result: the edit was made from {edit.facts['model']}, "
            "whose tensors had other values (another checkpoint, another dtype, or another edit on top)"
        )
    raise InputError(f"{what} holds this edit already" if state == "edited" else f"{what} does not hold this edit")


def entries(change: TensorChange) -> tuple[Tensor, ...]:
    """Where the numbers that change are in their tensor: one index tensor an axis."""
    if len(change.shape) == 1:
        return (change.indices,)
    return change.indices // change.shape[1], change.indices % change.shape[1]


def _written(name: str, change: TensorChange) -> dict[str, Any]:
    """What the file says of a change, beside its indices and values."""
    return {
        "name": name,
        "site": str(change.site),
        "is_bias": change.is_bias,
        "is_transposed": change.is_transposed,
        "shape": list(change.shape),
        "n": len(change.indices),
        "base": change.base,
    }
