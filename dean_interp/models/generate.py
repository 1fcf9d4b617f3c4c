"""Greedy generation, and the check that a KV cache may be trusted with it."""

import logging

import torch

from dean_interp.models.load import HookedModel, is_hooked_transformer, native_tokenizer
from dean_interp.models.tokens import Template, encode

log = logging.getLogger(__name__)


@torch.inference_mode()
def generate(
    model: HookedModel, prompts: list[str], *, max_new_tokens: int = 64, template: Template = "chat"
) -> list[str]:
    """Greedy answers, one a prompt, under whatever hooks the model has at the time.

    Prompts go one by one; the KV cache is used only where `cache_is_right`.
    """
    cached = cache_is_right(model)
    if not cached:
        log.warning("the KV cache of %s gives wrong logits here: generating without it", model.cfg.model_name)
    tokenizer = native_tokenizer(model)
    answers = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt, [], template=template).prompt
        tokens = torch.tensor([ids], device=model.cfg.device)
        output = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_past_kv_cache=cached,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
        answers.append(str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)))
    return answers


@torch.inference_mode()
def cache_is_right(model: HookedModel, *, tolerance: float = 0.05) -> bool:
    """Whether one cached step gives the logits of the uncached pass, within `tolerance` of their spread.

    From transformers 5.24 on a bridge's cache stays empty and generation turns into fluent garbage without an error.
    """
    if is_hooked_transformer(model):
        return True
    tokens = torch.arange(1, 9, device=model.cfg.device)[None] % model.cfg.d_vocab
    full = model(tokens, return_type="logits")[0, -1].float()
    _, cache = model(tokens[:, :-1], return_type="logits_and_cache", use_cache=True)
    if cache is None:
        return False
    step, _ = model(tokens[:, -1:], return_type="logits_and_cache", past_key_values=cache)
    return bool((step[0, -1].float() - full).abs().max() <= tolerance * full.std())
