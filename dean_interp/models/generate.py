"""Greedy generation in batches, with a KV cache where it may be trusted."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.distributed import all_reduce_max, shard
from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.cache_check import cache_is_right
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.positions import while_generating
from dean_interp.models.supported import refuse_unknown_tokens, refuse_without_values
from dean_interp.models.thoughts import begun_thought, decoded
from dean_interp.models.tokens import Template, encode
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.models.turn_end import markers
from dean_interp.models.unhooked import unhooked, unhooked_is_right
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished

# In place of a token, where an answer has ended.
_NOTHING = -1
# New tokens after which answers that have ended leave their batch.
_AT_A_TIME = 8


@own_torch_settings()
def generate(
    model: HookedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    template: Template = "chat",
    batch_size: int = 16,
    label: str = "answering",
    unfinished: Unfinished | None = None,
) -> list[str]:
    """Greedy answers, one a prompt and in their order, under whatever hooks the model has at the time.

    Prompts of like length share a batch, padded on the left (a `HookedTransformer`: of equal length, without padding).
    The KV cache is used only where `cache_is_right`. Batches of other sizes round differently, so that once in a while
    an answer takes another turn where two tokens are equally likely.

    Args:
        model: from `load_model`.
        prompts: what is answered.
        max_new_tokens: the most tokens of an answer.
        template: how a prompt becomes tokens (`models.tokens.encode`).
        batch_size: prompts a batch.
        label: names the progress bar.
        unfinished: keeps what the finished batches gave; a killed call goes on from there.

    Raises:
        InputError: no prompts, or one that leaves no room for an answer in the model's context.
    """
    answers = generate_to(
        model,
        prompts,
        lengths=(max_new_tokens,),
        template=template,
        batch_size=batch_size,
        label=label,
        unfinished=unfinished,
    )
    return answers[max_new_tokens]


@torch.inference_mode()
def generate_to(
    model: HookedModel,
    prompts: Sequence[str],
    *,
    lengths: Sequence[int],
    template: Template = "chat",
    batch_size: int = 16,
    label: str = "answering",
    unfinished: Unfinished | None = None,
) -> dict[int, list[str]]:
    """Answers of several lengths (new tokens) from one pass: greedy answers begin alike, so the longest is cut.

    Where a prompt ends in the beginning of a thought, its answer begins with that mark (`models.thoughts`).
    Several processes share the batches. Arguments and errors as of `generate`.
    """
    # A column of a data frame has no truth value.
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    refuse_nothing_to_answer(prompts, lengths, batch_size)
    tokenizer = native_tokenizer(model)
    longest = max(lengths)
    encoded = [encode(tokenizer, prompt, [], template=template).prompt for prompt in prompts]
    refuse_without_values(model)
    refuse_unknown_tokens(model, itertools.chain.from_iterable(encoded))
    refuse_too_long(model, prompts, encoded, longest)
    # Each process fills in its own batches. The others keep `_NOTHING` there, which is below every token.
    answers = torch.full((len(prompts), longest), _NOTHING)
    equal_length = not adapter_of(model).rows_may_pad_left
    planned = shard(_batches(encoded, batch_size, equal_length=equal_length))
    n_done = unfinished.restore({"answers": answers}) if unfinished else 0
    n_answered = sum(map(len, planned[:n_done]))
    n_all = sum(map(len, planned))
    with progress_bar(total=n_all, initial=n_answered, desc=label, unit="answer", leave=False) as progress:
        for number, batch in enumerate(planned[n_done:], n_done + 1):
            new = _continue(model, [encoded[i] for i in batch], longest)
            answers[batch, : new.shape[1]] = new
            if unfinished:
                unfinished.keep({"answers": answers}, n_batches=number)
            progress.update(len(batch))
    all_reduce_max([answers])
    begun = [begun_thought(tokenizer, prompt) for prompt in encoded]
    texts: dict[int, list[str]] = {}
    for length in lengths:
        texts[length] = []
        for before, answer in zip(begun, answers, strict=True):
            texts[length].append(before + _text(tokenizer, answer[:length]))
    return texts


def answer_stream(
    model: HookedModel,
    prompt: str,
    *,
    under: AbstractContextManager[None],
    max_new_tokens: int = 64,
    template: Template = "chat",
) -> Iterator[str]:
    """The greedy answer to a prompt as it grows: its text after every new token, the last of which `generate` gives.

    Args:
        model: between two texts it has none of our hooks, so that others may use it.
        prompt: what is answered.
        under: what changes the model. It is opened anew for every token.
        max_new_tokens: the most tokens of the answer.
        template: how the prompt becomes tokens (`models.tokens.encode`).

    Raises:
        InputError: a prompt that leaves no room for an answer in the model's context.
    """
    refuse_nothing_to_answer([prompt], [max_new_tokens], 1)
    tokenizer = native_tokenizer(model)
    encoded = [encode(tokenizer, prompt, [], template=template).prompt]
    refuse_without_values(model)
    refuse_unknown_tokens(model, encoded[0])
    refuse_too_long(model, [prompt], encoded, max_new_tokens)
    begun = begun_thought(tokenizer, encoded[0])
    growing = _growing(model, encoded, max_new_tokens, at_a_time=1)
    while True:
        with own_torch_settings(), torch.inference_mode(), under:
            answers = next(growing, None)
        if answers is None:
            return
        yield begun + _text(tokenizer, answers[0])


def refuse_nothing_to_answer(prompts: Sequence[str], lengths: Sequence[int], at_once: int) -> None:
    """Raise `InputError` for no prompts, no new tokens, none at once, or one text where a list of texts is meant."""
    if isinstance(prompts, str):
        raise InputError(f"prompts must be a list of texts, got one text: give [{prompts[:40]!r}]")
    asks_for_tokens = bool(lengths) and min(lengths) >= 1
    if not prompts or not asks_for_tokens or at_once < 1:
        raise InputError(
            "generation needs a prompt, a number of new tokens and at least 1 prompt at once, got "
            f"{len(prompts)} prompts, {tuple(lengths)} and {at_once}"
        )


def refuse_too_long(
    model: HookedModel,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Raise `InputError` where a prompt leaves no room for its answer in the model's context."""
    for prompt, ids in zip(prompts, encoded, strict=True):
        n_prompt = len(ids)
        n_ctx = model.cfg.n_ctx
        if n_prompt + max_new_tokens > n_ctx:
            raise InputError(
                f"the prompt {prompt[:40]!r} has {n_prompt} tokens, which with {max_new_tokens} new ones is more than "
                f"the {n_ctx} that the model takes"
            )


