"""Edits of a Hugging Face checkpoint folder, without loading the model: the bytes that change are changed in a copy.

Shards are copied as files and mapped into memory, so that a 70-billion-parameter checkpoint needs disk and next to no
memory. The new folder appears whole, by one rename, or not at all; the old one is never written to.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
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
from dean_interp.editing.edit import Edit, EditState, joint_edit_state, refuse_state, tensor_state
from dean_interp.errors import InputError
from dean_interp.files import atomic_folder, read_json
from dean_interp.models.load import HookedModel, is_hooked_transformer, native_tokenizer
from dean_interp.models.matrices import stored_names
from dean_interp.models.tokens import Template, encode
from dean_interp.progress import progress_bar

log = logging.getLogger(__name__)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_OTHER_FORMS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_PROMPT = "What should I keep in mind when I share a flat?"


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a checkpoint's files."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class _Index:
    """What is taken of a sharded checkpoint's index."""

    weight_map: dict[str, str]


def checkpoint_state(folder: str | Path, edit: Edit) -> EditState:
    """Whether a checkpoint folder is the edit's base, holds the edit, or is something else.

    Raises `InputError` where the folder has no safetensors files, or lacks a tensor that the edit changes.
    """
    return joint_edit_state(list(tensor_states(folder, edit).values()))


def tensor_states(folder: str | Path, edit: Edit) -> dict[str, EditState]:
    """The same for each tensor that the edit changes."""
    found: dict[str, EditState] = {}
    for name, place in progress_bar(_places(Path(folder), edit).items(), desc="checking", unit="tensor", leave=False):
        found[name] = tensor_state(_mapped(place), edit.changes[name])
    return found


def apply_to_checkpoint(edit: Edit, folder: str | Path, out: str | Path) -> None:
    """Write an edited copy of a checkpoint to a new folder. Weights in other forms (`.bin`, `.gguf`) are left out.

    Raises:
        InputError: before anything is written, where the checkpoint is not the edit's base or holds the edit already,
            has no safetensors files, or `out` exists; after a full disk, with nothing left behind.
    """
    _write_copy(edit, Path(folder), Path(out), expected="base")


def revert_checkpoint(edit: Edit, folder: str | Path, out: str | Path) -> None:
    """Write a copy of an edited checkpoint without the edit: its files are those of the base, byte for byte.

    Raises `InputError` as `apply_to_checkpoint` does, where the checkpoint does not hold the edit.
    """
    _write_copy(edit, Path(folder), Path(out), expected="edited")


def export(edit: Edit, model: HookedModel, out: str | Path, *, n_new_tokens: int = 24) -> dict[str, float | str]:
    """Write a model in memory with the edit as a checkpoint folder, load it in plain `transformers`, and compare.

    For models that are no checkpoint folder (a GGUF file). The model itself is left as it was.

    Returns:
        `largest_difference` of the logits to the hooked (or, for a changed bias, the edited) model's on a prompt, the
        `largest_logit`, and the `answer` of a real generation.

    Raises:
        InputError: a `HookedTransformer`, a model that is not the edit's base, a folder that exists.
        RuntimeError: the folder that was written gives other logits than the edit by hooks; it is removed again.
    """
    out = Path(out)
    if is_hooked_transformer(model):
        raise InputError("a HookedTransformer's tensors are no checkpoint's: load the model without hooked_transformer")
    _refuse_existing(out)
    refuse_state(edit_state(model, edit), "base", edit, str(model.cfg.model_name))
    prompt = torch.tensor([encode(native_tokenizer(model), _PROMPT, [], template=_template(model)).prompt])
    prompt = prompt.to(model.cfg.device)
    apply_edit(model, edit)
    try:
        with atomic_folder(out) as part:
            names = stored_names(model)
            state = {names[id(one)]: one.detach().cpu().contiguous() for one in model.original_model.parameters()}
            save_torch_state_dict(state, part, safe_serialization=True)
            model.original_model.config.save_pretrained(part)
            if model.original_model.generation_config is not None:
                model.original_model.generation_config.save_pretrained(part)
            native_tokenizer(model).save_pretrained(part)
            if any(change.is_bias for change in edit.changes.values()):
                expected = _logits(model, prompt)
                revert_edit(model, edit)
            else:
                revert_edit(model, edit)
                selection, value = edit.hooked()
                with ablate(model, selection, value=value):
                    expected = _logits(model, prompt)
            return _checked(part, model, prompt, expected, n_new_tokens)
    finally:
        if edit_state(model, edit) == "edited":
            revert_edit(model, edit)


