"""The router of a layer of experts: the matrix whose columns say how likely each expert is for a token.

It can be scored. It cannot be ablated by hooks: which experts a token gets is decided before its product is seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import OnProduct

_NAMES = ("gate", "router")


def router_name(mlp: Any) -> str:  # noqa: ANN401 - a component of TransformerLens
    """What TransformerLens calls the router of a sparse layer. Raises `InputError` where it shows none."""
    for name in _NAMES:
        if hasattr(mlp, name):
            return name
    raise InputError(f"TransformerLens shows no router in a {type(mlp).__name__}")


@contextmanager
def watch_router(component: nn.Module, hook: OnProduct) -> Iterator[None]:
    """While open, `hook` is called with what a router reads and its logits. What it returns is not used."""

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The weights of the experts are made inside: the graph must begin before them.
        read = args[0]
        if not read.requires_grad and read.is_floating_point():
            read.requires_grad_(True)

    def call(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:  # noqa: ANN401 - each family's own
        logits = output if isinstance(output, Tensor) else output[0]
        hook(args[0], logits)

    before = component.register_forward_pre_hook(begin)
    behind = component.register_forward_hook(call)
    try:
        yield
    finally:
        before.remove()
        behind.remove()
