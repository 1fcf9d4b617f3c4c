"""Where the tokens of a pass stand: their positions in their own texts, and which belong to answers.

`forward` and `generate` say so while they run. Hooks that act on some positions only ask `token_positions`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.notes import TokenPositions, notes
from dean_interp.models.supported import refuse_missing_hooks

_BEGIN = "blocks.0.hook_resid_pre"


def token_positions(model: HookedModel) -> TokenPositions | None:
    """Where the tokens of the running pass stand, or None where nobody said (a bare `model(tokens)`)."""
    return notes(model).token_positions


@contextmanager
def at_positions(model: HookedModel, positions: TokenPositions) -> Iterator[None]:
    """While open, the tokens of every pass stand at these positions."""
    before = token_positions(model)
    notes(model).token_positions = positions
    try:
        yield
    finally:
        notes(model).token_positions = before


@contextmanager
def while_generating(
    model: HookedModel, n_prompt: Int[Tensor, " row"], n_padded: int, *, cached: bool, n_seen: int = 0
) -> Iterator[None]:
    """While open, the first pass holds prompts padded on the left to `n_padded`, and what follows are answer tokens.

    Args:
        n_prompt: tokens of each prompt, without padding.
        n_padded: columns of the padded prompts.
        cached: every later pass holds one new token (else all tokens from the first on).
        n_seen: columns that are in the cache already.
    """
    refuse_missing_hooks(model, [_BEGIN], "generation")
    before = token_positions(model)

    def note(residual: Tensor, hook: Any) -> None:  # noqa: ANN401 - TransformerLens' own
        nonlocal n_seen
        start = n_seen if cached else 0
        n_seen = start + residual.shape[1]
        column = torch.arange(start, n_seen, device=residual.device)[None]
        n_padding = n_padded - n_prompt.to(residual.device)
        # padding stands at position 0, as the first token does; nothing real attends to it
        position = (column - n_padding[:, None]).clamp(min=0)
        is_answer = (column >= n_padded).expand_as(position)
        notes(model).token_positions = TokenPositions(position, is_answer)

    try:
        # not hook_embed, which a HookedTransformer's own generation passes by
        with model.hooks(fwd_hooks=[(_BEGIN, note)]):
            yield
    finally:
        notes(model).token_positions = before
