"""The device that a model goes to, checked before anything is read for it."""

from collections.abc import Mapping
from typing import TypeGuard

import torch

from dean_interp.errors import InputError, first_line

Device = str | torch.device | Mapping[str, str | int] | None


def is_map(device: Device) -> TypeGuard[str | Mapping[str, str | int]]:
    """Whether layers go to several places: `auto`, or a mapping that says where each module goes."""
    return device == "auto" or isinstance(device, Mapping)


def refuse_device(device: Device) -> None:
    """Raise `InputError` for a device that this machine, or this installation of torch, does not have."""
    if device == "auto":
        return
    if isinstance(device, Mapping):
        places = {*device.values()} - {"disk"}
        for place in places:
            _refuse_place(place)
    else:
        one_device(device)


def one_device(device: str | torch.device | None) -> torch.device:
    """The device by its name; None takes CUDA where there is one, else the CPU. Raises `InputError` as above."""
    if device is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)
    return _refuse_place(device)


def _refuse_place(place: str | int | torch.device) -> torch.device:
    """The device of a name. Raises `InputError` where it is not there."""
    try:
        device = torch.device(place)
        torch.empty(0, device=device)
    # Each kind of device says in its own kind of error that it is not there
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = first_line(error)
        raise InputError(f"device {str(place)!r} is not there: take 'cpu', or another that is ({reason})") from error
    return device
