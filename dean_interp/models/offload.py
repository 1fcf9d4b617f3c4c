"""Offloaded weights: in host memory or on disk, where a model is larger than the devices that compute.

`accelerate` brings a module's weights for its own pass and takes them away after it; in between the parameter is on the
`meta` device and holds nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

from dean_interp.errors import InputError


def values(module: nn.Module, name: str = "weight") -> Tensor:
    """What a module's parameter holds: the parameter itself, or a copy on the CPU where it is offloaded."""
    parameter = getattr(module, name)
    hook: Any = _offload_hook(module) if parameter.is_meta else None
    if hook is None:
        return parameter
    return hook.weights_map[name]


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and values, one at a time and a tied one once, as `named_parameters` would give them."""
    seen: set[tuple[int, str] | int] = set()
    tied = _tied(model)
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            # On a device, tied parameters are one object; offloaded, a parameter is known by where it belongs.
            place = (id(module), name)
            if parameter.is_meta and place in tied:
                continue
            key = place if parameter.is_meta else id(parameter)
            if key not in seen:
                seen.add(key)
                full_name = f"{prefix}.{name}" if prefix else name
                yield full_name, values(module, name)


def is_offloaded(model: nn.Module) -> bool:
    """Whether any of the model's weights is in host memory or on disk."""
    return any(parameter.is_meta for parameter in model.parameters())


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raise `InputError` where something needs all weights at once and some are offloaded."""
    if is_offloaded(model):
        raise InputError(f"{what} needs all weights on devices that compute, and some are in host memory or on disk")


@contextmanager
def held_once(model: nn.Module) -> Iterator[None]:
    """While open, autograd does not save offloaded weights; backward fetches them again.

    Without this the graph of one pass would hold the whole model.
    """
    running: list[nn.Module] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(module)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        running.pop()

    def pack(saved: Tensor) -> Any:  # noqa: ANN401 - what autograd hands back to `unpack`
        # In place of a weight of the running module, a note of which one it is and how it was viewed.
        if not running:
            return saved
        module = running[-1]
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            if _same_memory(parameter, saved):
                return _SavedView(
                    module=module,
                    name=name,
                    size=saved.size(),
                    stride=saved.stride(),
                    offset=saved.storage_offset(),
                    device=saved.device,
                )
        return saved

    def unpack(packed: Any) -> Tensor:  # noqa: ANN401
        return packed.fetched() if isinstance(packed, _SavedView) else packed

    handles = []
    for module in model.modules():
        if _offload_hook(module) is not None:
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _SavedView:
    """A view of an offloaded weight that backward needs."""

    module: nn.Module
    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    device: torch.device

    def fetched(self) -> Tensor:
        """The view's values: of a stack of experts no more than what was saved of it goes to the device."""
        whole = values(self.module, self.name)
        return whole.as_strided(self.size, self.stride, self.offset).to(self.device)


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings a module's own weights, where they are offloaded."""
    if not module._parameters:
        return None
    attached = getattr(module, "_hf_hook", None)
    hooks = attached.hooks if isinstance(attached, SequentialHook) else (attached,)
    for hook in hooks:
        if not isinstance(hook, AlignDevicesHook):
            continue
        if hook.offload and hook.weights_map is not None:
            return hook
    return None


def _same_memory(parameter: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are views of the same memory."""
    stored_at = parameter.untyped_storage().data_ptr()
    return stored_at == saved.untyped_storage().data_ptr()


def _tied(model: Any) -> set[tuple[int, str]]:  # noqa: ANN401 - a bridge, which has the checkpoint's model inside
    """Module and name of every parameter that repeats another: offloaded, they are no longer one object."""
    plain: Any = getattr(model, "original_model", None)
    tied = set()
    for path in getattr(plain, "all_tied_weights_keys", None) or {}:
        owner, _, name = path.rpartition(".")
        tied.add((id(plain.get_submodule(owner)), name))
    return tied
