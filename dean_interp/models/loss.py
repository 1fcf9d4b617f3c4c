"""Log-probabilities of answers: one forward pass a batch, logits at answer positions only.

The vocabulary is a fifth of the demo model's parameters, so the unembedding runs on the positions that predict an
answer token and on nothing else: a pre-hook on it hands in those rows of the final residual.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dean_interp.distributed import all_reduce_sum, on_rank0, shard
from dean_interp.models.adapters import adapter_of
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.notes import TokenPositions, notes
from dean_interp.models.positions import at_positions
from dean_interp.models.rounding import equal_but_for_rounding
from dean_interp.models.supported import refuse_unknown_tokens, refuse_without_values
from dean_interp.models.tokens import Batch, Encoded, Padding, Row, batches, collate, paths, trees
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished

log = logging.getLogger(__name__)

# Logits of so many tokens are normalised at once, on a CPU and elsewhere.
_TOKENS_IN_CACHE = 8
_TOKENS_AT_ONCE = 1024
# Sums that are written in fewer seconds than this are written after every batch.
_QUICK = 0.1
# Others are written again after working this many times as long as writing them took.
_KEEP_SHARE = 10
# How fast sums are taken to be written, before they were written once.
_BYTES_A_SECOND = 2**30
# By which part of their spread log-probabilities of rows that share prompts may differ.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AnswerTokens:
    """What a forward pass says of a batch's answer tokens, in the batch's order."""

    log_prob: Float[Tensor, " answer_token"]
    """In nats."""
    kl: Float[Tensor, " answer_token"] | None
    """`KL(original || now)` in nats."""
    final: Float[Tensor, "answer_token d_model"]
    """What the unembedding read: enough to get the logits back, at `d_model` numbers a token."""


def answer_log_probs(
    model: HookedModel,
    batch: Batch,
    *,
    original: Float[Tensor, "answer_token d_model"] | None = None,
) -> AnswerTokens:
    """Log-probability (nats) of every answer token, and its KL divergence from `original` where that is given.

    Args:
        original: `final` of the unablated model on the same tokens. Both are unembedded in one call, so whatever the
            model does to its logits (soft caps, scaling) is done to both; `kl` is `KL(original || now)` in nats.
    """
    with answer_positions(model, batch, extra=original) as read:
        logits = forward(model, batch)[0].float()
    n_tokens = len(batch.target)
    now = logits[:n_tokens]
    log_prob = target_log_probs(now, batch.target)
    kl = None
    if original is not None:
        before = logits[n_tokens:]
        kl = kl_divergence(before, now)
    return AnswerTokens(log_prob, kl, read[0])


def target_log_probs(
    logits: Float[Tensor, "token d_vocab"],
    target: Int[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Log-probability of each target (nats)."""
    n_at_once = _tokens_at_once(logits)
    log_probs = []
    for part, part_target in zip(logits.split(n_at_once), target.split(n_at_once), strict=True):
        of_target = part.gather(-1, part_target[:, None])[:, 0]
        log_probs.append(of_target - part.logsumexp(-1))
    return torch.cat(log_probs)


def kl_divergence(
    before: Float[Tensor, "token d_vocab"],
    now: Float[Tensor, "token d_vocab"],
) -> Float[Tensor, " token"]:
    """`KL(before || now)` of two models' logits at each token, in nats."""
    n_at_once = _tokens_at_once(now)
    divergences = []
    for part_before, part_now in zip(before.split(n_at_once), now.split(n_at_once), strict=True):
        log_before = part_before.log_softmax(-1)
        log_now = part_now.log_softmax(-1)
        # No name holds the products, which are as large as logits, while the next ones are made.
        divergences.append((log_before.exp() * (log_before - log_now)).sum(-1))
    return torch.cat(divergences)


