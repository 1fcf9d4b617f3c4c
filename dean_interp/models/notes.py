"""What we note on a model object, so that it is known wherever the model goes: one record, behind one accessor."""

from collections.abc import Set
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.models.chat_settings import ChatSettings
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sites import Site

_ATTRIBUTE = "_dean_interp_notes"


@dataclass(frozen=True)
class WeightChange:
    """Weights of one matrix: their ascending flat indices, their values before an ablation and under it."""

    units: Int[Tensor, " unit"]
    old: Float[Tensor, " unit"]
    new: Float[Tensor, " unit"]


AblatedWeights = dict[tuple[Site, str], WeightChange]
"""What the open ablations have made of weights, by site and ablated positions."""


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of one forward pass stand."""

    position: Int[Tensor, "batch pos"]
    """Each token's position in its own text, from 0."""
    is_answer: Bool[Tensor, "batch pos"]
    """Whether it is a token of an answer."""


@dataclass
class ModelNotes:
    """All that this package keeps on a model object."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """The checkpoint's own tokenizer, as it was loaded; None before it is."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """What its chat template is told beside the messages."""
    chat_tokenizer: PreTrainedTokenizerBase | None = None
    """The same tokenizer with a chat template that keeps to `chat` (`native_tokenizer`); None before it is asked
    for."""
    plain: PreTrainedModel | None = None
    """The model as it was before it was wrapped, with the same parameters (`plain`); None where others wrapped it."""
    scored_prompts: set[str] = field(default_factory=set)
    """Hashes of the prompts that the model was scored on (`note_scored`)."""
    edited_by: list[Set[str]] = field(default_factory=list)
    """Hashes of the prompts behind each change that is applied now (`noting_scored_prompts`)."""
    token_positions: TokenPositions | None = None
    """Where the tokens of the running pass stand (`positions`); None where nobody said."""
    ablated_weights: AblatedWeights = field(default_factory=dict)
    """What open ablations have made of weights (`editing.ablation`): none may be taken out twice."""
    n_ablations: int = 0
    """How many ablations are open."""
    cache_is_right: bool | None = None
    """Whether its KV cache may be used (`cache_check.cache_is_right`); None before the check."""
    unhooked_is_right: bool | None = None
    """Whether it gives its logits without what serves hooks (`unhooked.unhooked_is_right`); None before the check."""
    shares_prompts: bool | None = None
    """Whether rows of `tokens.trees` give its log-probabilities (`loss.shares_prompts`); None before the check."""


def notes(model: HookedModel) -> ModelNotes:
    """The record of notes on this model object: empty at first, then always the same one."""
    return model.__dict__.setdefault(_ATTRIBUTE, ModelNotes())
