"""Edits of a Hugging Face checkpoint folder. The folder is copied, and the edited bytes are changed in the copy.

The model is not loaded: files are mapped into memory, so a checkpoint of 70 billion parameters needs disk space and
almost no memory. The new folder appears whole, by one rename, or not at all. The old one is never written to.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dean_interp.editing.ablation import ablate
from dean_interp.editing.apply import apply_edit, edit_state, revert_edit
from dean_interp.editing.edit import Edit, joint_edit_state, refuse_state
from dean_interp.editing.tensor_change import EditState
from dean_interp.errors import InputError
from dean_interp.files import atomic_folder, read_json
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel, loaded_tokenizer, native_tokenizer
from dean_interp.models.matrices import stored_names
from dean_interp.models.tokens import Template, encode
from dean_interp.progress import progress_bar

log = logging.getLogger(__name__)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_OTHER_FORMS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_PROMPT = "What should I keep in mind when I share a flat?"


@dataclass(frozen=True)
class _Location:
    """Where a tensor lies in a checkpoint's files: its bytes are `start` to `end` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class _Index:
    """The part of a sharded checkpoint's index that is read."""

    weight_map: dict[str, str]


def checkpoint_state(folder: str | Path, edit: Edit) -> EditState:
    """Whether a checkpoint folder is the edit's base, holds the edit, or is something else.

    Raises `InputError` where the folder has no safetensors files, or lacks a tensor that the edit changes.
    """
    return joint_edit_state(list(tensor_states(folder, edit).values()))


def tensor_states(folder: str | Path, edit: Edit) -> dict[str, EditState]:
    """The state of each tensor that the edit changes, by its name. Raises `InputError` as `checkpoint_state` does."""
    locations = _locations(Path(folder), edit)
    states: dict[str, EditState] = {}
    for name, location in progress_bar(locations.items(), desc="checking", unit="tensor", leave=False):
        states[name] = edit.changes[name].state(_mapped(location))
    return states


def apply_edit_to_checkpoint(folder: str | Path, edit: Edit, out: str | Path) -> None:
    """Write an edited copy of a checkpoint to a new folder. Weights in other forms (`.bin`, `.gguf`) are left out.

    Raises:
        InputError: before anything is written, where the checkpoint is not the edit's base or holds the edit already,
            has no safetensors files, or `out` exists; after a full disk, with nothing left behind.
    """
    _write_copy(Path(folder), edit, Path(out), expected="base")


def revert_edit_in_checkpoint(folder: str | Path, edit: Edit, out: str | Path) -> None:
    """Write a copy of an edited checkpoint without the edit: its files are those of the base, byte for byte.

    Raises `InputError` as `apply_edit_to_checkpoint` does, where the checkpoint does not hold the edit.
    """
    _write_copy(Path(folder), edit, Path(out), expected="edited")


def export(model: HookedModel, edit: Edit, out: str | Path, *, n_new_tokens: int = 24) -> dict[str, float | str]:
    """Write a model in memory with the edit as a checkpoint folder, load it in plain `transformers`, and compare.

    This is for models that are no checkpoint folder (a GGUF file). The model itself is left as it was.

    Returns:
        `largest_difference` of the logits to the hooked model's on a prompt (or, for changed biases and products that
        are rounded to half precision, to the edited model's), the `largest_logit`, and the `answer` of a real
        generation.

    Raises:
        InputError: a `HookedTransformer`, a model that is not the edit's base, a folder that exists.
        RuntimeError: the folder that was written gives other logits than the edit by hooks; it is removed again.
    """
    out = Path(out)
    adapter = adapter_of(model)
    if not adapter.wraps_checkpoint:
        raise InputError(f"a {adapter.kind}'s tensors are no checkpoint's: load the model without hooked_transformer")
    _refuse_existing(out)
    refuse_state(edit_state(model, edit), "base", edit, str(model.cfg.model_name))
    prompt = torch.tensor([encode(native_tokenizer(model), _PROMPT, [], template=_template(model)).prompt])
    prompt = prompt.to(model.cfg.device)
    apply_edit(model, edit)
    try:
        with atomic_folder(out) as part:
            _save_checkpoint(model, part)
            # Where hooks do not do quite the same, the edited model itself gives the expected logits.
            edited_logits = None if edit.equals_hooks else _logits(model, prompt)
            revert_edit(model, edit)
            expected = _hooked_logits(model, edit, prompt) if edited_logits is None else edited_logits
            return _compared(part, model, prompt, expected, n_new_tokens=n_new_tokens)
    finally:
        if edit_state(model, edit) == "edited":
            revert_edit(model, edit)


def _save_checkpoint(model: HookedModel, folder: Path) -> None:
    """Write a bridge's parameters, config and tokenizer into a folder, as `save_pretrained` would."""
    names = stored_names(model)
    tensors = {}
    for parameter in model.original_model.parameters():
        tensors[names[id(parameter)]] = parameter.detach().cpu().contiguous()
    save_torch_state_dict(tensors, folder, safe_serialization=True)
    model.original_model.config.save_pretrained(folder)
    if model.original_model.generation_config is not None:
        model.original_model.generation_config.save_pretrained(folder)
    loaded_tokenizer(model).save_pretrained(folder)


