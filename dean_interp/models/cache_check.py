"""Whether a model's KV cache may be trusted: asked before answers are generated with it."""

import logging

import torch

from dean_interp.models.adapters import adapter_of
from dean_interp.models.greedy import CACHE
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.kv_cache import hand_over_cache
from dean_interp.models.notes import notes
from dean_interp.models.positions import while_generating
from dean_interp.models.rounding import equal_but_for_rounding, tokens_of_all_kinds

log = logging.getLogger(__name__)

_N_TOKENS = 8
# By which part of the logits' spread a cached step may differ.
_TOLERANCE = 0.05


def cache_is_right(model: HookedModel) -> bool:
    """Whether one cached step gives the logits of the uncached pass; asked once a model.

    A cache that stays empty turns generation into fluent garbage without an error.
    """
    noted = notes(model)
    if noted.cache_is_right is None:
        needs_check = adapter_of(model).cache_needs_check
        noted.cache_is_right = not needs_check or _cached_step_equals_uncached(model)
        if not noted.cache_is_right:
            log.warning("the KV cache of %s gives wrong logits here: generating without it", model.cfg.model_name)
    return noted.cache_is_right


@torch.inference_mode()
def _cached_step_equals_uncached(model: HookedModel) -> bool:
    """Whether one cached step gives the logits of the uncached pass, beyond rounding."""
    # A bridge that was brought has none yet.
    hand_over_cache(model)
    tokens = tokens_of_all_kinds(model, _N_TOKENS)
    n_prompt = torch.tensor([tokens.shape[1] - 1])
    with while_generating(model, n_prompt, int(n_prompt), cached=False):
        full = model(tokens, return_type="logits")
    prompt = tokens[:, :-1]
    last = tokens[:, -1:]
    with while_generating(model, n_prompt, int(n_prompt), cached=True):
        _, cache = model(prompt, return_type="logits_and_cache", use_cache=True)
        if cache is None:
            return False
        step, _ = model(last, return_type="logits_and_cache", **{CACHE: cache})
    return equal_but_for_rounding(model, step[0, -1], full[0, -1], least=_TOLERANCE)
