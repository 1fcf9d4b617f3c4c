"""Which tensor of a checkpoint folder is the one that an edit names.

A loader may rename tensors: what a file calls `language_model.model.layers.0.mlp.down_proj.weight` is
`model.language_model.layers.0.mlp.down_proj.weight` in memory, where edits are made, and a checkpoint of a model's
body leaves out the name of the body. The rules are the loader's own and change with its version. But an edit carries
the hash of every tensor that it changes, so a tensor is known by what it holds: names only say which to look at.

An expert's matrix is known in the same way, whether it is a tensor of its own (`...experts.5.w2.weight`) or a part of a
stack of all experts: their names hold the numbers of the layer and of the expert.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dean_interp.editing.checkpoint_files import TensorPlace, WeightFiles, stored_tensors, weight_files
from dean_interp.editing.edit import Edit
from dean_interp.editing.row_scaling import AnyChange
from dean_interp.errors import InputError
from dean_interp.progress import progress_bar


def places_of(folder: Path, edit: Edit) -> dict[str, TensorPlace]:
    """Where each tensor of an edit lies in a checkpoint folder, by the edit's name of it.

    Raises `InputError` for a tensor that is not there, has another shape, or is there twice.
    """
    weights = weight_files(folder)
    stored = _Stored.of(stored_tensors(folder, weights))
    places = {}
    for name, change in progress_bar(edit.changes.items(), desc="finding", unit="tensor", leave=False):
        if change.expert is None:
            place = _place(name, change, stored, folder)
        else:
            place = _place_of_expert(name, change, stored, folder)
        if place is None:
            raise InputError(
                f"{folder} has no tensor {name}, which this edit of {edit.facts['model']} changes, nor one of another "
                "name that holds the same: the loader may make it of others, and then `dean-interp edit export` writes "
                "the model"
            )
        _refuse_other_place(place, stored.by_name, weights, folder)
        places[name] = place
    return places


@dataclass(frozen=True)
class _Stored:
    """The tensors of a checkpoint, by all that they are looked up by."""

    by_name: Mapping[str, list[TensorPlace]]
    """Every place of each tensor, by its name in the files."""
    in_layer: Mapping[str, list[TensorPlace]]
    """The first place of each tensor, by the name within its layer."""
    by_numbers: Mapping[tuple[str, ...], list[TensorPlace]]
    """The first place of each tensor, by the numbers in its name."""

    @classmethod
    def of(cls, by_name: Mapping[str, list[TensorPlace]]) -> "_Stored":
        in_layer = defaultdict(list)
        by_numbers = defaultdict(list)
        for name, places in by_name.items():
            in_layer[_in_layer(name)].append(places[0])
            by_numbers[_numbers(name)].append(places[0])
        return cls(by_name, in_layer, by_numbers)


def _place(
    name: str,
    change: AnyChange,
    stored: _Stored,
    folder: Path,
) -> TensorPlace | None:
    """The place of a tensor that is stored as such."""
    candidates = stored.in_layer.get(_in_layer(name), [])
    if len(candidates) == 1:
        (place,) = candidates
        if place.shape != change.shape:
            raise InputError(f"{name} is {place.shape} in {folder}, and {change.shape} in the edit's base")
        return place
    # Several models in one folder (of texts and of images), or a name that is another within the layer, too.
    if not candidates:
        candidates = stored.by_numbers.get(_numbers(name), [])
    candidates = [place for place in candidates if place.shape == change.shape]
    match = _only_match(name, change, candidates, folder)
    if match is None and name in stored.by_name:
        return stored.by_name[name][0]
    return match


def _place_of_expert(
    name: str,
    change: AnyChange,
    stored: _Stored,
    folder: Path,
) -> TensorPlace | None:
    """The place of an expert's matrix, which may be a tensor of its own, or a part of a stack of all experts."""
    numbers = _numbers(name)
    numbers_of_own = (*numbers, str(change.expert))
    places = [place for place in stored.by_numbers.get(numbers_of_own, []) if len(place.shape) == 2]
    for place in stored.by_numbers.get(numbers, []):
        if len(place.shape) == 3 and place.shape[0] == change.site.n_experts:
            places.append(replace(place, index=(change.expert,)))
    parts = []
    for place in places:
        parts += _parts(place, change)
    # A matrix that is stored as it is in memory is preferred to one that is stored as its transpose.
    for is_turned in (False, True):
        candidates = [part for part in parts if part.is_turned == is_turned]
        match = _only_match(name, change, candidates, folder)
        if match is not None:
            return match
    # None is the base's or the edit's: the folder is another model's, which any of them shows.
    return parts[0] if parts else None


