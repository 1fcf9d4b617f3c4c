"""Tensors in a safetensors file that says what it is. It appears whole or not at all; another kind is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dean_interp.errors import InputError


def write_tensors(path: str | Path, form: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors with their format (`dean_interp.scores.1`) and facts that JSON can hold."""
    unfinished = Path(path).with_suffix(".part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, unfinished, {"format": form, "facts": json.dumps(facts)})
    unfinished.replace(path)


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts. Raises `InputError` where the file is missing, damaged, or of another format."""
    what = form.split(".")[1]
    if not Path(path).is_file():
        raise InputError(f"no {what} file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise InputError(f"{path} is not a {what} file of this version ({form}), got {metadata.get('format')}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, json.loads(metadata["facts"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or not a {what} file ({error})") from error