def _checked(
    folder: Path, model: HookedModel, prompt: Tensor, expected: Tensor, n_new_tokens: int
) -> dict[str, float | str]:
    """What the written folder gives in plain `transformers`; an error where that is not what was expected."""
    dtype = next(model.parameters()).dtype
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    plain.to(prompt.device).eval()
    with torch.inference_mode():
        logits = plain(prompt).logits.float()
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if difference > tolerance * largest or not torch.equal(logits[0, -1].argmax(), expected[0, -1].argmax()):
        raise RuntimeError(f"the exported folder's logits differ by {difference:.3g} (largest logit {largest:.3g}) "
                           "from the edit by hooks: nothing was kept")  # fmt: skip
    tokenizer = native_tokenizer(model)
    written = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_new_tokens,
                             do_sample=False, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
    answer = str(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))
    return {"largest_difference": difference, "largest_logit": largest, "answer": answer}


@torch.inference_mode()
def _logits(model: HookedModel, prompt: Tensor) -> Tensor:
    return model(prompt, return_type="logits").float()


def _template(model: HookedModel) -> Template:
    return "chat" if native_tokenizer(model).chat_template else "raw"


def _write_copy(edit: Edit, folder: Path, out: Path, *, expected: EditState) -> None:
    _refuse_existing(out)
    places = _places(folder, edit)
    refuse_state(checkpoint_state(folder, edit), expected, edit, str(folder))
    with atomic_folder(out) as part:
        for file in progress_bar(_copied(folder), desc=f"copying {folder.name}", unit="file", leave=False):
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, part / file)  # links, as in the hub's cache, are followed
        for name, place in places.items():
            change = edit.changes[name]
            values = change.new if expected == "base" else change.old
            tensor = _mapped(place, folder=part, write=True).view(-1)
            tensor[change.indices] = values.to(tensor.dtype)


def _copied(folder: Path) -> list[Path]:
    """Every file of a checkpoint but the same weights in other forms, which would stay as they were."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    others = [file for file in files if file.suffix in _OTHER_FORMS]
    if others:
        log.warning("left out, since they hold weights in a form that edits are not written into: %s",
                    ", ".join(map(str, others)))  # fmt: skip
    return [file for file in files if file not in others]


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists: an edited checkpoint is written to a new folder, and the old one is kept")
    if not out.absolute().parent.is_dir():
        raise InputError(f"no folder {out.absolute().parent} to write {out.name} in")


def _places(folder: Path, edit: Edit) -> dict[str, _Place]:
    """Where each tensor of an edit lies. Some checkpoints leave out, or add, the name of the model's body."""
    known = _tensors(folder)
    found = {}
    for name, change in edit.changes.items():
        matches = [key for key in known if key == name] or [
            key for key in known if name.endswith(f".{key}") or key.endswith(f".{name}")
        ]
        if len(matches) != 1:
            raise InputError(f"{folder} has no tensor {name}, which this edit of {edit.facts['model']} changes")
        place = known[matches[0]]
        if place.shape != change.shape:
            raise InputError(f"{name} is {place.shape} in {folder}, and {change.shape} in the edit's base")
        found[name] = place
    return found


def _tensors(folder: Path) -> Mapping[str, _Place]:
    """Every tensor in a folder's safetensors files, by its name there."""
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}")
    index, names = folder / _INDEX, {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index, _Index).weight_map.values())
    outside = [name for name in names if name != Path(name).name or name == ".."]
    if outside:
        raise InputError(f"{index} is damaged: it names {min(outside)!r:.60}, which is no file in its folder")
    files = [folder / name for name in sorted(names)]
    missing = [file.name for file in files if not os.path.isfile(file)]  # bears a name that no file can have
    if missing:
        raise InputError(
            f"{folder} has no {missing[0]:.60}: edits are written into safetensors checkpoints (save_pretrained)"
        )
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # it checks that the header fits the file
                pass
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error})") from error
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, one in header.items():
            if name != "__metadata__" and one["dtype"] in _DTYPES:
                start, end = (8 + length + offset for offset in one["data_offsets"])
                found[name] = _Place(file, _DTYPES[one["dtype"]], tuple(one["shape"]), start, end)
    return found


def _mapped(place: _Place, *, folder: Path | None = None, write: bool = False) -> Float[Tensor, "..."]:
    """A tensor of a checkpoint file, read (and written) where it lies; `folder` holds a copy of the file."""
    file = (folder or place.file.parent) / place.file.name
    mode = "r+" if write else "c"  # "c": torch wants memory that it could write to, and the file stays as it is
    mapped = np.memmap(file, dtype=np.uint8, mode=mode, offset=place.start, shape=(place.end - place.start,))
    return torch.from_numpy(mapped).view(place.dtype).reshape(place.shape)
