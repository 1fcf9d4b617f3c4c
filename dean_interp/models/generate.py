"""Greedy generation in batches, and the check that a KV cache may be trusted with it."""

import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dean_interp.distributed import all_reduce_max, shard
from dean_interp.errors import InputError
from dean_interp.models.attention import fused_attention
from dean_interp.models.load import HookedModel, is_hooked_transformer, native_tokenizer
from dean_interp.models.positions import generating
from dean_interp.models.tokens import Template, encode
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished

log = logging.getLogger(__name__)

_CACHE = "_dean_interp_cache_is_right"  # what we note on a model object
_NOTHING = -1  # where an answer has ended
_AT_A_TIME = 8  # new tokens after which answers that have ended leave their batch


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
        batch_size: prompts a batch.
        unfinished: keeps what the finished batches gave; a killed call goes on from there.

    Raises:
        InputError: no prompts, or one that leaves no room for an answer in the model's context.
    """
    options = {"template": template, "batch_size": batch_size, "label": label, "unfinished": unfinished}
    return generate_to(model, prompts, lengths=(max_new_tokens,), **options)[max_new_tokens]


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

    Several processes share the batches. Arguments and errors as of `generate`.
    """
    refuse_nothing_to_answer(prompts, lengths, batch_size)
    tokenizer, longest = native_tokenizer(model), max(lengths)
    encoded = [encode(tokenizer, prompt, [], template=template).prompt for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + longest > model.cfg.n_ctx:
            raise InputError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, which with {longest} new ones is more than "
                f"the {model.cfg.n_ctx} that the model takes"
            )
    answers = torch.full((len(prompts), longest), _NOTHING)
    planned = shard(list(_batches(encoded, batch_size, equal_length=is_hooked_transformer(model))))
    n_done = unfinished.restore({"answers": answers}) if unfinished else 0
    n_answered = sum(map(len, planned[:n_done]))
    with progress_bar(
        total=sum(map(len, planned)), initial=n_answered, desc=label, unit="answer", leave=False
    ) as progress:
        for number, batch in enumerate(planned[n_done:], n_done + 1):
            new = _continue(model, [encoded[i] for i in batch], longest)
            answers[batch, : new.shape[1]] = new
            if unfinished:
                unfinished.keep({"answers": answers}, n_batches=number)
            progress.update(len(batch))
    all_reduce_max([answers])  # tokens are above what stands where there is none
    return {n: [_text(tokenizer, row[:n]) for row in answers] for n in lengths}


def refuse_nothing_to_answer(prompts: Sequence[str], lengths: Sequence[int], at_once: int) -> None:
    """Raise `InputError` for no prompts, no new tokens, or none at once."""
    if not prompts or not lengths or min(lengths) < 1 or at_once < 1:
        raise InputError(
            "generation needs a prompt, a number of new tokens and at least 1 prompt at once, got "
            f"{len(prompts)} prompts, {tuple(lengths)} and {at_once}"
        )


def _text(tokenizer: PreTrainedTokenizerBase, answer: Int[Tensor, " new"]) -> str:
    return str(tokenizer.decode(answer[answer != _NOTHING], skip_special_tokens=True))


