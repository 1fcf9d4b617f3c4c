"""An adapter that `peft` saved becomes part of the weights of the model that it was trained on."""

import importlib.util
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from dean_interp.errors import InputError, first_line
from dean_interp.files import refuse_unreadable
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.on_disk import ADAPTER_CONFIG

_READING = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def adapter_settings(adapter: str | Path) -> Any:  # noqa: ANN401 - a class of peft's
    """What an adapter's `adapter_config.json` says.

    Raises `InputError` where `peft` is missing, there is no adapter, or it is of a kind that is no part of the weights.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("an adapter needs the package peft: pip install 'dean_interp[tuning]'")
    from peft import PeftConfig

    folder = Path(adapter)
    if folder.is_dir():
        if not (folder / ADAPTER_CONFIG).is_file():
            raise InputError(f"'{adapter}' is no adapter: it has no {ADAPTER_CONFIG}")
        for file in sorted(folder.glob("adapter_*")):
            refuse_unreadable(file)
    try:
        settings: Any = PeftConfig.from_pretrained(str(adapter))
    except _READING as error:
        raise InputError(f"cannot read the adapter '{adapter}': {first_line(error)}") from error
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise InputError(
            f"the adapter '{adapter}' is {settings.peft_type.value}, which adds to what the model reads and is no part "
            "of its weights: it cannot be merged, and so not be scored or edited"
        )
    return settings


def has_tokenizer(adapter: str | Path) -> bool:
    """Whether an adapter's folder holds the tokenizer whose tokens it was trained on."""
    return (Path(adapter) / "tokenizer_config.json").is_file()


def merged(model: PreTrainedModel, name: str, adapter: str | Path) -> PreTrainedModel:
    """The model with the adapter merged into its weights, in place.

    Raises `InputError` as `adapter_settings`, where it does not fit the model, or where weights are offloaded.
    """
    settings = adapter_settings(adapter)
    refuse_offloaded(model, "merging an adapter")
    from peft import PeftModel

    try:
        attached: Any = PeftModel(model, settings)
        loaded = attached.load_adapter(str(adapter), "default", torch_device=str(model.device))
        left_out = [*loaded.missing_keys, *loaded.unexpected_keys]
        whole = None if left_out else attached.merge_and_unload(safe_merge=True)
    except _READING as error:
        raise InputError(f"the adapter '{adapter}' does not fit '{name}': {first_line(error)}") from error
    if whole is None:
        raise InputError(
            f"the adapter '{adapter}' does not fit '{name}': {len(left_out)} of its tensors are missing or unknown, "
            f"{left_out[0]} the first"
        )
    return whole
