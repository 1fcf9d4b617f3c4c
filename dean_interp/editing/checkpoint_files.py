"""Which files of a checkpoint folder a loader reads, where each tensor lies in them, and which weights it never reads.

A folder may hold one model several times: as `model.safetensors`, in shards with an index, under a variant's name, as
`consolidated.safetensors`, in other formats. `transformers.from_pretrained` reads one of these, and no other loader is
promised more. So an edit goes into exactly these files, and what would carry the unedited model along is named.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from dean_interp.errors import InputError
from dean_interp.files import read_json, refuse_unreadable

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX_SUFFIX = ".safetensors.index.json"
_OF_ONE_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""A file of a checkpoint that several ranks saved; where there is one `transformers` reads these, and nothing else."""
_FORMS_OF_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .onnx .onnx_data .data .msgpack .h5 .hdf5 .keras .pb .tflite .ot "
    ".npz .npy .distcp .mlmodel .pte .engine .pdparams .params .nemo .task .litertlm .pkl .pickle".split()
)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a checkpoint: its bytes are `start` to `end` of `file`.

    It may be a part of what is stored there: `index` says which, as in `stored[index]`.
    """

    name: str
    file: Path
    """The file's path, relative to the folder."""
    dtype: str
    """The number format, as safetensors names it."""
    shape: tuple[int, ...]
    """The shape of all that is stored."""
    start: int
    end: int
    index: tuple[int | slice, ...] = ()
    is_turned: bool = False
    """Whether the tensor is the transpose of that part."""

    def mapped(self, folder: Path, *, write: bool = False) -> Float[Tensor, "..."]:
        """The tensor in a folder, read (and written) where it lies.

        Raises `InputError` where its numbers are of a format that edits are not written into.
        """
        if self.dtype not in _DTYPES:
            raise InputError(
                f"{self.name} holds {self.dtype} in {folder / self.file}: edits are written into {', '.join(_DTYPES)}, "
                "so save the model in one of these, and make the edit from that folder"
            )
        mapped = np.memmap(
            folder / self.file,
            dtype=np.uint8,
            # Mode "c": torch wants memory that it could write to, and the file stays as it is.
            mode="r+" if write else "c",
            offset=self.start,
            shape=(self.end - self.start,),
        )
        numbers = torch.from_numpy(mapped).view(_DTYPES[self.dtype])
        part = numbers.reshape(self.shape)[self.index]
        return part.mT if self.is_turned else part


@dataclass(frozen=True)
class WeightFiles:
    """The files of a folder that a loader reads weights from, relative to the folder."""

    files: tuple[Path, ...]
    index: Path | None
    """What names the files of a sharded checkpoint."""
    weight_map: Mapping[str, str]
    """By tensor, the file that the index names; empty without an index."""


@dataclass(frozen=True)
class _Index:
    """The part of a sharded checkpoint's index that is read."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class _Config:
    """The part of a model's configuration that is read."""

    transformers_weights: str | None = None
    """The one file, or index, that the loader is to read."""


def weight_files(folder: Path) -> WeightFiles:
    """The files that `transformers` loads from a folder, in its own order: one file before an index with its shards.

    Raises `InputError` where that is no safetensors checkpoint, or an index names what is not there.
    """
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}")
    of_ranks = sorted(filter(_OF_ONE_RANK.fullmatch, os.listdir(folder)))
    if of_ranks:
        raise InputError(f"{folder} holds shards of single ranks ({of_ranks[0]}), which take no edit: save it whole")
    chosen = _chosen_file(folder)
    if not chosen.endswith(_INDEX_SUFFIX):
        return WeightFiles((Path(chosen),), None, {})
    return _sharded(folder, chosen)


def _sharded(folder: Path, index_name: str) -> WeightFiles:
    """The shards that an index names."""
    index = folder / index_name
    weight_map = read_json(index, _Index).weight_map
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if name != Path(name).name or name == ".."]
    if outside:
        raise InputError(f"{index} is damaged: it names {min(outside)!r:.60}, which is no file in its folder")
    # Unlike `Path.is_file`, `os.path.isfile` does not raise for a name that no file can have.
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise InputError(f"{folder} has no {missing[0]!r:.60}, which {index.name} names: the checkpoint is incomplete")
    return WeightFiles(tuple(map(Path, names)), Path(index_name), weight_map)


def _chosen_file(folder: Path) -> str:
    """The safetensors file or index that `transformers` reads, by its rules."""
    named = _named_file(folder)
    if named is not None:
        return named
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            return name
    what = SAFE_WEIGHTS_NAME
    for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            what = f"{SAFE_WEIGHTS_NAME}, but {name}"
            break
    raise InputError(
        f"{folder} has no {what}: edits are written into safetensors checkpoints. `dean-interp edit export` writes a "
        "model that loads as one"
    )


def _named_file(folder: Path) -> str | None:
    """The file or index that the model's configuration names, or None where it names none."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        return None
    name = read_json(config, _Config).transformers_weights
    if name is None:
        return None
    is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not is_inside or not name.endswith((".safetensors", _INDEX_SUFFIX)):
        raise InputError(f"{config} names the weights {name!r:.60}, which is no safetensors file in its folder")
    if not os.path.isfile(folder / name):
        raise InputError(f"{folder} has no {name:.60}, which {CONFIG_NAME} names as its weights")
    return name


def stored_tensors(folder: Path, weights: WeightFiles) -> dict[str, list[TensorPlace]]:
    """Every place of every tensor in the files that are loaded, by its name there. It has two where two files hold it.

    Raises `InputError` for a damaged file.
    """
    places: dict[str, list[TensorPlace]] = defaultdict(list)
    for file in weights.files:
        path = folder / file
        refuse_unreadable(path)
        # `safe_open` checks that the header fits the file.
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error})") from error
        # A file begins with the length of its header (8 bytes), then the header; offsets count from the header's end.
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            place = TensorPlace(
                name=name,
                file=file,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=8 + length + start,
                end=8 + length + end,
            )
            places[name].append(place)
    return places


def unread_weights(folder: Path, weights: WeightFiles) -> list[Path]:
    """The files of a folder that hold weights, or say where they are, and are not loaded; relative to the folder.

    An adapter is among them: it is put on top of weights that the edit did not have beneath it. So is what lies in
    hidden folders, where version control keeps the files as they were.
    """
    read = {*weights.files, weights.index}
    return [file for file in all_files(folder) if file not in read and _may_hold_weights(file)]


def all_files(folder: Path) -> list[Path]:
    """Every file of a folder and of the folders in it, relative to it; links are what they lead to.

    A link that leads back to a folder around it is passed over: what it shows is listed without it.
    """
    files = []
    for name, folders, names in os.walk(folder, followlinks=True):
        inside = Path(name)
        around = {path.resolve() for path in (inside, *inside.absolute().parents)}
        folders[:] = [inner for inner in folders if (inside / inner).resolve() not in around]
        files += [(inside / file).relative_to(folder) for file in names if (inside / file).is_file()]
    return sorted(files)


def _may_hold_weights(file: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.parts[:-1])
    # All suffixes: a copy (`model.safetensors.bak`) and an index (`pytorch_model.bin.index.json`) have two or more.
    # Texts are told by their last one, since `.pt` may be a language (`README.pt.md`).
    suffixes = {suffix.lower() for suffix in file.suffixes}
    has_form = not _FORMS_OF_WEIGHTS.isdisjoint(suffixes) and file.suffix != ".md"
    return is_hidden or has_form or file.name == ADAPTER_CONFIG_NAME
