"""Whether a folder holds a model, and whether the model that was made of it is the one on disk.

`transformers` fills a tensor that it does not find with random numbers, drops one that it does not know, and goes on.
What lies beside a text model and is not part of it (a vision tower, a head that scores, layers that predict further
tokens, buffers of old versions) may be dropped.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dean_interp.errors import InputError
from dean_interp.files import refuse_unreadable

ADAPTER_CONFIG = "adapter_config.json"
_N_SHOWN = 3
_BUFFERS = re.compile(
    r"rotary\w*\.inv_freq|\binv_freq|\bposition_ids|\b(self_)?attn(\.attention)?\.(bias|masked_bias|causal_mask)"
    r"|\battention\.(bias|masked_bias)|\bsummary\.\w+"
)
_OTHER_PARTS = re.compile(
    r"mtp\w*|nextn\w*|medusa\w*|eagle\w*|\w*vision\w*|visual|\w*image\w*|\w*video\w*|\w*audio\w*|\w*speech\w*"
    r"|\w*projector|mm_\w+|multi_?modal\w*|v_head|score|classifier|qa_outputs|regression\w*|(?!lm_head$)\w+_head"
)
_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def refuse_no_model(folder: Path) -> None:
    """Raise `InputError` where a local folder is an adapter, holds no model, or pointers in place of files."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"'{folder}' is an adapter ({ADAPTER_CONFIG}), not a model: load the model that it was trained on, with "
            f"adapter='{folder}' (--adapter {folder}), which merges it"
        )
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = "save_pretrained writes one"
        if inner:
            shown = ", ".join(inner[:_N_SHOWN])
            hint = f"it holds {shown}: name one of them"
        raise InputError(f"'{folder}' holds no model, since it has no config.json; {hint}")
    for file in sorted(folder.iterdir()):
        if file.is_file():
            refuse_unreadable(file)


def read_whole(
    name: str,
    folder: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, str | int] | None,
    offload_folder: Path,
) -> PreTrainedModel:
    """The model of a folder, or of a name on the hub, whose weights are all that is there.

    Raises `InputError` as `refuse_other_weights`, and what its readers raise.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        # with a report of what was missing, unknown, or of another shape
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        offload_folder=None if device_map is None else str(offload_folder),
    )
    model, info = loaded
    refuse_other_weights(name, model, info)
    return model


def refuse_other_weights(name: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Raise `InputError` where tensors are missing on disk, of another shape, or left out of the model.

    Args:
        name: of the model, for the message.
        model: what was made of it.
        info: what `from_pretrained(output_loading_info=True)` says of it, after what `transformers` ignores: tied
            tensors, and those that the model's class names.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not _is_beside(key, model))
    mismatched = [_shapes(*each) for each in sorted(info["mismatched_keys"])]
    faults = [
        _counted(missing, "missing"),
        _counted(mismatched, "of another shape"),
        _counted(unexpected, "unknown to it"),
    ]
    said = [fault for fault in faults if fault]
    if said:
        raise InputError(
            f"the weights of '{name}' are not those of a {type(model).__name__} with its config.json: "
            f"{'; '.join(said)}. What is measured would not be what is on disk"
        )


def _counted(keys: Sequence[str], fault: str) -> str:
    """What is wrong with some tensors, in words; empty where there are none."""
    if not keys:
        return ""
    shown = ", ".join(keys[:_N_SHOWN])
    rest = ", …" if len(keys) > _N_SHOWN else ""
    noun = "tensor is" if len(keys) == 1 else "tensors are"
    return f"{len(keys)} {noun} {fault} ({shown}{rest})"


def _shapes(key: str, on_disk: Collection[int], in_model: Collection[int]) -> str:
    """How a tensor's shapes differ, in words."""
    return f"{key}: {tuple(on_disk)} on disk, {tuple(in_model)} in the model"


def _is_beside(key: str, model: nn.Module) -> bool:
    """Whether a tensor belongs to something beside the text model, or is a buffer that is computed."""
    if _BUFFERS.search(key) or _is_extra_layer(key, model):
        return True
    # The first part of its path that the model does not have says what it belongs to.
    owner: Any = model
    for part in key.split("."):
        if not hasattr(owner, part):
            return _OTHER_PARTS.fullmatch(part) is not None
        owner = getattr(owner, part)
    return False


def _is_extra_layer(key: str, model: Any) -> bool:  # noqa: ANN401 - a model of transformers
    """Whether a tensor is of a layer behind the last one, which the configuration says predicts further tokens."""
    layer = re.search(r"\blayers\.(\d+)\.", key)
    n_layers = getattr(model.config, "num_hidden_layers", None)
    if layer is None or n_layers is None:
        return False
    n_extra = max((getattr(model.config, field, None) or 0) for field in _EXTRA_LAYERS)
    return n_layers <= int(layer[1]) < n_layers + n_extra
