"""What a neuron writes, in words: its output direction seen through the unembedding (logit lens)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.circuits.neuron import Neuron
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.matrices import weight
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site


@dataclass(frozen=True)
class Written:
    """The tokens whose logits an activation of 1 raises and lowers most, and by how much (before the final norm's
    division by the residual's size, which differs from place to place).
    """

    layer: int
    index: int
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        raised, lowered = (", ".join(repr(token) for token, _ in some) for some in (self.promoted, self.suppressed))
        return f"L{self.layer}.{self.index} raises {raised}; lowers {lowered}"


@torch.inference_mode()
def written(model: HookedModel, neurons: Sequence[Neuron], *, n_tokens: int = 8) -> list[Written]:
    """The `n_tokens` tokens that each neuron raises and lowers most, in logits for an activation of 1.

    The direct path alone: what later layers make of the direction is not seen (nostalgebraist 2020, logit lens).
    """
    tokenizer, unembedding, found = native_tokenizer(model), _unembedding(model), []
    for site, index in neurons:
        direction = weight(model, Site(site.layer, "out"))[index].float().to(unembedding.device)
        logits = direction @ unembedding
        sides = []
        for sign in (1, -1):
            top = (sign * logits).topk(n_tokens)
            tokens = [str(tokenizer.decode([token])) for token in top.indices.tolist()]
            sides.append(tuple(zip(tokens, (sign * top.values).tolist(), strict=True)))
        found.append(Written(site.layer, index, *sides))
    return found


def _unembedding(model: HookedModel) -> Float[Tensor, "d_model d_vocab"]:
    """With the gain of the final norm, where it has one; Gemma's norms hold it less 1."""
    refuse_offloaded(model, "the logit lens")
    gain = getattr(model.ln_final, "weight", None)
    if gain is None:
        gain = getattr(model.ln_final, "w", None)
    unembedding = model.W_U.float()
    if gain is None:
        return unembedding
    return (gain.float() + bool(getattr(model.cfg, "rmsnorm_uses_offset", False)))[:, None] * unembedding
