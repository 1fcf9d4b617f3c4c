"""The two classes of TransformerLens models: `TransformerBridge`, and `HookedTransformer` (in TransformerLens 3.9)."""

from collections.abc import Callable
from typing import Any

import transformer_lens
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

HookedModel = Any
"""A `TransformerBridge` or a `HookedTransformer`: they share hook names and no base class on every version."""

OnProduct = Callable[[Float[Tensor, "batch pos *slot d_in"], Float[Tensor, "batch pos *slot d_out"]], Tensor | None]
"""Takes what a matrix reads and what it writes; a tensor that it returns takes the place of what is written."""

AsMatrix = Callable[[Tensor], Tensor]
"""Makes `(d_in, d_out)` of a parameter or of its gradient, as a view wherever it can."""


def hooked_transformer_class() -> type | None:
    """The class `HookedTransformer` where the installed TransformerLens has it, else None."""
    try:
        return transformer_lens.HookedTransformer
    # TransformerLens 4 raises ImportError from its module's `__getattr__`.
    except (AttributeError, ImportError):
        return None


def is_hooked_transformer(model: object) -> bool:
    """Whether `model` is a `HookedTransformer`; always False on TransformerLens 4.

    Only for `adapters.adapter_of`, which answers for everyone else what depends on it.
    """
    hooked = hooked_transformer_class()
    return hooked is not None and isinstance(model, hooked)


def is_hooked_model(model: object) -> bool:
    """Whether `model` is of one of the two classes."""
    return isinstance(model, TransformerBridge) or is_hooked_transformer(model)
