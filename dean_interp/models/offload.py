"""Weights that are away: in host memory or on disk, where a model is larger than the devices that compute.

`accelerate` brings a module's weights for its own pass and takes them away after it; in between the parameter is on the
`meta` device and holds nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

from dean_interp.errors import InputError


def values(module: nn.Module, name: str = "weight") -> Tensor:
    """What a module's parameter holds, wherever it is: the parameter itself, or a copy on the CPU where it is away."""
    parameter = getattr(module, name)
    hook: Any = _brings(module) if parameter.is_meta else None
    return parameter if hook is None else hook.weights_map[name]


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and values, one at a time and a tied one once, as `named_parameters` would give them."""
    seen: set[tuple[int, str] | int] = set()
    tied = _tied(model)
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (parameter.is_meta and (id(module), name) in tied):
                continue
            key = (id(module), name) if parameter.is_meta else id(parameter)
            if key not in seen:
                seen.add(key)
                yield f"{prefix}.{name}" if prefix else name, values(module, name)


def is_offloaded(model: nn.Module) -> bool:
    """Whether any of the model's weights is."""
    return any(parameter.is_meta for parameter in model.parameters())


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raise `InputError` where something needs all weights at once and some are away."""
    if is_offloaded(model):
        raise InputError(f"{what} needs all weights on devices that compute, and some are in host memory or on disk")


@contextmanager
def held_once(model: nn.Module) -> Iterator[None]:
    """While open, autograd keeps no copy of a weight that was brought for a pass: it is fetched again on the way back.

    Without this the graph of one pass would hold the whole model.
    """
    running: list[nn.Module] = []

    def pack(saved: Tensor) -> Any:  # noqa: ANN401 - what autograd hands back to `unpack`
        for name, parameter in running[-1]._parameters.items() if running else ():
            if parameter is not None and not parameter.is_meta and _same_memory(parameter, saved):
                return running[-1], name, saved.size(), saved.stride(), saved.storage_offset(), saved.device
        return saved

    def unpack(packed: Any) -> Tensor:  # noqa: ANN401
        if isinstance(packed, Tensor):
            return packed
        module, name, size, stride, offset, device = packed
        return values(module, name).to(device).as_strided(size, stride, offset)

    handles = [
        handle for module in model.modules() if _brings(module) is not None
        for handle in (module.register_forward_pre_hook(lambda module, args: running.append(module)),
                       module.register_forward_hook(lambda module, args, out: running.pop() and None))
    ]  # fmt: skip
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _brings(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings a module's own weights, where they are away."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    found = [one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload and one.weights_map is not None]
    return found[0] if found and module._parameters else None


def _same_memory(parameter: Tensor, saved: Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == saved.untyped_storage().data_ptr()


def _tied(model: Any) -> set[tuple[int, str]]:  # noqa: ANN401 - a bridge, which has the checkpoint's model inside
    """Module and name of every parameter that repeats another: away, they are no longer one object."""
    plain = getattr(model, "original_model", None)
    names = getattr(plain, "all_tied_weights_keys", None) or {}
    found = set()
    for name in names:
        owner, _, own = name.rpartition(".")
        found.add((id(plain.get_submodule(owner)), own))  # type: ignore[union-attr]
    return found