def _text(tokenizer: PreTrainedTokenizerBase, answer: Int[Tensor, " new"]) -> str:
    """The text of an answer, up to where it has ended."""
    said = answer[answer != _NOTHING]
    return decoded(tokenizer, said.tolist())


def _batches(encoded: Sequence[Sequence[int]], size: int, *, equal_length: bool) -> list[list[int]]:
    """Indices of prompts, the longest first."""
    lengths = [len(prompt) for prompt in encoded]
    order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
    groups = [order]
    if equal_length:
        by_length = itertools.groupby(order, key=lambda i: lengths[i])
        groups = [list(group) for _, group in by_length]
    planned = []
    for group in groups:
        planned += [group[start : start + size] for start in range(0, len(group), size)]
    return planned


def _continue(model: HookedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Int[Tensor, "row new"]:
    """New tokens of one batch on the CPU, up to where a turn ends."""
    keeps_cache = cache_is_right(model) and adapter_of(model).keeps_cache
    at_a_time = _AT_A_TIME if keeps_cache else max_new_tokens
    *_, answers = _growing(model, prompts, max_new_tokens, at_a_time=at_a_time)
    return answers


def _growing(
    model: HookedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    at_a_time: int,
) -> Iterator[Int[Tensor, "row new"]]:
    """The answers of one batch after every `at_a_time` new tokens. No hook of ours is open while they are looked at."""
    adapter = adapter_of(model)
    tokenizer = native_tokenizer(model)
    tokens, real = _padded_left(prompts, model.cfg.device)
    n_padded = tokens.shape[1]
    n_prompt = real.sum(1)
    ends, no_text = _ends(model, tokens.device)
    answers = torch.full((len(tokens), max_new_tokens), _NOTHING)
    # The prompts that are not answered to their end yet, as rows of `answers`; `tokens`, `real` and `cache` are theirs.
    rows = torch.arange(len(tokens), device=tokens.device)
    cache = None
    cached = cache_is_right(model)
    # Asked before positions are counted, since it runs passes of its own.
    unhooked_is_right(model)
    n_done = 0
    while len(rows) and n_done < max_new_tokens:
        # A few tokens further, from the cache if there is one.
        n_seen = 0 if cache is None else tokens.shape[1] - 1
        positions = while_generating(model, n_prompt[rows], n_padded, cached=cached, n_seen=n_seen)
        with positions, unhooked(model):
            tokens, cache = adapter.generate(
                tokens,
                real,
                tokenizer=tokenizer,
                max_new_tokens=min(at_a_time, max_new_tokens - n_done),
                cached=cached,
                cache=cache,
            )
        new = tokens[:, n_padded + n_done :]
        n_new = new.shape[1]
        is_end = torch.isin(new, ends)
        answers[rows.cpu(), n_done : n_done + n_new] = _said(new, is_end, no_text).cpu()
        n_done += n_new
        # Rows that have ended leave the batch and its cache.
        going = (~is_end.any(1)).nonzero()[:, 0]
        real = torch.cat([real, torch.ones_like(new)], 1)[going]
        rows = rows[going]
        tokens = tokens[going]
        if cache is not None and len(going) < len(new):
            cache.batch_select_indices(going)
        yield answers


def _said(
    new: Int[Tensor, "row new"],
    is_end: Bool[Tensor, "row new"],
    no_text: Int[Tensor, " marker"],
) -> Int[Tensor, "row new"]:
    """New tokens without padding behind an end, which is no part of the answer, and without an end that is no text."""
    n_ends_before = is_end.cumsum(1) - is_end.long()
    is_unsaid = (n_ends_before > 0) | torch.isin(new, no_text)
    return new.masked_fill(is_unsaid, _NOTHING)


def _ends(model: HookedModel, device: torch.device) -> tuple[Int[Tensor, " end"], Int[Tensor, " marker"]]:
    """The tokens that end an answer, and those of them that are no text."""
    tokenizer = native_tokenizer(model)
    end_tokens = adapter_of(model).end_tokens(tokenizer)
    ends = torch.tensor(end_tokens, dtype=torch.long, device=device)
    no_text = torch.tensor(sorted(markers(tokenizer)), device=device)
    return ends, ends[torch.isin(ends, no_text)]


def _padded_left(
    prompts: Sequence[Sequence[int]],
    device: torch.device | str,
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Prompts side by side, padded on the left with token 0, and 1 where a token is real."""
    n_pos = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), n_pos, dtype=torch.long)
    real = torch.zeros(len(prompts), n_pos, dtype=torch.long)
    for row, ids in enumerate(prompts):
        start = n_pos - len(ids)
        tokens[row, start:] = torch.tensor(ids)
        real[row, start:] = 1
    return tokens.to(device), real.to(device)
