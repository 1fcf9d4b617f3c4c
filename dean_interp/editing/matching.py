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
from dean_interp.editing.row_scaling import RowScaling
from dean_interp.editing.tensor_change import TensorChange
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
        find = _place if change.expert is None else _place_of_expert
        place = find(name, change, stored, folder)
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
    """Every place of each."""
    in_layer: Mapping[str, list[TensorPlace]]
    by_numbers: Mapping[tuple[str, ...], list[TensorPlace]]

    @classmethod
    def of(cls, by_name: Mapping[str, list[TensorPlace]]) -> "_Stored":
        in_layer, by_numbers = defaultdict(list), defaultdict(list)
        for name, places in by_name.items():
            in_layer[_in_layer(name)].append(places[0])
            by_numbers[_numbers(name)].append(places[0])
        return cls(by_name, in_layer, by_numbers)


def _place(name: str, change: TensorChange | RowScaling, stored: _Stored, folder: Path) -> TensorPlace | None:
    """The place of a tensor that is stored as such."""
    namesakes = stored.in_layer.get(_in_layer(name), [])
    if len(namesakes) == 1:
        if namesakes[0].shape != change.shape:
            shape = namesakes[0].shape
            raise InputError(f"{name} is {shape} in {folder}, and {change.shape} in the edit's base")
        return namesakes[0]
    # Several models in one folder (of texts and of images), or a name that is another within the layer, too.
    candidates = namesakes or stored.by_numbers.get(_numbers(name), [])
    known = [place for place in candidates if place.shape == change.shape]
    match = _only_match(name, change, known, folder)
    return stored.by_name[name][0] if match is None and name in stored.by_name else match


def _place_of_expert(name: str, change: TensorChange | RowScaling, stored: _Stored, folder: Path) -> TensorPlace | None:
    """The place of an expert's matrix, which may be a tensor of its own, or a part of a stack of all experts."""
    numbers, expert = _numbers(name), change.expert
    own = [place for place in stored.by_numbers.get((*numbers, str(expert)), []) if len(place.shape) == 2]
    candidates = []
    for place in stored.by_numbers.get(numbers, []):
        if len(place.shape) == 3 and place.shape[0] == change.site.n_experts:
            candidates.append(replace(place, index=(expert,)))
    parts = [part for place in own + candidates for part in _parts(place, change)]
    # A matrix that is stored as it is in memory is preferred to one that is stored as its transpose.
    for is_turned in (False, True):
        match = _only_match(name, change, [part for part in parts if part.is_turned == is_turned], folder)
        if match is not None:
            return match
    # None is the base's or the edit's: the folder is another model's, which any of them shows.
    return parts[0] if parts else None


def _parts(place: TensorPlace, change: TensorChange | RowScaling) -> Iterator[TensorPlace]:
    """The parts of a stored matrix that may be an expert's: all of it, or a half where `gate` and `in` share it."""
    for is_turned in (False, True):
        turned = replace(place, is_turned=is_turned)
        shape = change.shape[::-1] if is_turned else change.shape
        if place.shape[-2:] == shape:
            yield turned
        if change.site == change.site.neurons.out:
            continue
        # The halves lie along the axis of neurons: side by side, or neuron by neuron.
        axis = 0 if change.is_transposed != is_turned else 1
        width = shape[axis]
        if place.shape[-2:] == (*shape[:axis], 2 * width, *shape[axis + 1 :]):
            for half in (slice(0, width), slice(width, None), slice(0, None, 2), slice(1, None, 2)):
                yield replace(turned, index=(*place.index, *[slice(None)] * axis, half))


def _only_match(
    name: str, change: TensorChange | RowScaling, candidates: Sequence[TensorPlace], folder: Path
) -> TensorPlace | None:
    """The candidate that holds what the edit's base or its result does. Raises `InputError` where two do."""
    matches = [place for place in candidates if change.state(place.mapped(folder)) != "other"]
    if len(matches) > 1:
        first, second = (f"{place.name}{_shown(place.index)}" for place in matches[:2])
        raise InputError(
            f"{folder} holds {name} twice, as {first} and as {second}: which of them is loaded is "
            "not sure, so save the model anew (save_pretrained)"
        )
    return matches[0] if matches else None


def _refuse_other_place(
    place: TensorPlace, stored: Mapping[str, list[TensorPlace]], weights: WeightFiles, folder: Path
) -> None:
    """Raise `InputError` where two files hold the tensor, or the index says that another file does."""
    files = [str(one.file) for one in stored[place.name]]
    if len(files) > 1:
        raise InputError(f"{folder} holds {place.name} twice, in {files[0]} and in {files[1]}: save the model anew")
    named = weights.weight_map.get(place.name, place.file.name)
    if named != place.file.name:
        raise InputError(f"{folder / str(weights.index)} says that {place.name} is in {named}; it is in {files[0]}")


def _in_layer(name: str) -> str:
    """What a tensor is called from the number of its layer on, which is what wrappers leave as it is."""
    found = re.search(r"(?:^|\.)(\d+\..*)", name)
    return found[1] if found else name


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdigit())


def _shown(index: Sequence[int | slice]) -> str:
    """A part of a tensor as it is written: `[5, 0:20]`; nothing for all of it."""
    axes = []
    for entry in index:
        if isinstance(entry, int):
            axes.append(str(entry))
        else:
            bounds = ["" if bound is None else str(bound) for bound in (entry.start, entry.stop, entry.step)]
            axes.append(":".join(bounds if entry.step else bounds[:2]))
    return f"[{', '.join(axes)}]" if axes else ""
