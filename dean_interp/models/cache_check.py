"""Whether a model's KV cache may be trusted: asked before answers are generated with it."""

import logging

import torch

from dean_interp.models.adapters import adapter_of
from dean_interp.models.greedy import CACHE
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.kv_cache import hand_over_cache
from dean_interp.models.notes import notes
from dean_interp.models.positions import while_generating

log = logging.getLogger(__name__)


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
def _cached_step_equals_uncached(model: HookedModel, *, tolerance: float = 0.05) -> bool:
    """Whether one cached step is within `tolerance` of the logits' spread."""
    # A bridge that was brought has none yet.
    hand_over_cache(model)
    numbers = torch.arange(1, 9, device=model.cfg.device)[None]
    tokens = numbers % adapter_of(model).vocabulary_size
    n_prompt = torch.tensor([tokens.shape[1] - 1])
    with while_generating(model, n_prompt, int(n_prompt), cached=False):
        full = model(tokens, return_type="logits")[0, -1].float()
    prompt = tokens[:, :-1]
    last = tokens[:, -1:]
    with while_generating(model, n_prompt, int(n_prompt), cached=True):
        _, cache = model(prompt, return_type="logits_and_cache", use_cache=True)
        if cache is None:
            return False
        logits, _ = model(last, return_type="logits_and_cache", **{CACHE: cache})
    step = logits[0, -1].float()
    difference = (step - full).abs().max()
    return bool(difference <= tolerance * full.std())
