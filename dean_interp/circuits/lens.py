"""What a neuron writes, in words: its output direction seen through the unembedding (logit lens)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites, weight
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.neuron_names import Neuron, NeuronName, name_of, refuse_unknown
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.sizes import residual_width
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
        name = NeuronName(self.layer, self.index, self.owner)
        return f"{name} raises {raised}; lowers {lowered}"


@own_torch_settings()
@torch.inference_mode()
def written(model: HookedModel, neurons: Sequence[Neuron], *, n_tokens: int = 8) -> list[Written]:
    """The `n_tokens` tokens that each neuron raises and lowers most, in logits for an activation of 1.

    This is the direct path alone: what later layers make of the direction is not seen (nostalgebraist 2020, logit
    lens).

    Raises `InputError` for a neuron that the model does not have, for more tokens than it has or fewer than one, and
    for a model whose unembedding does not read the residual stream, or is offloaded.
    """
    for neuron in neurons:
        refuse_unknown(model, neuron)
    tokenizer = native_tokenizer(model)
    unembedding = _unembedding(model)
    d_vocab = unembedding.shape[1]
    if not 1 <= n_tokens <= d_vocab:
        raise InputError(f"n_tokens must be from 1 to {d_vocab} (the model's tokens), got {n_tokens}")

    def top(logits: Float[Tensor, " d_vocab"], sign: int) -> tuple[tuple[str, float], ...]:
        largest = (sign * logits).topk(n_tokens)
        tokens = [str(tokenizer.decode([token])) for token in largest.indices.tolist()]
        changes = (sign * largest.values).tolist()
        return tuple(zip(tokens, changes, strict=True))

    indices_of: dict[Site, list[int]] = {}
    for site, index in dict.fromkeys(neurons):
        indices_of.setdefault(site, []).append(index)
    records = {}
    for site, indices in indices_of.items():
        # A site's matrix is taken once for all of its neurons: that of experts is a copy.
        out = weight(model, site.out)
        for index in indices:
            direction = out[index].float().to(unembedding.device)
            logits = direction @ unembedding
            name = name_of((site, index), len(out))
            records[site, index] = Written(
                layer=name.layer,
                index=name.index,
                promoted=top(logits, 1),
                suppressed=top(logits, -1),
                owner=name.owner,
            )
    return [records[neuron] for neuron in neurons]


@own_torch_settings()
@torch.inference_mode()
def logit_differences(
    model: HookedModel,
    raised: Sequence[int],
    lowered: Sequence[int],
) -> dict[Site, Float[Tensor, " d_mlp"]]:
    """How much an activation of 1 of each neuron raises the mean logit of some tokens above that of others.

    The direct path alone, as of `written`; float32 on the CPU. A token counts as often as it is named.
    """
    unembedding = _unembedding(model)
    mean_raised = unembedding[:, list(raised)].mean(1)
    mean_lowered = unembedding[:, list(lowered)].mean(1)
    direction = mean_raised - mean_lowered
    differences = {}
    for site in neuron_sites(model):
        out = weight(model, site.out).float()
        difference = out @ direction.to(out.device)
        differences[site] = difference.cpu()
    return differences


def _unembedding(model: HookedModel) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding times the gain of the final norm, where it has one.

    A final LayerNorm takes the mean off the residual first, so the mean of a direction raises no logit.
    """
    refuse_offloaded(model, "the logit lens")
    unembedding = model.W_U.float()
    d_model = residual_width(model)
    if len(unembedding) != d_model:
        raise InputError(
            f"the logit lens needs an unembedding that reads the residual stream: that of {model.cfg.model_name} reads "
            f"{len(unembedding)} numbers, and the stream has {d_model}"
        )
    # Some old models (OpenAI's first GPT) have norms in their blocks alone.
    norm = getattr(model, "ln_final", None)
    if norm is None:
        return unembedding
    gain = _gain(model, norm)
    if gain is not None:
        unembedding = gain[:, None] * unembedding
    is_layer_norm = str(model.cfg.normalization_type).startswith("LN")
    return unembedding - unembedding.mean(0) if is_layer_norm else unembedding


def _gain(model: HookedModel, norm: nn.Module) -> Float[Tensor, " d_model"] | None:
    """What a norm multiplies each number by once it is normalised, or None."""
    gain = getattr(norm, "weight", None)
    if gain is None:
        gain = getattr(norm, "w", None)
    if gain is None:
        return None
    # Gemma's norms multiply by 1 plus their weight.
    offset = bool(getattr(model.cfg, "rmsnorm_uses_offset", False))
    return gain.float() + offset
