"""Where the positions of a pass stand: their places in their own texts, and which are answer tokens.

`forward` and `generate` say so while they run; hooks that act on some positions only ask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dean_interp.models.load import HookedModel

_PLACES = "_dean_interp_places"  # what we note on a model object


@dataclass(frozen=True)
class Places:
    """Of every position of a pass: its place in its own text, from 0, and whether it is an answer token."""

    position: Int[Tensor, "batch pos"]
    is_answer: Bool[Tensor, "batch pos"]


def places(model: HookedModel) -> Places | None:
    """Of the pass that is running, or None where nobody said (a bare `model(tokens)`)."""
    return model.__dict__.get(_PLACES)


@contextmanager
def at_places(model: HookedModel, current: Places) -> Iterator[None]:
    """While open, passes stand at these places."""
    before = places(model)
    model.__dict__[_PLACES] = current
    try:
        yield
    finally:
        model.__dict__[_PLACES] = before


@contextmanager
def generating(
    model: HookedModel, n_prompt: Int[Tensor, " row"], n_padded: int, *, cached: bool, n_seen: int = 0
) -> Iterator[None]:
    """While open, the first pass holds prompts padded on the left to `n_padded`, and what follows are answer tokens.

    Args:
        n_prompt: tokens of each prompt, without padding.
        cached: every later pass holds one new token (else all that there are).
        n_seen: columns that are in the cache already.
    """
    before = places(model)

    def note(residual: Tensor, hook: Any) -> None:  # noqa: ANN401 - TransformerLens' own
        nonlocal n_seen
        start = n_seen if cached else 0
        n_seen = start + residual.shape[1]
        column = torch.arange(start, n_seen, device=residual.device)[None]
        position = (column - (n_padded - n_prompt.to(residual.device))[:, None]).clamp(min=0)
        model.__dict__[_PLACES] = Places(position, (column >= n_padded).expand_as(position))

    try:
        # not hook_embed, which a HookedTransformer's own generation passes by
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", note)]):
            yield
    finally:
        model.__dict__[_PLACES] = before