def _batches(encoded: Sequence[Sequence[int]], size: int, *, equal_length: bool) -> Iterator[list[int]]:
    """Indices of prompts, the longest first."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    groups = itertools.groupby(order, key=lambda i: len(encoded[i]) if equal_length else 0)
    for same in map(list, (group for _, group in groups)):
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _continue(model: HookedModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> Int[Tensor, "row new"]:
    """New tokens of one batch on the CPU; end-of-text and what follows it are left as they come."""
    device, n_pos = model.cfg.device, max(map(len, rows))
    tokens = torch.zeros(len(rows), n_pos, dtype=torch.long)
    real = torch.zeros(len(rows), n_pos, dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, n_pos - len(ids) :] = torch.tensor(ids)
        real[row, n_pos - len(ids) :] = 1
    tokens, real = tokens.to(device), real.to(device)
    if not is_hooked_transformer(model):
        return _continue_on_bridge(model, tokens, real, max_new_tokens)
    end = native_tokenizer(model).eos_token_id
    options = {"use_past_kv_cache": True, "prepend_bos": False, "return_type": "tokens", "verbose": False,
               "stop_at_eos": end is not None, "eos_token_id": end}  # fmt: skip
    with generating(model, real.sum(1), n_pos, cached=True):
        output = model.generate(tokens, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return output[:, n_pos:].cpu()


def _continue_on_bridge(
    model: HookedModel, tokens: Int[Tensor, "row pos"], real: Int[Tensor, "row pos"], max_new_tokens: int
) -> Int[Tensor, "row new"]:
    """By transformers' own `generate`, a few tokens at a time: rows that have ended leave the batch and its cache."""
    plain, cached, n_pos = model.original_model, cache_is_right(model), tokens.shape[1]
    tokenizer, ends = native_tokenizer(model), plain.generation_config.eos_token_id
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ends = torch.tensor([] if ends is None else ends, device=tokens.device).flatten()
    answers = torch.full((len(tokens), max_new_tokens), _NOTHING)
    rows, cache, n_prompt = torch.arange(len(tokens), device=tokens.device), None, real.sum(1)
    while len(rows) and (done := tokens.shape[1] - n_pos) < max_new_tokens:
        n_seen = tokens.shape[1] - 1 if cache is not None else 0
        with fused_attention(model), generating(model, n_prompt[rows], n_pos, cached=cached, n_seen=n_seen):
            given = plain.generate(
                tokens, attention_mask=real, past_key_values=cache, use_cache=cached, pad_token_id=pad, do_sample=False,
                max_new_tokens=min(_AT_A_TIME, max_new_tokens - done) if cached else max_new_tokens,
                return_dict_in_generate=True,
            )  # fmt: skip
        tokens, cache = given.sequences, given.past_key_values
        new = tokens[:, n_pos + done :]
        answers[rows.cpu(), done : done + new.shape[1]] = new.cpu()
        going = (~torch.isin(new, ends).any(1)).nonzero()[:, 0]
        real = torch.cat([real, torch.ones_like(new)], 1)[going]
        rows, tokens = rows[going], tokens[going]
        if cache is not None and len(going) < len(new):
            cache.batch_select_indices(going)
    return answers


def cache_is_right(model: HookedModel) -> bool:
    """Whether one cached step gives the logits of the uncached pass; asked once a model.

    From transformers 5.24 on a bridge's cache stays empty and generation turns into fluent garbage without an error.
    """
    if _CACHE not in model.__dict__:
        model.__dict__[_CACHE] = is_hooked_transformer(model) or _cached_step_equals_uncached(model)
        if not model.__dict__[_CACHE]:
            log.warning("the KV cache of %s gives wrong logits here: generating without it", model.cfg.model_name)
    return model.__dict__[_CACHE]


@torch.inference_mode()
def _cached_step_equals_uncached(model: HookedModel, *, tolerance: float = 0.05) -> bool:
    """Within `tolerance` of the logits' spread."""
    tokens = torch.arange(1, 9, device=model.cfg.device)[None] % model.cfg.d_vocab
    n_prompt = torch.tensor([tokens.shape[1] - 1])
    with generating(model, n_prompt, int(n_prompt), cached=False):
        full = model(tokens, return_type="logits")[0, -1].float()
    with generating(model, n_prompt, int(n_prompt), cached=True):
        _, cache = model(tokens[:, :-1], return_type="logits_and_cache", use_cache=True)
        if cache is None:
            return False
        step, _ = model(tokens[:, -1:], return_type="logits_and_cache", past_key_values=cache)
    return bool((step[0, -1].float() - full).abs().max() <= tolerance * full.std())
