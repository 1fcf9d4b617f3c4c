"""One function that turns whatever a user has into a hooked model.

It gives a `TransformerBridge` on every TransformerLens version, and a `HookedTransformer` where the installed version
still has one and it is asked for, or brought. Weights stay raw (no LayerNorm folding, no centring), so they are the
checkpoint's own.
"""

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dean_interp.errors import InputError
from dean_interp.models.bridge import bridge_to, refuse_unknown_architecture
from dean_interp.models.chat_settings import ChatSettings
from dean_interp.models.demo import DEMO_MODEL, demo_model_folder
from dean_interp.models.devices import Device, is_map, one_device, refuse_device
from dean_interp.models.gguf_file import cache_folder, folder_of_gguf
from dean_interp.models.hooked_model import HookedModel, hooked_transformer_class, is_hooked_model
from dean_interp.models.merging import adapter_settings, has_tokenizer, merged
from dean_interp.models.native_tokenizer import note_text
from dean_interp.models.offload import named_values
from dean_interp.models.on_disk import read_whole, refuse_no_model
from dean_interp.models.plain_layers import refuse_adapters, refused_wrapper
from dean_interp.models.supported import (
    refuse_architecture,
    refuse_no_name,
    refuse_without_head,
    refuse_without_neurons,
    refuse_without_values,
    unknown_model,
)
from dean_interp.models.torch_settings import own_torch_settings, refuse_without_gradients

log = logging.getLogger(__name__)

Dtype = str | torch.dtype

# By the bytes of a number.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@own_torch_settings()
def load_model(
    name_or_folder_or_object: "str | Path | PreTrainedModel | HookedModel",
    *,
    device: Device = None,
    dtype: Dtype = "float32",
    hooked_transformer: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    chat: ChatSettings = ChatSettings(),  # noqa: B008 - frozen
) -> HookedModel:
    """A TransformerLens model, in evaluation mode, with raw weights.

    Args:
        name_or_folder_or_object: a name on the hub, a folder, a `.gguf` file (made a float32 folder once, which is kept
            in the cache), the demo model's name, a `transformers` model (wrapped, not copied), a TransformerLens model.
        device: `None` takes CUDA where there is one, else the CPU. `"auto"` lays the layers over all GPUs, host memory
            and disk, in this order; a mapping says where each module goes (`transformers`' `device_map`). Offloaded
            weights are fetched layer by layer. `"meta"` gives the shape alone. An object in memory stays where it is.
        dtype: `float32`, `float16` or `bfloat16`, as a name or a `torch.dtype`. An object in memory keeps its own.
        hooked_transformer: load a `HookedTransformer` (TransformerLens 3.9, by one of the names that it knows).
        tokenizer: the checkpoint's own, for a model in memory whose name leads to none.
        adapter: a folder (or hub name) with an adapter that `peft` saved, which is merged into the weights.
        trust_remote_code: run modelling code that comes with a checkpoint. Off unless asked for.
        chat: what the chat template is told: the day that it may write, and whether the model shall think.

    Raises:
        InputError: what cannot be loaded, before any weight is read wherever the configuration tells: an unknown name,
            dtype, device, date or switch; an encoder, experts without hooks, no head; no tokenizer, or one with tokens
            that have no embedding. Missing or unknown tensors, and an adapter that is not merged.
    """
    chat.check()
    source = name_or_folder_or_object
    if adapter is not None and (hooked_transformer or not isinstance(source, str | Path)):
        raise InputError("an adapter is merged into a model that is given by its name or folder, and becomes a bridge")
    model: HookedModel
    if is_hooked_model(source):
        model = source
    elif isinstance(source, PreTrainedModel):
        model = _bridge_to_object(source, tokenizer)
    elif not isinstance(source, str | Path):
        raise refused_wrapper(source)
    elif hooked_transformer:
        model = _load_hooked_transformer(str(source), device, _torch_dtype(dtype))
    else:
        model = _bridge_by_name(source, device, dtype, tokenizer, adapter, trust_remote_code)
    refuse_without_neurons(model)
    refuse_adapters(model, str(model.cfg.model_name))
    note_text(model, tokenizer, chat)
    return model.eval()


def _bridge_by_name(
    name: str | Path,
    device: Device,
    dtype: Dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: str | Path | None,
    trust_remote_code: bool,
) -> HookedModel:
    plain, native = load_plain(
        name, device=device, dtype=dtype, tokenizer=tokenizer, adapter=adapter, trust_remote_code=trust_remote_code
    )
    model = bridge_to(plain, native, name=_local_folder(str(name)), trust_remote_code=trust_remote_code)
    if adapter is not None:
        model.cfg.model_name = f"{model.cfg.model_name} with {adapter}"
    return model