def _parts(place: TensorPlace, change: AnyChange) -> Iterator[TensorPlace]:
    """The parts of a stored matrix that may be an expert's: all of it, or a half where `gate` and `in` share it."""
    stored_shape = place.shape[-2:]
    for is_turned in (False, True):
        turned = replace(place, is_turned=is_turned)
        shape = change.shape[::-1] if is_turned else change.shape
        if stored_shape == shape:
            yield turned
        if change.site == change.site.neurons.out:
            continue
        # The halves lie along the axis of neurons.
        axis = 0 if change.is_transposed != is_turned else 1
        width = shape[axis]
        shape_of_both = list(shape)
        shape_of_both[axis] = 2 * width
        if stored_shape == tuple(shape_of_both):
            before = (*place.index, *[slice(None)] * axis)
            for half in _halves(width):
                yield replace(turned, index=(*before, half))


def _halves(width: int) -> tuple[slice, ...]:
    """Where one of two matrices of some width may lie on the axis that they share."""
    side_by_side = (slice(0, width), slice(width, None))
    in_turn = (slice(0, None, 2), slice(1, None, 2))
    return side_by_side + in_turn


def _only_match(
    name: str,
    change: AnyChange,
    candidates: Sequence[TensorPlace],
    folder: Path,
) -> TensorPlace | None:
    """The candidate that holds what the edit's base or its result does. Raises `InputError` where two do."""
    matches = [place for place in candidates if change.state(place.mapped(folder)) != "other"]
    if len(matches) > 1:
        first, second = map(_shown, matches[:2])
        raise InputError(
            f"{folder} holds {name} twice, as {first} and as {second}: which of them is loaded is "
            "not sure, so save the model anew (save_pretrained)"
        )
    return matches[0] if matches else None


def _refuse_other_place(
    place: TensorPlace,
    stored: Mapping[str, list[TensorPlace]],
    weights: WeightFiles,
    folder: Path,
) -> None:
    """Raise `InputError` where two files hold the tensor, or the index says that another file does."""
    files = [str(stored_place.file) for stored_place in stored[place.name]]
    if len(files) > 1:
        raise InputError(f"{folder} holds {place.name} twice, in {files[0]} and in {files[1]}: save the model anew")
    named = weights.weight_map.get(place.name, place.file.name)
    if named != place.file.name:
        raise InputError(f"{folder / str(weights.index)} says that {place.name} is in {named}; it is in {files[0]}")


def _in_layer(name: str) -> str:
    """What a tensor is called from the number of its layer on, which is what wrappers leave as it is."""
    match = re.search(r"(?:^|\.)(\d+\..*)", name)
    return match[1] if match else name


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdigit())


def _shown(place: TensorPlace) -> str:
    """A tensor's name, and behind it the part that is meant: `experts.w1[5, 0:20]`."""
    if not place.index:
        return place.name
    axes = ", ".join(map(_shown_axis, place.index))
    return f"{place.name}[{axes}]"


def _shown_axis(entry: int | slice) -> str:
    if isinstance(entry, int):
        return str(entry)
    start = "" if entry.start is None else entry.start
    stop = "" if entry.stop is None else entry.stop
    step = "" if entry.step is None else f":{entry.step}"
    return f"{start}:{stop}{step}"
