"""Runs what no hook looks at as `transformers` runs it. A bridge takes every module apart, for its hooks.

Its attention goes in steps, which write out all scores and copy the growing cache of keys and values at every token.
Its norms are computed twice, and calls of Python stand around each matrix.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    GatedMLPBridge,
    LinearBridge,
    RMSNormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from dean_interp.models.adapters import adapter_of
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.notes import notes
from dean_interp.models.positions import while_generating
from dean_interp.models.rounding import equal_but_for_rounding, tokens_of_all_kinds

# How many tokens' logits are compared.
_N_TOKENS = 64
_TOLERANCE = 1e-3
_AROUND_ONE_MODULE = (GatedMLPBridge, LinearBridge, RMSNormalizationBridge)
"""Components that call their module and show to hooks what goes in and out. Others may compute something themselves."""


@contextmanager
def unhooked(model: HookedModel) -> Iterator[None]:
    """While open, a bridge leaves out what only serves hooks that nobody has, where the logits stay as they are.

    Attention runs as `sdpa` where no hook looks into any of it. Which hooks there are is seen when it opens, so a hook
    that is added while it is open may not be called.
    """
    if not unhooked_is_right(model):
        yield
        return
    with _unhooked(model):
        yield


def unhooked_is_right(model: HookedModel) -> bool:
    """Whether the model without what serves hooks gives the same logits; asked once a model, by passes of its own."""
    noted = notes(model)
    if noted.unhooked_is_right is None:
        wraps_checkpoint = adapter_of(model).wraps_checkpoint
        noted.unhooked_is_right = wraps_checkpoint and _unhooked_equals_hooked(model)
    return noted.unhooked_is_right


@contextmanager
def _unhooked(model: HookedModel) -> Iterator[None]:
    """While open, components that no hook looks at give way to their modules."""
    plain = model.original_model
    attentions = [] if _is_watched(model) else _attentions(model)
    # A block is found by its number while hooks run, so it stays where it is, and only what it does is left out.
    blocks = []
    for block in model.blocks:
        is_known = type(block) is BlockBridge
        if is_known and not _has_hooks(block.original_component) and _is_idle(block, set()):
            blocks.append(block)
    idle = [*attentions, *_idle_components(model, is_fused=bool(attentions))]
    places = _places_in_checkpoint(plain, idle)
    before = plain.config._attn_implementation
    if attentions:
        plain.set_attn_implementation("sdpa")
    for parent, name, component in places:
        parent._modules[name] = component.original_component
    for block in blocks:
        # On each object, over its class' own `forward`.
        block.__dict__["forward"] = getattr(block.original_component, "forward")  # noqa: B009 - typed as a tensor
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        for parent, name, component in places:
            parent._modules[name] = component
        if attentions:
            plain.set_attn_implementation(before)


def _attentions(model: HookedModel) -> list[nn.Module]:
    """The attention of every block; none where a block has another mixer."""
    attentions = [block.attn for block in model.blocks if hasattr(block, "attn")]
    return attentions if len(attentions) == len(model.blocks) else []


def _is_watched(model: HookedModel) -> bool:
    """Whether any module of any attention has a hook."""
    for attention in _attentions(model):
        if any(map(_has_hooks, attention.modules())):
            return True
    return False


def _has_hooks(module: nn.Module | None) -> bool:
    """Whether a module has a hook of any kind."""
    if module is None:
        return False
    return bool(module._forward_hooks or module._backward_hooks or module._forward_pre_hooks)


def _idle_components(model: HookedModel, *, is_fused: bool) -> list[nn.Module]:
    """The components around one module that no hook looks at."""
    # A block notes what its norms read, for attention in steps and for a hook point of its own (`hook_mlp_in`).
    own: set[int] = set()
    for block in model.blocks:
        point = getattr(block, "hook_mlp_in", block)
        if is_fused and not _has_hooks(point):
            own |= {handle.id for handle in getattr(block, "_capture_hook_handles", [])}
    idle = []
    for module in model.original_model.modules():
        if type(module) in _AROUND_ONE_MODULE and _is_idle(module, own):
            idle.append(module)
    return idle


def _is_idle(component: nn.Module, own: set[int]) -> bool:
    """Whether a component has no hook but its bridge's `own`, and runs its module as the checkpoint has it."""
    if component._forward_hooks or component._backward_hooks:
        return False
    if not set(component._forward_pre_hooks) <= own:
        return False
    if getattr(component, "_use_processed_weights", False):
        return False
    points = [point for point in component._modules.values() if isinstance(point, HookPoint)]
    return not any(map(_has_hooks, points))


def _places_in_checkpoint(plain: nn.Module, components: list[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Where `transformers`' own modules hold the components: the module and its name for each."""
    ids = set(map(id, components))
    places = []
    for parent in plain.modules():
        # A component finds its parts by name while hooks run, so it keeps them.
        if isinstance(parent, GeneralizedComponent):
            continue
        for name, child in parent._modules.items():
            if id(child) in ids:
                places.append((parent, name, child))
    return places


@torch.inference_mode()
def _unhooked_equals_hooked(model: HookedModel) -> bool:
    """Whether the logits of some tokens are equal, in a row and as a tree of two branches.

    False where `sdpa` is not for them: there is no such kernel for scores with a soft cap.
    """
    if getattr(model.original_model.config, "attn_logit_softcapping", None) is not None:
        return False
    # Hooks may ask where answers begin. That one is there before components are left out.
    with while_generating(model, torch.tensor([1]), 1, cached=False):
        try:
            return _logits_stay(model, {}) and _logits_stay(model, _two_branches(model))
        # An architecture without such a kernel or such a mask, or built in another way.
        except (AttributeError, IndexError, TypeError, ValueError):
            return False


def _logits_stay(model: HookedModel, options: Mapping[str, Tensor]) -> bool:
    """Whether a pass gives the same logits without what serves hooks, beyond rounding."""
    tokens = tokens_of_all_kinds(model, _n_tokens(model))
    hooked = model(tokens, return_type="logits", **options)
    with _unhooked(model):
        without_hooks = model(tokens, return_type="logits", **options)
    return equal_but_for_rounding(model, without_hooks, hooked, least=_TOLERANCE)


def _n_tokens(model: HookedModel) -> int:
    """The number of tokens that are compared: no more than the model takes."""
    return min(_N_TOKENS, model.cfg.n_ctx)


def _two_branches(model: HookedModel) -> dict[str, Tensor]:
    """What tells a pass that its row is half a trunk, and two branches that do not see each other."""
    n_tokens = _n_tokens(model)
    first = n_tokens // 2
    second = first + n_tokens // 4
    sees = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    sees[second:, first:second] = False
    position = sees.sum(1)[None] - 1
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(1, 1, n_tokens, n_tokens, dtype=dtype)
    mask = mask.masked_fill(~sees, torch.finfo(dtype).min)
    device = model.cfg.device
    return {"attention_mask": mask.to(device), "position_ids": position.to(device)}
