"""Log-probabilities of answers: one forward pass a batch, logits at answer positions only.

The vocabulary is a fifth of the demo model's parameters, so the unembedding runs on the positions that predict an
answer token and on nothing else: a pre-hook on it hands in those rows of the final residual.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dean_interp.distributed import all_reduce_sum, on_rank0, shard
from dean_interp.models.load import HookedModel, is_hooked_transformer
from dean_interp.models.positions import Places, at_places
from dean_interp.models.tokens import Batch, Encoded, Padding, Row, batches, collate, paths, trees
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished

log = logging.getLogger(__name__)

_KEEP_SHARE = 10  # times as long as writing the sums took is worked before they are written again
_SHARES = "_dean_interp_shares_prompts"  # what we note on a model object


@dataclass(frozen=True)
class AnswerTokens:
    """What a forward pass says of a batch's answer tokens, in the batch's order.

    `final` is what the unembedding read: enough to get the logits back, at `d_model` numbers a token.
    """

    log_prob: Float[Tensor, " answer_token"]
    kl: Float[Tensor, " answer_token"] | None
    final: Float[Tensor, "answer_token d_model"]


def answer_log_probs(
    model: HookedModel, batch: Batch, *, original: Float[Tensor, "answer_token d_model"] | None = None
) -> AnswerTokens:
    """Log-probability (nats) of every answer token, and its KL divergence from `original` where that is given.

    Args:
        original: `final` of the unablated model on the same tokens. Both are unembedded in one call, so whatever the
            model does to its logits (soft caps, scaling) is done to both; `kl` is `KL(original || now)` in nats.
    """
    with answer_positions(model, batch, extra=original) as read:
        logits = forward(model, batch)[0].float()
    now = logits[: len(batch.target)]
    log_prob = now.gather(-1, batch.target[:, None])[:, 0] - now.logsumexp(-1)
    if original is None:
        return AnswerTokens(log_prob, None, read[0])
    now, then = now.log_softmax(-1), logits[len(batch.target) :].log_softmax(-1)
    return AnswerTokens(log_prob, (then.exp() * (then - now)).sum(-1), read[0])


def batched(
    model: HookedModel,
    rows: Sequence[Row],
    *,
    batch_tokens: int,
    label: str,
    leave: bool = False,
    unfinished: Unfinished | None = None,
    sums: Mapping[str, Tensor] | None = None,
    together: int = 1,
    padding: Padding = "right",
) -> Iterator[Batch]:
    """Padded batches of `rows` on the model's device, with a progress bar over the rows.

    `sums` is what the loop's body adds to, in place, from zero. With `unfinished` it is restored before the first
    batch, batches that it holds already are passed over, and it is written after each of the others (where the sums are
    so large that this takes long: as often as keeps it to a tenth of the time). Several processes share the batches of
    a loop that names its `sums`; after the last one each holds the whole. `together` rows that follow each other stay
    in one batch.
    """
    planned = batches(rows, batch_tokens=batch_tokens, together=together)
    planned = planned if sums is None else shard(planned)
    n_done = unfinished.restore(sums or {}) if unfinished else 0
    n_rows_done = sum(len(some) for some in planned[:n_done])
    seconds, kept_at = 0.0, time.monotonic()
    with progress_bar(
        total=sum(map(len, planned)), initial=n_rows_done, desc=label, unit="row", leave=leave
    ) as progress:
        for number, some in enumerate(planned[n_done:], n_done + 1):
            yield collate(some, device=model.cfg.device, padding=padding)
            began = time.monotonic()
            if unfinished and (number == len(planned) or seconds < 0.1 or began - kept_at > _KEEP_SHARE * seconds):
                unfinished.keep(sums or {}, n_batches=number)
                kept_at = time.monotonic()
                seconds = kept_at - began
            progress.update(len(some))
    all_reduce_sum((sums or {}).values())


def forward(model: HookedModel, batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's logits for a batch, whatever kind of rows it holds. Hooks can ask where its `places` are."""
    padded_left = batch.attend is None and not bool(batch.real[:, 0].all())
    if is_hooked_transformer(model) and (batch.attend is not None or padded_left):
        raise ValueError("a HookedTransformer takes single paths padded on the right: `paths`, not `trees`")
    if batch.attend is None:
        mask = batch.real.long()
    else:
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(batch.attend.shape, dtype=dtype, device=batch.tokens.device)
        mask = mask.masked_fill(~batch.attend, torch.finfo(dtype).min)[:, None]
    given = {"position_ids": batch.positions} if padded_left or batch.attend is not None else {}
    with at_places(model, Places(batch.positions, batch.is_answer)):
        return model(batch.tokens, return_type="logits", attention_mask=mask, **given)


@torch.inference_mode()
def shares_prompts(model: HookedModel, encoded: Sequence[Encoded]) -> bool:
    """Whether rows of `trees` give this model the log-probabilities of separate sequences; asked once a model.

    A `HookedTransformer` takes no mask of that kind. Some bridges do not honour it, or count positions themselves:
    the first two prompts are run both ways to see.
    """
    if _SHARES not in model.__dict__:
        model.__dict__[_SHARES] = not is_hooked_transformer(model) and on_rank0(
            lambda: _trees_equal_paths(model, encoded[:2])
        )
        if not model.__dict__[_SHARES]:
            log.info("%s takes no shared prompts: every answer is run in a sequence of its own", model.cfg.model_name)
    return model.__dict__[_SHARES]


def _trees_equal_paths(model: HookedModel, encoded: Sequence[Encoded]) -> bool:
    log_probs = []
    for rows in (trees(encoded), paths(encoded)):
        batch = collate(rows, device=model.cfg.device)
        log_probs.append(answer_log_probs(model, batch).log_prob[batch.answer.argsort(stable=True)])
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    return bool((log_probs[0] - log_probs[1]).abs().max() <= tolerance)


@contextmanager
def answer_positions(
    model: HookedModel, batch: Batch, *, extra: Float[Tensor, "token d_model"] | None = None
) -> Iterator[list[Float[Tensor, "answer_token d_model"]]]:
    """While open, the model's logits are `(1, answer_token, d_vocab)`: those that predict an answer token.

    `extra` rows are unembedded after them. Yields a list that holds, after the pass, what the unembedding read.
    """
    read: list[Tensor] = []

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        device = args[0].device
        residual = args[0][batch.read_row.to(device), batch.read_pos.to(device)]
        read.append(residual.detach())
        if extra is not None:
            residual = torch.cat([residual, extra.to(residual)])
        return (residual[None], *args[1:])

    handle = model.unembed.register_forward_pre_hook(pick)
    try:
        yield read
    finally:
        handle.remove()
