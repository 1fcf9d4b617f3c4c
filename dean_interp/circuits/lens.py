"""What a neuron writes, in words: its output direction seen through the unembedding (logit lens)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites, weight
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neuron_names import Neuron, NeuronName, name_of
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings


@dataclass(frozen=True)
class Written:
    """The tokens whose logits an activation of 1 raises and lowers most, and by how much.

    Logits are those before the final norm divides by the residual's size, which differs from token to token. What an
    expert writes is multiplied by its router's weight (a shared expert's by its gate, where it has one), which differs
    too: these are the logits at a weight of 1.
    """

    layer: int
    index: int
    promoted: tuple[tuple[str, float], ...]
    """Tokens with the change of their logit, largest first."""
    suppressed: tuple[tuple[str, float], ...]
    """Tokens with the change of their logit, lowest first."""
    owner: str = ""
    """The expert that the neuron belongs to (`models.neuron_names.NeuronName`)."""

    def __str__(self) -> str:
        raised = ", ".join(repr(token) for token, _ in self.promoted)
        lowered = ", ".join(repr(token) for token, _ in self.suppressed)
        return f"{NeuronName(self.layer, self.index, self.owner)} raises {raised}; lowers {lowered}"


@own_torch_settings()
@torch.inference_mode()
def written(model: HookedModel, neurons: Sequence[Neuron], *, n_tokens: int = 8) -> list[Written]:
    """The `n_tokens` tokens that each neuron raises and lowers most, in logits for an activation of 1.

    This is the direct path alone: what later layers make of the direction is not seen (nostalgebraist 2020, logit
    lens).
    """
    tokenizer, unembedding = native_tokenizer(model), _unembedding(model)

    def top(logits: Float[Tensor, " d_vocab"], sign: int) -> tuple[tuple[str, float], ...]:
        largest = (sign * logits).topk(n_tokens)
        tokens = [str(tokenizer.decode([token])) for token in largest.indices.tolist()]
        return tuple(zip(tokens, (sign * largest.values).tolist(), strict=True))

    looks = {}
    # A site's matrix once for all of its neurons: that of experts is a copy.
    for site in dict.fromkeys(site for site, _ in neurons):
        out = weight(model, site.out)
        for index in dict.fromkeys(index for of_site, index in neurons if of_site == site):
            logits = out[index].float().to(unembedding.device) @ unembedding
            layer, number, owner = name_of((site, index), len(out))
            looks[site, index] = Written(layer, number, top(logits, 1), top(logits, -1), owner)
    return [looks[neuron] for neuron in neurons]


@own_torch_settings()
@torch.inference_mode()
def logit_differences(
    model: HookedModel, raised: Sequence[int], lowered: Sequence[int]
) -> dict[Site, Float[Tensor, " d_mlp"]]:
    """How much an activation of 1 of each neuron raises the mean logit of some tokens above that of others.

    The direct path alone, as of `written`; float32 on the CPU. A token counts as often as it is named.
    """
    unembedding = _unembedding(model)
    direction = unembedding[:, list(raised)].mean(1) - unembedding[:, list(lowered)].mean(1)
    differences = {}
    for site in neuron_sites(model):
        out = weight(model, site.out).float()
        differences[site] = (out @ direction.to(out.device)).cpu()
    return differences


def _unembedding(model: HookedModel) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding times the gain of the final norm, where it has one."""
    refuse_offloaded(model, "the logit lens")
    unembedding = model.W_U.float()
    gain = getattr(model.ln_final, "weight", None)
    if gain is None:
        gain = getattr(model.ln_final, "w", None)
    if gain is None:
        return unembedding
    # Gemma's norms multiply by 1 plus their weight
    offset = bool(getattr(model.cfg, "rmsnorm_uses_offset", False))
    return (gain.float() + offset)[:, None] * unembedding
