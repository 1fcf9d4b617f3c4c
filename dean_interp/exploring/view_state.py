"""What the view shows at one dose: margins of held-out prompts, next tokens, and the KL on general text.

It is a function of the model, the change, its dose, the units that are on, and the prompts; nothing is remembered. The
margin is `log p(safe) - log p(unsafe)`, each per token, in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.data.prompt_text import is_among
from dean_interp.editing.edit_at_dose import AnyEdit, at_dose
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.measurement import Measurement
from dean_interp.exploring.held_out import HeldOut
from dean_interp.models.generate import refuse_too_long
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.loss import answer_positions, forward
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.supported import refuse_unknown_tokens
from dean_interp.models.tokens import Encoded, collate, encode, paths
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.progress import hidden_progress
from dean_interp.selection.selection import Selection

N_NEXT = 8
"""Number of next tokens: those that are likeliest in one of both models."""


@dataclass(frozen=True)
class PromptMargin:
    """The margin of one held-out prompt, in nats per token."""

    behaviour: str
    prompt: str
    original: float
    edited: float


@dataclass(frozen=True)
class NextToken:
    """A token that may follow the prompt, and its probability."""

    token: str
    original: float
    edited: float


@dataclass(frozen=True)
class NextTokens:
    """What may follow a prompt, the likeliest first."""

    prompt: str
    was_scored: bool
    """Whether the change was made from this prompt, or the model was scored on it."""
    tokens: tuple[NextToken, ...]


@dataclass(frozen=True)
class ViewState:
    """What the view shows at one dose."""

    dose: float
    n_on: int
    """Number of units that are on."""
    kl: float
    """KL(original || edited) on general text, nats per answer token."""
    margins: tuple[PromptMargin, ...]
    following: tuple[NextTokens, ...]
    """What follows each prompt that was typed or given."""


@own_torch_settings()
def view_state(
    model: HookedModel,
    change: AnyEdit,
    held_out: HeldOut,
    prompts: Sequence[str] = (),
    *,
    dose: float,
    units: Selection,
    known: ViewState | None = None,
) -> ViewState:
    """Measure the change at a dose.

    Args:
        model: the base of the change; it is left as it was.
        change: gates, an edit, or a selection.
        held_out: what is measured, and what the original makes of it.
        prompts: their next tokens are shown.
        dose: 0 is the original, 1 the change, -1 the opposite.
        units: the units of the change that are on.
        known: an earlier state at this dose with these units, whose margins and KL are not measured again.

    Raises:
        InputError: a dose out of range, a blank prompt, or one without room for an answer.
    """
    config = held_out.config
    encoded = [_encoded(model, prompt, held_out) for prompt in prompts]
    before = [_next_log_probs(model, one) for one in encoded]
    with hidden_progress(), at_dose(model, change, dose, units=units):
        if known is None:
            measured = measure(
                model,
                held_out.all,
                original=held_out.original,
                template=config.template,
                answer_tokens=config.answer_tokens,
            )
            kl = measured[held_out.general.name].mean_kl
            known = ViewState(dose, len(units), kl, _margins(held_out, measured), ())
        after = [_next_log_probs(model, one) for one in encoded]
    following = []
    for prompt, then, now in zip(prompts, before, after, strict=True):
        tokens = _likeliest(model, then.exp(), now.exp())
        following.append(NextTokens(prompt, is_among(prompt, held_out.scored), tokens))
    return replace(known, following=tuple(following))


def _margins(held_out: HeldOut, measured: Measurement) -> tuple[PromptMargin, ...]:
    margins = []
    for behaviour in held_out.behaviours:
        before = held_out.original[behaviour.name].margin.tolist()
        after = measured[behaviour.name].margin.tolist()
        for prompt, original, edited in zip(behaviour.prompts, before, after, strict=True):
            margins.append(PromptMargin(behaviour.name, prompt, original, edited))
    return tuple(margins)


def _encoded(model: HookedModel, prompt: str, held_out: HeldOut) -> Encoded:
    """The prompt's tokens, which the model must take together with an answer."""
    if not prompt.strip():
        raise InputError("the prompt is blank: type what the model shall answer")
    config = held_out.config
    encoded = encode(native_tokenizer(model), prompt, [], template=config.template)
    refuse_unknown_tokens(model, encoded.prompt)
    refuse_too_long(model, [prompt], [encoded.prompt], config.answer_length)
    return encoded


@torch.inference_mode()
def _next_log_probs(model: HookedModel, encoded: Encoded) -> Float[Tensor, " d_vocab"]:
    """Log-probability (nats) of every token behind a prompt."""
    # The logits of an answer token are read where it is predicted, whichever token it is.
    asked = Encoded(encoded.prompt, (encoded.prompt[-1:],))
    batch = collate(paths([asked])[:1], device=model.cfg.device)
    with answer_positions(model, batch):
        logits = forward(model, batch)[0, 0]
    return logits.float().log_softmax(-1).cpu()


def _likeliest(
    model: HookedModel, original: Float[Tensor, " d_vocab"], edited: Float[Tensor, " d_vocab"]
) -> tuple[NextToken, ...]:
    """The tokens that are likeliest in one of both models, with their probabilities in both."""
    either = torch.maximum(original, edited)
    ids = either.argsort(descending=True, stable=True)[:N_NEXT].tolist()
    tokenizer = native_tokenizer(model)
    return tuple(NextToken(str(tokenizer.decode([i])), float(original[i]), float(edited[i])) for i in ids)