def _tokens_at_once(logits: Float[Tensor, "token d_vocab"]) -> int:
    """How many tokens' logits are worked on at once: their numbers do not depend on it, their time does.

    On a CPU they stay in its cache, where those of a whole batch would go through memory at each step. Elsewhere small
    pieces would be many calls.
    """
    return _TOKENS_IN_CACHE if logits.device.type == "cpu" else _TOKENS_AT_ONCE


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

    Several processes share the batches of a loop that names its `sums`; after the last batch each holds the whole.

    Args:
        model: says on which device the batches are.
        rows: in the order of their prompts and answers.
        batch_tokens: the most tokens of a batch, padding counted.
        label: names the progress bar.
        leave: whether the bar stays when it is full.
        unfinished: keeps the sums, and a killed call goes on with the next batch. They are written after each batch, or
            as often as keeps it to a tenth of the time.
        sums: what the loop's body adds to, in place, from zero.
        together: so many rows that follow each other stay in one batch.
        padding: the side on which rows are padded.
    """
    _refuse_rows(model, rows)
    planned = batches(rows, batch_tokens=batch_tokens, together=together)
    # Only sums can be added up over processes, so a loop without them runs every batch in each.
    planned = planned if sums is None else shard(planned)
    sums = sums or {}
    n_done = unfinished.restore(sums) if unfinished else 0
    n_rows_done = sum(map(len, planned[:n_done]))
    n_rows = sum(map(len, planned))
    seconds = _seconds_to_write(sums)
    kept_at = time.monotonic()
    with progress_bar(total=n_rows, initial=n_rows_done, desc=label, unit="row", leave=leave) as progress:
        for number, batch_rows in enumerate(planned[n_done:], n_done + 1):
            yield collate(batch_rows, device=model.cfg.device, padding=padding)
            # The body has added this batch to the sums.
            began = time.monotonic()
            is_due = seconds < _QUICK or began - kept_at > _KEEP_SHARE * seconds
            if unfinished and is_due:
                unfinished.keep(sums, n_batches=number)
                kept_at = time.monotonic()
                seconds = kept_at - began
            progress.update(len(batch_rows))
    all_reduce_sum(sums.values())


def _seconds_to_write(sums: Mapping[str, Tensor]) -> float:
    """What writing sums is taken to need, before it was done once."""
    n_bytes = sum(total.nbytes for total in sums.values())
    return n_bytes / _BYTES_A_SECOND


def _refuse_rows(model: HookedModel, rows: Sequence[Row]) -> None:
    """Raise `InputError` where the model has no weights, or no embedding for a token."""
    refuse_without_values(model)
    branches = itertools.chain.from_iterable(rows)
    tokens = itertools.chain.from_iterable(branch.tokens for branch in branches)
    refuse_unknown_tokens(model, tokens)


def forward(model: HookedModel, batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's logits for a batch, whatever kind of rows it holds. Hooks can ask for its `token_positions`."""
    is_branched = batch.attend is not None
    is_padded_left = not is_branched and not bool(batch.real[:, 0].all())
    adapter = adapter_of(model)
    may_not_branch = is_branched and not adapter.rows_may_branch
    may_not_pad_left = is_padded_left and not adapter.rows_may_pad_left
    if may_not_branch or may_not_pad_left:
        raise ValueError(f"a {adapter.kind} takes single paths padded on the right: `paths`, not `trees`")
    # Only where a token's position is not its column does the model need to be told.
    options = {}
    if is_branched or is_padded_left:
        options["position_ids"] = batch.positions
    mask = attention_mask(batch, next(model.parameters()).dtype)
    with at_positions(model, TokenPositions(batch.positions, batch.is_answer)):
        return model(batch.tokens, return_type="logits", attention_mask=mask, **options)


def attention_mask(
    batch: Batch,
    dtype: torch.dtype,
) -> Int[Tensor, "batch pos"] | Float[Tensor, "batch 1 pos pos"]:
    """What is real; for branched rows what is added to the attention scores: 0 where a token may look, else minus."""
    if batch.attend is None:
        return batch.real.long()
    minus = torch.finfo(dtype).min
    zeros = torch.zeros(batch.attend.shape, dtype=dtype, device=batch.tokens.device)
    mask = zeros.masked_fill(~batch.attend, minus)
    return mask[:, None]


@torch.inference_mode()
def shares_prompts(model: HookedModel, encoded: Sequence[Encoded]) -> bool:
    """Whether rows of `trees` give this model the log-probabilities of separate sequences; asked once a model.

    Some bridges do not honour the mask, or count positions themselves: the first two prompts are run both ways to see.
    """
    _refuse_rows(model, paths(encoded))
    shares = notes(model).shares_prompts
    if shares is None:
        shares = adapter_of(model).rows_may_branch
        if shares:
            shares = bool(on_rank0(lambda: _trees_equal_paths(model, encoded[:2])))
        if not shares:
            log.info("%s takes no shared prompts: every answer is run in a sequence of its own", model.cfg.model_name)
        notes(model).shares_prompts = shares
    return shares


def _trees_equal_paths(model: HookedModel, encoded: Sequence[Encoded]) -> bool:
    """Whether both kinds of rows give the same log-probabilities, answer by answer."""
    log_probs = []
    for rows in (trees(encoded), paths(encoded)):
        batch = collate(rows, device=model.cfg.device)
        order = batch.answer.argsort(stable=True)
        log_probs.append(answer_log_probs(model, batch).log_prob[order])
    of_trees, of_paths = log_probs
    return equal_but_for_rounding(model, of_trees, of_paths, least=_TOLERANCE)


@contextmanager
def answer_positions(
    model: HookedModel,
    batch: Batch,
    *,
    extra: Float[Tensor, "token d_model"] | None = None,
) -> Iterator[list[Float[Tensor, "answer_token d_model"]]]:
    """While open, the model's logits are `(1, answer_token, d_vocab)`: those that predict an answer token.

    Yields a list that holds, after the pass, what the unembedding read.

    Args:
        model: its unembedding gets a hook.
        batch: the one that the model runs on.
        extra: rows that are unembedded after those of the answer tokens.
    """
    read: list[Tensor] = []

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        final, *others = args
        rows = batch.read_row.to(final.device)
        positions = batch.read_pos.to(final.device)
        residual = final[rows, positions]
        read.append(residual.detach())
        if extra is not None:
            residual = torch.cat([residual, extra.to(residual)])
        return (residual[None], *others)

    handle = model.unembed.register_forward_pre_hook(pick)
    try:
        yield read
    finally:
        handle.remove()
