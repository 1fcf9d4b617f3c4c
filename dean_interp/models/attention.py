"""Attention by transformers' own fused kernel while text is generated; a bridge takes it step by step, for its hooks.

Those steps copy the growing cache of keys and values at every token, which costs a tenth to a fifth of the throughput.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dean_interp.models.adapters import adapter_of
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.notes import notes
from dean_interp.models.positions import while_generating

_TOLERANCE = 1e-3  # of the logits' spread


@contextmanager
def fused_attention(model: HookedModel) -> Iterator[None]:
    """While open, a bridge's attention runs as `sdpa`, where no hook looks into it and the logits stay as they are."""
    may_be_fused = adapter_of(model).wraps_checkpoint and bool(_attentions(model)) and not _is_watched(model)
    if not may_be_fused or not _is_right(model):
        yield
        return
    with _fused(model):
        yield


@contextmanager
def _fused(model: HookedModel) -> Iterator[None]:
    layers, plain = _attentions(model), model.original_model
    before = plain.config._attn_implementation
    plain.set_attn_implementation("sdpa")
    # On each object, over its class' own `forward`, which takes the steps.
    for layer in layers:
        layer.__dict__["forward"] = getattr(layer.original_component, "forward")  # noqa: B009 - typed as a tensor
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        plain.set_attn_implementation(before)


def _attentions(model: HookedModel) -> list[nn.Module]:
    """The attention of every block; none where a block has another mixer."""
    attentions = [block.attn for block in model.blocks if hasattr(block, "attn")]
    return attentions if len(attentions) == len(model.blocks) else []


def _is_watched(model: HookedModel) -> bool:
    """Whether any module of any attention has a hook."""
    for layer in _attentions(model):
        for module in layer.modules():
            if module._forward_hooks or module._backward_hooks or module._forward_pre_hooks:
                return True
    return False


def _is_right(model: HookedModel) -> bool:
    """Whether the fused attention gives the model's logits; asked once a model."""
    noted = notes(model)
    if noted.fused_attention_is_right is None:
        noted.fused_attention_is_right = _fused_equals_stepwise(model)
    return noted.fused_attention_is_right


@torch.inference_mode()
def _fused_equals_stepwise(model: HookedModel) -> bool:
    """Compares the logits of some tokens; False where there is no such kernel, as for scores with a soft cap."""
    if getattr(model.original_model.config, "attn_logit_softcapping", None) is not None:
        return False
    tokens = torch.arange(1, 65, device=model.cfg.device)[None] % adapter_of(model).vocabulary_size
    stepwise = _logits(model, tokens)
    try:
        with _fused(model):
            fused = _logits(model, tokens)
        return bool((fused - stepwise).abs().max() <= _TOLERANCE * stepwise.std())
    except (AttributeError, TypeError, ValueError):  # an architecture without it, or built in another way
        return False


def _logits(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos vocab"]:
    with while_generating(model, torch.tensor([1]), 1, cached=False):  # hooks may ask where answers begin
        return model.original_model(tokens).logits.float()
