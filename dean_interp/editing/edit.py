"""An ablation as a small file: which numbers of a checkpoint change, and from what. It can be taken back, bit by bit.

An edit names tensors as the checkpoint does and counts their entries in its layout, so that a checkpoint can be edited
without loading the model (`editing.checkpoint`). It carries a hash of every tensor that it changes, as it was: it is
refused on any other, on one that has it already, and where the file was changed after it was made.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_CHUNK = 2**24  # entries that are hashed at once
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
    """Ascending flat indices."""
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
            digest.update(json.dumps(_described(name, change)).encode())
            for tensor in (change.indices, change.old.float(), change.new.float()):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def hooked(self) -> tuple[Selection, Given]:
        """The same change by hooks: `ablate(model, selection, value=value)`. Raises `InputError` for a changed bias."""
        if any(change.is_bias for change in self.changes.values()):
            raise InputError("this edit changes biases (mean ablation): hooks do the same with value=Mean(scores)")
        units, shapes, values = {}, {}, {}
        for change in self.changes.values():
            flat = change.indices
            if change.is_transposed:
                flat = flat % change.shape[1] * change.shape[0] + flat // change.shape[1]
            order = flat.argsort()
            units[change.site], values[change.site] = flat[order], change.new[order]
            shapes[change.site] = change.shape[::-1] if change.is_transposed else change.shape
        return Selection(units, shapes, frozenset(self.facts["prompt_hashes"])), Given(values)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        each = list(self.changes.values())
        small = all(torch.Size(change.shape).numel() < 2**31 for change in each)
        indices = torch.cat([one.indices for one in each])
        old, new = torch.cat([one.old for one in each]), torch.cat([one.new for one in each])
        tensors = {"indices": indices.to(torch.int32 if small else torch.int64), "old": old, "new": new}
        changes = [_described(name, change) for name, change in self.changes.items()]
        write_tensors(path, _FORMAT, tensors, {"changes": changes, "facts": dict(self.facts), "digest": self.digest})


@dataclass(frozen=True)
class _Change:
    name: str
    site: WrittenSite
    is_bias: bool
    is_transposed: bool
    shape: Shape
    n: Annotated[int, Field(ge=0)]
    base: str


@dataclass(frozen=True)
class _Made:
    model: str
    architecture: str
    units: dict[str, int]
    value: str
    prompt_hashes: list[str]


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    TypeAdapter(_Made).validate_python(facts)
    return facts


@dataclass(frozen=True)
class _Facts:
    changes: list[_Change]
    facts: Annotated[dict[str, Any], AfterValidator(_checked)]
    """As it was written, since the digest is of that."""
    digest: str


def load_edit(path: str | Path) -> Edit:
    """An edit from its file. Raises `InputError` where it is missing, damaged, changed since, or something else."""
    tensors, facts = read_tensors(path, _FORMAT, _Facts)
    ends = list(accumulate((one.n for one in facts.changes), initial=0))
    kinds = [tensors.get(kind, torch.empty(0, 0)) for kind in ("indices", "old", "new")]
    is_whole = all(one.dim() == 1 and len(one) == ends[-1] for one in kinds) and is_finite(torch.cat(kinds[1:]), 1)
    raise_if_damaged(path, not is_whole, "its indices, old and new values are not as many numbers as it changes")
    changes = {}
    for one, (start, end) in zip(facts.changes, pairwise(ends), strict=True):
        indices, old, new = (kind[start:end] for kind in kinds)
        changes[one.name] = TensorChange(one.site, one.is_bias, one.is_transposed, one.shape, indices.long(), old, new,
                                   one.base)  # fmt: skip
    edit = Edit(changes, facts.facts)
    if edit.digest != facts.digest:
        raise InputError(f"{path} was changed after it was made (its digest does not match): make the edit anew")
    for name, change in changes.items():
        n_axes, n = (1 if change.is_bias else 2), torch.Size(change.shape).numel()
        is_whole = (
            len(change.shape) == n_axes and is_ascending(change.indices, n) and len(changes) == len(facts.changes)
        )
        raise_if_damaged(path, not is_whole, f"the change of {name!r} does not fit its shape")
    return edit


def stack(first: Edit, second: Edit) -> Edit:
    """Two edits of one base as one. Raises `InputError` where they differ on a number, or in their base."""
    changes = dict(first.changes)
    for name, change in second.changes.items():
        if name not in changes:
            changes[name] = change
            continue
        mine = changes[name]
        if mine.base != change.base:
            raise InputError(f"the edits are of different models: {name} is not the same before them")
        both = torch.isin(mine.indices, change.indices)
        theirs = change.new[torch.searchsorted(change.indices, mine.indices[both])]
        if not torch.equal(mine.new[both].float(), theirs.float()):
            n_differ = int((mine.new[both].float() != theirs.float()).sum())
            raise InputError(f"the edits set {n_differ} numbers of {name} to different values: they cannot be stacked")
        others = ~torch.isin(change.indices, mine.indices)
        indices = torch.cat([mine.indices, change.indices[others]])
        order = indices.argsort()
        old, new = (torch.cat([a, b[others]])[order]
                    for a, b in ((mine.old, change.old), (mine.new, change.new)))  # fmt: skip
        changes[name] = TensorChange(mine.site, mine.is_bias, mine.is_transposed, mine.shape, indices[order], old, new,
                               mine.base)  # fmt: skip
    units = dict(first.facts["units"])
    hashes = sorted({*first.facts["prompt_hashes"], *second.facts["prompt_hashes"]})
    parts = [one.facts.get("stacked", [one.digest]) for one in (first, second)]
    facts = {**first.facts, "units": {**units, **second.facts["units"]}, "prompt_hashes": hashes,
             "stacked": parts[0] + parts[1]}  # fmt: skip
    return Edit(changes, facts)


def compare(first: Edit, second: Edit) -> dict[str, dict[str, int]]:
    """By tensor: how many numbers both set alike, both set differently, and only one of them sets."""
    found = {}
    for name in sorted({*first.changes, *second.changes}):
        sides = [dict(zip(change.indices.tolist(), change.new.tolist(), strict=True)) if change else {}
                 for change in (first.changes.get(name), second.changes.get(name))]  # fmt: skip
        shared = sides[0].keys() & sides[1].keys()
        alike = sum(sides[0][index] == sides[1][index] for index in shared)
        found[name] = {"alike": alike, "different": len(shared) - alike, "first_only": len(sides[0]) - len(shared),
                       "second_only": len(sides[1]) - len(shared)}  # fmt: skip
    return found


def tensor_state(tensor: Float[Tensor, "..."], change: TensorChange) -> EditState:
    """What a tensor in the checkpoint's layout is to a change; it is read, never written."""
    if tuple(tensor.shape) != change.shape:
        return "other"
    at = entries(change)
    now = tensor[at].cpu()
    is_old, is_new = torch.equal(now.float(), change.old.float()), torch.equal(now, change.new.to(now.dtype))
    if not (is_old or is_new) or tensor_hash(tensor, change) != change.base:
        return "other"
    return "both" if is_old and is_new else "base" if is_old else "edited"


