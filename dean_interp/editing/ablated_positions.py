"""Where an ablation acts: at all positions, in prompts, or in responses."""

from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.positions import token_positions

Positions = Literal["all", "prompt", "response"]


def positions_in_texts(model: HookedModel, activation: Tensor) -> Int[Tensor, "..."]:
    """The place of every position in its own text; a bare pass counts from its first column."""
    *shape, n_positions, _ = activation.shape
    current = token_positions(model)
    if current is not None:
        positions = current.position.reshape(*shape, n_positions)
        return positions.to(activation.device)
    positions = torch.arange(n_positions, device=activation.device)
    return positions.expand(*shape, n_positions)


def is_ablated(model: HookedModel, activation: Tensor, positions: Positions) -> Bool[Tensor, "..."]:
    """True at the positions of a pass that belong to prompts, or to responses."""
    current = token_positions(model)
    if current is None:
        raise InputError(
            f"positions={positions!r} needs a pass that knows where answers begin: importance, measure or generate"
        )
    is_answer = current.is_answer.reshape(activation.shape[:-1])
    is_answer = is_answer.to(activation.device)
    return is_answer if positions == "response" else ~is_answer
