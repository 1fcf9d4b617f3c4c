"""Perplexity of running text at fixed windows, and the distance to the original on it.

The texts are joined by a blank line and cut into windows that do not overlap, as is usual for wikitext; every token of
a window but its first is predicted from those before it in the window. What is left at the end is dropped, so that all
windows are of one size and their mean is that of their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_log_probs, batched
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.sizes import unembedding_shape
from dean_interp.models.tokens import Encoded, paths
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.models.unhooked import unhooked
from dean_interp.resume import Unfinished


@dataclass(frozen=True)
class WindowMeasurement:
    """Means over the predicted tokens of each window."""

    window: int
    loss: Float[Tensor, " window"]
    """Negative log-likelihood per token, nats."""
    kl: Float[Tensor, " window"]
    """KL(original || now) per token, nats; 0 where there is no original to compare with."""
    final: Float[Tensor, "token d_model"] = field(repr=False)
    """The input of the unembedding, window after window: a later measurement takes its KL to this one from it."""

    @property
    def perplexity(self) -> float:
        """Perplexity per token: the exponential of the mean loss."""
        return float(self.loss.mean().exp())


def window_texts(model: HookedModel, texts: Sequence[str], window: int) -> list[Encoded]:
    """The windows of some texts as rows to predict: the first token given, the rest predicted.

    Raises `InputError` where a window is shorter than 2, longer than the model takes, or longer than all text.
    """
    if not 2 <= window <= model.cfg.n_ctx:
        raise InputError(f"window must be 2 to {model.cfg.n_ctx} tokens (what the model takes), got {window}")
    tokenizer = native_tokenizer(model)
    text = "\n\n".join(texts)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < window:
        raise InputError(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    windows = []
    for start in range(0, len(ids) - window + 1, window):
        first, *predicted = ids[start : start + window]
        windows.append(Encoded((first,), (tuple(predicted),)))
    return windows


@own_torch_settings()
@torch.inference_mode()
def window_loss(
    model: HookedModel,
    texts: Sequence[str],
    *,
    window: int = 2048,
    original: WindowMeasurement | None = None,
    unfinished: Unfinished | None = None,
) -> WindowMeasurement:
    """Loss and KL of the model's present state on windows of text, one forward pass a window.

    Args:
        texts: joined by a blank line before they are cut.
        window: tokens; the paper's own windows are as long as the model's context.
        original: an earlier measurement of the same windows, to which the KL is taken.
        unfinished: keeps the values of the finished windows; a killed call goes on from there.

    Raises:
        InputError: as `window_texts`, or an `original` of other windows.
    """
    encoded = window_texts(model, texts, window)
    n_windows = len(encoded)
    n_predicted = window - 1
    if original is not None:
        _refuse_other_windows(original, window, n_windows)
    d_model, _ = unembedding_shape(model)
    loss, kl = torch.zeros(n_windows), torch.zeros(n_windows)
    final = torch.zeros(n_windows * n_predicted, d_model)
    batches = batched(
        model,
        paths(encoded),
        batch_tokens=window,
        label="windows of text",
        unfinished=unfinished,
        sums={"loss": loss, "kl": kl, "final": final},
    )
    for batch in batches:
        # a batch has room for one window
        (number,) = batch.answer.unique().tolist()
        positions = slice(number * n_predicted, (number + 1) * n_predicted)
        final_before = None
        if original is not None:
            final_before = original.final[positions].to(batch.tokens.device)
        with unhooked(model):
            out = answer_log_probs(model, batch, original=final_before)
        loss[number] = -out.log_prob.double().mean().cpu()
        final[positions] = out.final.float().cpu()
        if out.kl is not None:
            kl[number] = out.kl.double().mean().cpu()
    return WindowMeasurement(window=window, loss=loss, kl=kl, final=final)


def _refuse_other_windows(original: WindowMeasurement, window: int, n_windows: int) -> None:
    """Raise `InputError` where a measurement is not of so many windows of so many tokens."""
    n_before = len(original.loss)
    if (original.window, n_before) != (window, n_windows):
        raise InputError(
            f"`original` holds {n_before} windows of {original.window} tokens, now there are {n_windows} of {window}"
        )
