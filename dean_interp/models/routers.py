"""The router of a layer of experts: the matrix whose columns say how likely each expert is for a token.

It can be scored. It cannot be ablated by hooks: which experts a token gets is decided before its product is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dean_interp.errors import InputError

_NAMES = ("gate", "router")


def router_name(mlp: Any) -> str:  # noqa: ANN401 - a component of TransformerLens
    """What TransformerLens calls the router of a sparse layer. Raises `InputError` where it shows none."""
    found = next((name for name in _NAMES if hasattr(mlp, name)), None)
    if found is None:
        raise InputError(f"TransformerLens shows no router in a {type(mlp).__name__}")
    return found


@contextmanager
def watch_router(component: nn.Module, hook: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, `hook` is called with what a router reads and its logits. What it returns is not used."""

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The weights of the experts are made inside: the graph must begin before them.
        if not args[0].requires_grad and args[0].is_floating_point():
            args[0].requires_grad_(True)

    def call(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:  # noqa: ANN401 - each family's own
        logits = output if isinstance(output, Tensor) else output[0]
        hook(args[0], logits)

    handles = [component.register_forward_pre_hook(begin), component.register_forward_hook(call)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
