"""Which tensor of a checkpoint folder is the one that an edit names.

A loader may rename tensors: what a file calls `language_model.model.layers.0.mlp.down_proj.weight` is
`model.language_model.layers.0.mlp.down_proj.weight` in memory, where edits are made, and a checkpoint of a model's
body leaves out the name of the body. The rules are the loader's own and change with its version. But an edit carries
the hash of every tensor that it changes, so a tensor is known by what it holds: names only say which to look at.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from dean_interp.editing.checkpoint_files import TensorPlace, WeightFiles, stored_tensors, weight_files
from dean_interp.editing.edit import Edit
from dean_interp.editing.row_scaling import RowScaling
from dean_interp.editing.tensor_change import TensorChange
from dean_interp.errors import InputError


def places_of(folder: Path, edit: Edit) -> dict[str, TensorPlace]:
    """Where each tensor of an edit lies in a checkpoint folder, by the edit's name of it.

    Raises `InputError` for a tensor that is not there, has another shape, or is there twice.
    """
    weights = weight_files(folder)
    stored = stored_tensors(folder, weights)
    places = {}
    for name, change in edit.changes.items():
        place = _place(name, change, stored, folder, edit)
        _refuse_other_place(place, stored, weights, folder)
        places[name] = place
    return places


def _place(
    name: str,
    change: TensorChange | RowScaling,
    stored: Mapping[str, list[TensorPlace]],
    folder: Path,
    edit: Edit,
) -> TensorPlace:
    namesakes = [stored[other][0] for other in stored if _in_layer(other) == _in_layer(name)]
    if len(namesakes) == 1:
        if namesakes[0].shape != change.shape:
            shape = namesakes[0].shape
            raise InputError(f"{name} is {shape} in {folder}, and {change.shape} in the edit's base")
        return namesakes[0]
    # Several models in one folder (of texts and of images), or a name that is another within the layer, too.
    numbers = _numbers(name)
    candidates = namesakes or [stored[other][0] for other in stored if _numbers(other) == numbers]
    known = [place for place in candidates if place.shape == change.shape]
    matches = [place for place in known if change.state(place.mapped(folder)) != "other"]
    if len(matches) == 1:
        return matches[0]
    if len(matches) > 1:
        raise InputError(
            f"{folder} holds {name} twice, as {matches[0].name} and as {matches[1].name}: which of them is loaded is "
            "not sure, so save the model anew (save_pretrained)"
        )
    if name in stored:
        return stored[name][0]
    raise InputError(
        f"{folder} has no tensor {name}, which this edit of {edit.facts['model']} changes, nor one of another name "
        "that holds the same: the loader may make it of others, and then `dean-interp edit export` writes the model"
    )


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


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]