def joint_edit_state(states: Sequence[EditState]) -> EditState:
    """The state that all tensors share; `other` where they differ. `both` agrees with either."""
    found = set(states) - {"both"}
    return found.pop() if len(found) == 1 else "other" if found else "both"


def tensor_hash(tensor: Float[Tensor, "..."], undone: TensorChange | None = None) -> str:
    """SHA-256 of a tensor's values in float32, a piece at a time; with `undone`, of what it was before that change."""
    digest = hashlib.sha256()
    rows = max(1, _CHUNK // max(tensor[0].numel(), 1))
    width = tensor[0].numel()
    for start in range(0, len(tensor), rows):
        piece = tensor[start : start + rows].detach().to(device="cpu", dtype=torch.float32, copy=True).flatten()
        if undone is not None:
            inside = (undone.indices >= start * width) & (undone.indices < (start + rows) * width)
            piece[undone.indices[inside] - start * width] = undone.old[inside].float()
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def refuse_state(state: EditState, expected: EditState, edit: Edit, what: str) -> None:
    """Raise `InputError` where something is not what an edit can be written into, or taken out of."""
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


def _described(name: str, change: TensorChange) -> dict[str, Any]:
    return {"name": name, "site": str(change.site), "is_bias": change.is_bias, "is_transposed": change.is_transposed,
            "shape": list(change.shape), "n": len(change.indices), "base": change.base}  # fmt: skip
