"""The form in which an edit's file holds its changes: facts as JSON, in a list; tensors by the place in the list.

What is read may come from anywhere: `fault` says what is wrong with a change.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dean_interp.editing.row_scaling import RowScaling
from dean_interp.editing.tensor_change import TensorChange
from dean_interp.files import is_ascending, is_finite
from dean_interp.models.sites import Shape, Site, Size, WrittenSite

_FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class WrittenTensorChange:
    """The facts of a `TensorChange`, as a file gives them."""

    kind: Literal["entries"]
    name: str
    site: WrittenSite
    is_bias: bool
    is_transposed: bool
    shape: Shape
    base: str
    expert: int | None = None


@dataclass(frozen=True)
class WrittenRowScaling:
    """The facts of a `RowScaling`, as a file gives them."""

    kind: Literal["rows"]
    name: str
    site: WrittenSite
    is_transposed: bool
    shape: tuple[Size, Size]
    dtype: Literal["bfloat16", "float16", "float32"]
    base: str
    expert: int | None = None


WrittenChange = WrittenTensorChange | WrittenRowScaling


def written_facts(name: str, change: TensorChange | RowScaling) -> dict[str, Any]:
    """What the file says of a change of the tensor `name`."""
    common = {
        "name": name,
        "site": str(change.site),
        "is_transposed": change.is_transposed,
        "shape": list(change.shape),
        "base": change.base,
    }
    if change.expert is not None:
        common["expert"] = change.expert
    match change:
        case TensorChange():
            return {"kind": "entries", "is_bias": change.is_bias, **common}
        case RowScaling():
            return {"kind": "rows", "dtype": str(change.dtype).removeprefix("torch."), **common}


def written_tensors(change: TensorChange | RowScaling) -> dict[str, Tensor]:
    """What the file holds of a change beside what it says."""
    match change:
        case TensorChange():
            return {"indices": _small(change.indices, change.shape), "old": change.old, "new": change.new}
        case RowScaling():
            return {
                "rows": _small(change.rows, change.shape),
                "multipliers": change.multipliers,
                "n_bits": _small(change.n_bits, change.shape),
                "bits": change.bits,
                "kept_at": _small(change.kept_at, change.shape),
                "kept": change.kept,
                "silenced": change.silenced,
            }


def place_of(i: int, part: str) -> str:
    """The name in the file of a tensor of the change at place `i`. Short: a file may hold hundreds."""
    return f"{i}.{part}"


def read_change(written: WrittenChange, i: int, tensors: Mapping[str, Tensor]) -> TensorChange | RowScaling:
    """The change that facts and tensors describe, not yet checked. Raises `KeyError` where a tensor is missing."""

    def part(name: str) -> Tensor:
        return tensors[place_of(i, name)]

    match written:
        case WrittenTensorChange():
            return TensorChange(
                site=written.site,
                is_bias=written.is_bias,
                is_transposed=written.is_transposed,
                shape=written.shape,
                indices=part("indices").long(),
                old=part("old"),
                new=part("new"),
                base=written.base,
                expert=written.expert,
            )
        case WrittenRowScaling():
            return RowScaling(
                site=written.site,
                is_transposed=written.is_transposed,
                shape=written.shape,
                dtype=_FORMATS[written.dtype],
                rows=part("rows").long(),
                multipliers=part("multipliers"),
                n_bits=part("n_bits").long(),
                bits=part("bits"),
                kept_at=part("kept_at").long(),
                kept=part("kept"),
                silenced=part("silenced"),
                base=written.base,
                expert=written.expert,
            )


def fault(change: TensorChange | RowScaling) -> str | None:
    """What is wrong with a change, or None."""
    site, expert = change.site, change.expert
    if site.is_of_experts != (expert is not None) or not 0 <= (expert or 0) < site.n_experts:
        return "its expert is not one of its layer"
    match change:
        case TensorChange():
            return _fault_of_entries(change)
        case RowScaling():
            return _fault_of_rows(change)


def joint_fault(changes: Iterable[TensorChange | RowScaling]) -> str | None:
    """What is wrong with changes beside each other, each of them without fault, or None."""
    shapes: dict[tuple[Site, bool], Any] = {}
    known = set()
    for change in changes:
        place = change.site, change.is_bias, change.expert
        if place in known:
            return f"it changes one matrix of {change.site} twice"
        known.add(place)
        # The experts of a layer are alike.
        shape = change.shape, change.is_transposed
        if shapes.setdefault((change.site, change.is_bias), shape) != shape:
            return f"its experts of {change.site} are not of one shape"
    return None


def _fault_of_entries(change: TensorChange) -> str | None:
    if change.site.unit != "weight" or (change.is_bias and change.expert is not None):
        return "it is of no matrix"
    has_axes = len(change.shape) == (1 if change.is_bias else 2)
    if not has_axes or not is_ascending(change.indices, math.prod(change.shape)):
        return "its indices do not fit its shape"
    for values in (change.old, change.new):
        if not is_finite(values, 1) or len(values) != len(change.indices):
            return "its indices, old and new values are not equally many numbers"
    return None


def _fault_of_rows(change: RowScaling) -> str | None:
    if change.site != change.site.neurons.out or not is_ascending(change.rows, change.d_mlp):
        return "its rows are not neurons of its layer"
    n_rows, dtype = len(change.rows), change.dtype
    if not _is_float(change.multipliers, torch.float32, (n_rows,)):
        return "its multipliers are not one finite number a row"
    if change.n_bits.shape != (n_rows,) or bool((change.n_bits < 0).any() or (change.n_bits > change.d_model).any()):
        return "its bits are more than its numbers"
    if change.bits.dtype != torch.uint8 or change.bits.shape != (-(-int(change.n_bits.sum()) // 8),):
        return "its bits are not as many as it says"
    if not is_ascending(change.kept_at, len(change)) or not _is_float(change.kept, dtype, change.kept_at.shape):
        return "the numbers that it keeps have no places"
    n_silenced = int((change.multipliers == 0).sum())
    if not _is_float(change.silenced, dtype, (n_silenced, change.d_model)):
        return "it does not keep the rows that it silences"
    return None


def _is_float(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return tensor.dtype == dtype and tensor.shape == shape and is_finite(tensor, len(shape))


def _small(indices: Int[Tensor, " entry"], shape: tuple[int, ...]) -> Int[Tensor, " entry"]:
    """Indices in a tensor of some shape in int32, or in int64 where it is too large for that."""
    return indices.to(torch.int32 if math.prod(shape) < 2**31 else torch.int64)
