"""Attention by transformers' own fused kernel while text is generated; a bridge takes it step by step, for its hooks.

Those steps copy the growing cache of keys and values at every token, which costs a tenth to a fifth of the throughput.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dean_interp.models.load import HookedModel
from dean_interp.models.positions import generating

_FUSED = "_dean_interp_fused_is_right"  # what we note on a model object
_TOLERANCE = 1e-3  # of the logits' spread


@contextmanager
def fused_attention(model: HookedModel) -> Iterator[None]:
    """While open, a bridge's attention runs as `sdpa`, where no hook looks into it and the logits stay as they are."""
    if not _attentions(model) or _is_watched(model) or not _is_right(model):
        yield
        return
    with _fused(model):
        yield


@contextmanager
def _fused(model: HookedModel) -> Iterator[None]:
    layers, plain = _attentions(model), model.original_model
    before = plain.config._attn_implementation
    plain.set_attn_implementation("sdpa")
    for layer in layers:
        layer.__dict__["forward"] = getattr(layer.original_component, "forward")  # noqa: B009 - typed as a tensor
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        plain.set_attn_implementation(before)


def _attentions(model: HookedModel) -> list[nn.Module]:
    """Of every block; none where a block has another mixer."""
    found = [block.attn for block in model.blocks if hasattr(block, "attn")]
    return found if len(found) == len(model.blocks) else []


def _is_watched(model: HookedModel) -> bool:
    points = (one for layer in _attentions(model) for one in layer.modules())
    return any(one._forward_hooks or one._backward_hooks or one._forward_pre_hooks for one in points)


@torch.inference_mode()
def _is_right(model: HookedModel) -> bool:
    """Asked once a model; False where there is no such kernel, as for scores with a soft cap."""
    if _FUSED not in model.__dict__:
        config, tokens = model.original_model.config, torch.arange(1, 65, device=model.cfg.device)[None]
        tokens, right = tokens % model.cfg.d_vocab, False
        if getattr(config, "attn_logit_softcapping", None) is None:
            expected = _logits(model, tokens)
            try:
                with _fused(model):
                    found = _logits(model, tokens)
                right = bool((found - expected).abs().max() <= _TOLERANCE * expected.std())
            except (AttributeError, TypeError, ValueError):  # an architecture without it, or built in another way
                right = False
        model.__dict__[_FUSED] = right
    return model.__dict__[_FUSED]


def _logits(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos vocab"]:
    with generating(model, torch.tensor([1]), 1, cached=False):  # hooks may ask where answers begin
        return model.original_model(tokens).logits.float()
