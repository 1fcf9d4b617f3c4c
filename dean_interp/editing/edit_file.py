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

from dean_interp.editing.row_scaling import AnyChange, RowScaling
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


def written_facts(name: str, change: AnyChange) -> dict[str, Any]:
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
            dtype = str(change.dtype).removeprefix("torch.")
            return {"kind": "rows", "dtype": dtype, **common}


def written_tensors(change: AnyChange) -> dict[str, Tensor]:
    """What the file holds of a change beside what it says."""
    match change:
        case TensorChange():
            return {
                "indices": _small(change.indices, change.shape),
                "old": change.old,
                "new": change.new,
            }
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


def read_change(
    written: WrittenChange,
    i: int,
    tensors: Mapping[str, Tensor],
) -> AnyChange:
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


def fault(change: AnyChange) -> str | None:
    """What is wrong with a change, or None."""
    has_expert = change.expert is not None
    number = change.expert or 0
    if has_expert != change.site.is_of_experts or not 0 <= number < change.site.n_experts:
        return "its expert is not one of its layer"
    match change:
        case TensorChange():
            return _fault_of_entries(change)
        case RowScaling():
            return _fault_of_rows(change)


def joint_fault(changes: Iterable[AnyChange]) -> str | None:
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
        shape_of_first = shapes.setdefault((change.site, change.is_bias), shape)
        if shape != shape_of_first:
            return f"its experts of {change.site} are not of one shape"
    return None


def _fault_of_entries(change: TensorChange) -> str | None:
    if change.site.unit != "weight" or (change.is_bias and change.expert is not None):
        return "it is of no matrix"
    n_axes = 1 if change.is_bias else 2
    n_entries = math.prod(change.shape)
    if len(change.shape) != n_axes or not is_ascending(change.indices, n_entries):
        return "its indices do not fit its shape"
    for values in (change.old, change.new):
        if not is_finite(values, 1) or len(values) != len(change.indices):
            return "its indices, old and new values are not equally many numbers"
    return None


def _fault_of_rows(change: RowScaling) -> str | None:
    if change.site != change.site.neurons.out or not is_ascending(change.rows, change.d_mlp):
        return "its rows are not neurons of its layer"
    n_rows = len(change.rows)
    if not _is_float(change.multipliers, torch.float32, (n_rows,)):
        return "its multipliers are not one finite number a row"
    is_possible = (change.n_bits >= 0) & (change.n_bits <= change.d_model)
    if change.n_bits.shape != (n_rows,) or not is_possible.all():
        return "its bits are more than its numbers"
    n_bytes = math.ceil(int(change.n_bits.sum()) / 8)
    if change.bits.dtype != torch.uint8 or change.bits.shape != (n_bytes,):
        return "its bits are not as many as it says"
    has_places = is_ascending(change.kept_at, len(change))
    if not has_places or not _is_float(change.kept, change.dtype, change.kept_at.shape):
        return "the numbers that it keeps have no places"
    n_silenced = int((change.multipliers == 0).sum())
    if not _is_float(change.silenced, change.dtype, (n_silenced, change.d_model)):
        return "it does not keep the rows that it silences"
    return None


def _is_float(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return tensor.dtype == dtype and tensor.shape == shape and is_finite(tensor, len(shape))


def _small(indices: Int[Tensor, " entry"], shape: tuple[int, ...]) -> Int[Tensor, " entry"]:
    """Indices in a tensor of some shape in int32, or in int64 where it is too large for that."""
    is_small = math.prod(shape) < 2**31
    return indices.to(torch.int32 if is_small else torch.int64)