@own_torch_settings()
def load_plain(
    name: str | Path,
    *,
    device: Device = None,
    dtype: Dtype = "float32",
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The `transformers` model that `load_model` would wrap, and its own tokenizer. Arguments and errors as there."""
    dtype = _torch_dtype(dtype)
    refuse_device(device)
    folder = _local_folder(str(name))
    # the configuration first: most models that are not supported are refused without reading a weight
    if os.path.isdir(folder):
        refuse_no_model(Path(folder))
    if adapter is not None:
        adapter_settings(adapter)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise unknown_model(str(name), error, (DEMO_MODEL,)) from error
    refuse_architecture(str(name), config)
    refuse_unknown_architecture(str(name), config)
    if device != "meta":
        log.info("loading %s", name)
    tokenizer_folder = str(adapter) if adapter and has_tokenizer(adapter) else folder
    try:
        if device == "meta":
            model = _shape_of(config, dtype, trust_remote_code)
        else:
            model = read_whole(
                str(name),
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                device_map=device if is_map(device) else None,
                offload_folder=cache_folder() / "offload",
            )
        native = tokenizer or AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # each of the readers of weights and tokens has errors of its own
        raise unknown_model(str(name), error) from error
    if adapter is not None and device != "meta":
        model = merged(model, str(name), adapter)
    if not (device in ("auto", "meta") or isinstance(device, Mapping)):
        torch.nn.Module.to(model, one_device(device))  # in place
    return model, native


def _shape_of(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
        )


def tokenizer_of(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of what `load_model` takes by name. Raises `InputError` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(_local_folder(str(name)))
    except (OSError, ValueError) as error:
        raise unknown_model(str(name), error) from error


def model_fingerprint(model: HookedModel) -> str:
    """SHA-256 over every parameter's name, shape and bits; changes when any weight changes, or two change places.

    Bits are added up as integers, so the value depends neither on threads nor on the device. They are added up along
    each axis: weights that change places, as where neurons are put in another order, change a sum.
    """
    refuse_without_values(model)
    return weights_fingerprint(model)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """As `model_fingerprint`, of a model that is not wrapped: its parameters may have other names."""
    digest = hashlib.sha256()
    for name, parameter in named_values(model):
        line = f"{name} {tuple(parameter.shape)}\n"
        digest.update(line.encode())
        integers = _INTEGERS[parameter.element_size()]
        bits = torch.atleast_1d(parameter.detach()).contiguous().view(integers)
        axes = range(bits.dim())
        for axis in axes:
            others = [other for other in axes if other != axis]
            sums = bits.sum(others, dtype=torch.int64) if others else bits.long()
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on."""
    packages = ("dean_interp", "torch", "transformers", "transformer_lens")
    return {name: importlib.metadata.version(name) for name in packages}


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    else:
        name = dtype
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def _local_folder(name: str) -> str:
    """What `from_pretrained` takes: GGUF files and the demo model are converted once, the rest passes through."""
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    if name.endswith(".gguf"):
        return str(folder_of_gguf(Path(name)))
    refuse_no_name(name, (DEMO_MODEL,))
    return name


def _load_hooked_transformer(name: str, device: Device, dtype: torch.dtype) -> HookedModel:
    """By name, raw weights; the two ways out are named where the installed TransformerLens has no such class."""
    if device == "auto" or isinstance(device, Mapping):
        raise InputError(f"a HookedTransformer lies on one device, got {device!r}: load a bridge")
    hooked_transformer = hooked_transformer_class()
    if hooked_transformer is None:
        version = importlib.metadata.version("transformer-lens")
        raise InputError(
            f"TransformerLens {version} has no HookedTransformer: either drop hooked_transformer=True (a "
            "TransformerBridge has the same hook names), or pip install 'transformer_lens==3.9.*'"
        )
    try:
        return hooked_transformer.from_pretrained_no_processing(name, device=one_device(device), dtype=dtype)
    except (OSError, ValueError) as error:
        raise unknown_model(name, error) from error


def _bridge_to_object(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> HookedModel:
    name = model.config._name_or_path or type(model).__name__
    refuse_architecture(name, model.config)
    refuse_without_head(name, model)
    refuse_without_gradients(model, name)
    refuse_adapters(model, name)
    # TransformerLens knows an architecture by the name of its class, which a model that was never saved has not noted.
    model.config.architectures = model.config.architectures or [type(model).__name__]
    refuse_unknown_architecture(name, model.config)
    return bridge_to(model, tokenizer or _tokenizer_of(model), name=name)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = model.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer for the {type(model).__name__} in memory (its name is {name!r}): pass tokenizer=..."
        ) from error