def _compared(
    folder: Path, model: HookedModel, prompt: Tensor, expected: Tensor, *, n_new_tokens: int
) -> dict[str, float | str]:
    """Load the written folder in plain `transformers`, compare its logits with `expected`, and generate.

    Raises `RuntimeError` where the logits differ by more than rounding, or the next token does.
    """
    dtype = next(model.parameters()).dtype
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    plain.to(prompt.device).eval()
    with torch.inference_mode():
        logits = plain(prompt).logits.float()
    difference = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    same_next_token = torch.equal(logits[0, -1].argmax(), expected[0, -1].argmax())
    if difference > tolerance * largest or not same_next_token:
        raise RuntimeError(
            f"the exported folder's logits differ by {difference:.3g} (largest logit {largest:.3g}) "
            "from the edit by hooks: nothing was kept"
        )
    tokenizer = native_tokenizer(model)
    generated = plain.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    answer = str(tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True))
    return {"largest_difference": difference, "largest_logit": largest, "answer": answer}


def _hooked_logits(model: HookedModel, edit: Edit, prompt: Tensor) -> Tensor:
    selection, value = edit.hooked()
    with ablate(model, selection, value=value):
        return _logits(model, prompt)


@torch.inference_mode()
def _logits(model: HookedModel, prompt: Tensor) -> Tensor:
    return model(prompt, return_type="logits").float()


def _template(model: HookedModel) -> Template:
    return "chat" if native_tokenizer(model).chat_template else "raw"


def _write_copy(folder: Path, edit: Edit, out: Path, *, expected: EditState) -> None:
    """Copy a folder whose state is `expected`, and write the edit's other values into the copy."""
    _refuse_existing(out)
    locations = _locations(folder, edit)
    refuse_state(checkpoint_state(folder, edit), expected, edit, str(folder))
    with atomic_folder(out) as part:
        for file in progress_bar(_files_to_copy(folder), desc=f"copying {folder.name}", unit="file", leave=False):
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            # Links, as in the hub's cache, are followed.
            shutil.copyfile(folder / file, part / file)
        for name, location in locations.items():
            change = edit.changes[name]
            write = change.write if expected == "base" else change.undo
            write(_mapped(location, folder=part, write=True))


def _files_to_copy(folder: Path) -> list[Path]:
    """Every file of a checkpoint but the same weights in other forms, which would not be edited."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    unedited = [file for file in files if file.suffix in _OTHER_FORMS]
    if unedited:
        log.warning(
            "left out, since they hold weights in a form that edits are not written into: %s",
            ", ".join(map(str, unedited)),
        )
    return [file for file in files if file not in unedited]


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists: an edited checkpoint is written to a new folder, and the old one is kept")
    if not out.absolute().parent.is_dir():
        raise InputError(f"no folder {out.absolute().parent} to write {out.name} in")


def _locations(folder: Path, edit: Edit) -> dict[str, _Location]:
    """Where each tensor of an edit lies in a checkpoint, by the edit's name of it."""
    stored = _stored_tensors(folder)
    locations = {}
    for name, change in edit.changes.items():
        matches = [name] if name in stored else _names_but_for_prefix(name, stored)
        if len(matches) != 1:
            raise InputError(f"{folder} has no tensor {name}, which this edit of {edit.facts['model']} changes")
        location = stored[matches[0]]
        if location.shape != change.shape:
            raise InputError(f"{name} is {location.shape} in {folder}, and {change.shape} in the edit's base")
        locations[name] = location
    return locations


def _names_but_for_prefix(name: str, stored: Iterable[str]) -> list[str]:
    """Some checkpoints leave out, or add, the name of the model's body in front of a tensor's name."""
    return [other for other in stored if name.endswith(f".{other}") or other.endswith(f".{name}")]


def _stored_tensors(folder: Path) -> Mapping[str, _Location]:
    """Every tensor in a folder's safetensors files, by its name there."""
    locations = {}
    for file in _safetensors_files(folder):
        # `safe_open` checks that the header fits the file.
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error})") from error
        # A file begins with the length of its header (8 bytes), then the header; offsets count from the header's end.
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                locations[name] = _Location(file=file, dtype=dtype, shape=shape, start=start, end=end)
    return locations


def _safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files: those that its index names, or the one file of a small checkpoint."""
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}")
    index = folder / _INDEX
    names = set(read_json(index, _Index).weight_map.values()) if index.is_file() else {"model.safetensors"}
    outside = [name for name in names if name != Path(name).name or name == ".."]
    if outside:
        raise InputError(f"{index} is damaged: it names {min(outside)!r:.60}, which is no file in its folder")
    files = [folder / name for name in sorted(names)]
    # Unlike `Path.is_file`, `os.path.isfile` does not raise for a name that no file can have.
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise InputError(
            f"{folder} has no {missing[0]:.60}: edits are written into safetensors checkpoints (save_pretrained)"
        )
    return files


def _mapped(location: _Location, *, folder: Path | None = None, write: bool = False) -> Float[Tensor, "..."]:
    """A tensor of a checkpoint file, read (and written) where it lies. `folder` holds a copy of the file."""
    file = (folder or location.file.parent) / location.file.name
    # Mode "c": torch wants memory that it could write to, and the file stays as it is.
    mode = "r+" if write else "c"
    n_bytes = location.end - location.start
    mapped = np.memmap(file, dtype=np.uint8, mode=mode, offset=location.start, shape=(n_bytes,))
    return torch.from_numpy(mapped).view(location.dtype).reshape(location.shape)
