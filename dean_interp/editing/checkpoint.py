"""Edits of a Hugging Face checkpoint folder. The folder is copied, and the edited bytes are changed in the copy.

The model is not loaded: files are mapped into memory, so a checkpoint of 70 billion parameters needs disk space and
almost no memory. The new folder appears whole, by one rename, or not at all. The old one is never written to.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from dean_interp.editing.ablation import ablate
from dean_interp.editing.apply import apply_edit, edit_state, revert_edit
from dean_interp.editing.card_file import is_card, write_card
from dean_interp.editing.checkpoint_files import TensorPlace, all_files, unread_weights, weight_files
from dean_interp.editing.edit import Edit, joint_edit_state, refuse_state
from dean_interp.editing.matching import places_of
from dean_interp.editing.tensor_change import EditState
from dean_interp.errors import InputError
from dean_interp.files import atomic_folder
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel
from dean_interp.models.native_tokenizer import loaded_tokenizer, native_tokenizer
from dean_interp.models.notes import notes
from dean_interp.models.plain import save_model
from dean_interp.models.tokens import Template, encode
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.progress import progress_bar

log = logging.getLogger(__name__)

_PROMPT = "What should I keep in mind when I share a flat?"


def checkpoint_state(folder: str | Path, edit: Edit) -> EditState:
    """Whether a checkpoint folder is the edit's base, holds the edit, or is something else.

    Raises `InputError` where the folder has no safetensors files, or lacks a tensor of the edit.
    """
    states = tensor_states(folder, edit)
    return joint_edit_state(list(states.values()))


def tensor_states(folder: str | Path, edit: Edit) -> dict[str, EditState]:
    """The state of each tensor that the edit changes, by its name. Raises `InputError` as `checkpoint_state` does."""
    folder = Path(folder)
    return _states_at(places_of(folder, edit), folder, edit)


def _states_at(
    places: Mapping[str, TensorPlace],
    folder: Path,
    edit: Edit,
) -> dict[str, EditState]:
    states: dict[str, EditState] = {}
    for name, place in progress_bar(places.items(), desc="checking", unit="tensor", leave=False):
        states[name] = edit.changes[name].state(place.mapped(folder))
    return states


def apply_edit_to_checkpoint(folder: str | Path, edit: Edit, out: str | Path, *, card: str | None = None) -> None:
    """Write an edited copy of a checkpoint to a new folder: the weights that `transformers` loads are edited.

    Other weights in the folder (in another format, in subfolders, adapters) are left out; a warning names them. `card`
    is the text of a card that the new folder shall carry (`editing.card_file`).

    Raises:
        InputError: before anything is written, where the checkpoint is not the edit's base or holds the edit already,
            has no safetensors files, or `out` exists; after a full disk, with nothing left behind.
    """
    _write_copy(Path(folder), edit, Path(out), expected="base", card=card)


def revert_edit_in_checkpoint(folder: str | Path, edit: Edit, out: str | Path) -> None:
    """Write a copy of an edited checkpoint without the edit: its files are those of the base, byte for byte.

    The edit's card is left out. Raises `InputError` as `apply_edit_to_checkpoint` does, where the checkpoint does not
    hold the edit.
    """
    _write_copy(Path(folder), edit, Path(out), expected="edited")


@own_torch_settings()
def export(
    model: HookedModel,
    edit: Edit,
    out: str | Path,
    *,
    n_new_tokens: int = 24,
    card: str | None = None,
) -> dict[str, float | str]:
    """Write a model in memory with the edit as a checkpoint folder, load it in plain `transformers`, and compare.

    This is for models that are no checkpoint folder (a GGUF file). The model itself is left as it was. `card` is the
    text of a card that the folder shall carry (`editing.card_file`).

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
    plain = notes(model).plain
    if plain is None:
        raise InputError("this bridge was not made by load_model: give load_model the folder or the transformers model")
    refuse_existing(out)
    refuse_state(edit_state(model, edit), "base", edit, str(model.cfg.model_name))
    prompt = _prompt_tokens(model)
    # Where hooks do not do quite the same, the edited model itself gives the expected logits.
    expected = _hooked_logits(model, edit, prompt) if edit.equals_hooks else None
    apply_edit(model, edit)
    try:
        with atomic_folder(out) as part:
            save_model(plain, part)
            loaded_tokenizer(model).save_pretrained(part)
            if card is not None:
                write_card(part, card)
            if expected is None:
                expected = _logits(model, prompt)
            revert_edit(model, edit)
            return _compared(part, type(plain), model, prompt, expected, n_new_tokens=n_new_tokens)
    finally:
        if edit_state(model, edit) == "edited":
            revert_edit(model, edit)


