"""Puts a model of `transformers` behind a `TransformerBridge`, in place."""

import copy
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.notes import notes


def bridge_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, trust_remote_code: bool = False
) -> TransformerBridge:
    """The model behind a bridge. Attention becomes eager, or attention hooks and masks would not be honoured.

    Args:
        model: it is wrapped, not copied.
        tokenizer: the checkpoint's own; the bridge gets a copy, and the model's notes keep this one.
        name: a folder or a name on the hub, from which TransformerLens reads the configuration.
        trust_remote_code: whether TransformerLens may run code that comes with the checkpoint.
    """
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    # TransformerLens reloads every tokenizer by its name with a forced BOS, unless it believes that it has one.
    bridge_tokenizer = copy.deepcopy(tokenizer)
    bridge_tokenizer.init_kwargs |= {"add_bos_token": True, "name_or_path": tokenizer.name_or_path}
    device = _input_device(model)
    with _without_mixed_device_map(model):
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=bridge_tokenizer, device=device, trust_remote_code=trust_remote_code
        )
    bridge.cfg.device = device
    notes(bridge).tokenizer = tokenizer
    return bridge


def refuse_unknown_architecture(name: str, config: PretrainedConfig) -> None:
    """Raise `InputError` where TransformerLens has no bridge for what a configuration describes."""
    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        version = importlib.metadata.version("transformer-lens")
        kind = (config.architectures or [type(config).__name__])[0]
        raise InputError(f"'{name}' is a {kind}, which TransformerLens {version} does not know") from error


def _input_device(model: PreTrainedModel) -> str:
    """The device that tokens go to: that of the embedding, or the one that its offloaded weights are brought to."""
    embedding: Any = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None) if embedding.weight.is_meta else None
    return str(torch.device(hook.execution_device) if hook else embedding.weight.device)


@contextmanager
def _without_mixed_device_map(model: Any) -> Iterator[None]:  # noqa: ANN401 - with accelerate's notes on it
    """While open, the model shows no map of GPUs and host memory, which TransformerLens refuses.

    TransformerLens refuses such a map because it was never tried there; here it was.
    """
    device_map = getattr(model, "hf_device_map", None)
    devices = {str(device) for device in (device_map or {}).values()}
    is_mixed = bool({"cpu", "disk"} & devices)
    if is_mixed:
        del model.hf_device_map
    try:
        yield
    finally:
        if is_mixed:
            model.hf_device_map = device_map