def _compared(
    folder: Path,
    plain_class: type[PreTrainedModel],
    model: HookedModel,
    prompt: Tensor,
    expected: Tensor,
    *,
    n_new_tokens: int,
) -> dict[str, float | str]:
    """Load the written folder in plain `transformers`, compare its logits with `expected`, and generate.

    Raises `RuntimeError` where the logits differ by more than rounding, or the next token does.
    """
    dtype = next(model.parameters()).dtype
    plain: Any = plain_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    plain.to(prompt.device).eval()
    with torch.inference_mode():
        logits = plain(prompt).logits.float()
    difference = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    next_token = int(logits[0, -1].argmax())
    expected_token = int(expected[0, -1].argmax())
    # Differences that are no number are not within it either.
    is_near = difference <= tolerance * largest
    if not is_near or next_token != expected_token:
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
    answer_tokens = generated[0, prompt.shape[1] :]
    answer = str(tokenizer.decode(answer_tokens, skip_special_tokens=True))
    return {"largest_difference": difference, "largest_logit": largest, "answer": answer}


def _prompt_tokens(model: HookedModel) -> Int[Tensor, "batch pos"]:
    tokenizer = native_tokenizer(model)
    template: Template = "chat" if tokenizer.chat_template else "raw"
    encoded = encode(tokenizer, _PROMPT, [], template=template)
    return torch.tensor([encoded.prompt]).to(model.cfg.device)


def _hooked_logits(model: HookedModel, edit: Edit, prompt: Tensor) -> Tensor:
    selection, value = edit.hooked()
    with ablate(model, selection, value=value):
        return _logits(model, prompt)


@torch.inference_mode()
def _logits(model: HookedModel, prompt: Tensor) -> Tensor:
    return model(prompt, return_type="logits").float()


def _write_copy(folder: Path, edit: Edit, out: Path, *, expected: EditState, card: str | None = None) -> None:
    """Copy a folder whose state is `expected`, and write the edit's other values into the copy."""
    refuse_existing(out)
    places = places_of(folder, edit)
    states = _states_at(places, folder, edit)
    state = joint_edit_state(list(states.values()))
    refuse_state(state, expected, edit, str(folder))
    with atomic_folder(out) as part:
        files = _files_to_copy(folder)
        if expected == "edited":
            files = [file for file in files if not (file.parent == Path() and is_card(folder / file, edit))]
        for file in progress_bar(files, desc=f"copying {folder.name}", unit="file", leave=False):
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            # Links, as in the hub's cache, are followed: the copy holds files.
            shutil.copyfile(folder / file, part / file)
        for name, place in places.items():
            change = edit.changes[name]
            tensor = place.mapped(part, write=True)
            if expected == "base":
                change.write(tensor)
            else:
                change.undo(tensor)
        if card is not None:
            write_card(part, card)


def _files_to_copy(folder: Path) -> list[Path]:
    """Every file of a checkpoint but weights that are not loaded, which would carry the unedited model along."""
    unread = unread_weights(folder, weight_files(folder))
    if unread:
        names = ", ".join(map(str, unread))
        log.warning(
            "left out, since they hold weights that are not loaded from %s and so are not edited: %s", folder, names
        )
    return [file for file in all_files(folder) if file not in unread]


def refuse_existing(out: Path) -> None:
    """Raise `InputError` where an edited checkpoint cannot be written: its folder exists, or has none to lie in."""
    if out.exists():
        raise InputError(f"{out} exists: an edited checkpoint is written to a new folder, and the old one is kept")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"no folder {parent} to write {out.name} in")
