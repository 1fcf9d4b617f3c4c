"""Hands the KV cache of `transformers` to the attention of a bridge, by the name that each of them knows.

From transformers 5.24 on a layer gives its attention the argument `cache`; it was `past_key_values`. TransformerLens
(up to 4.3) reads the old name only, so that a bridge's cache stayed empty there, and each new token saw itself alone.
"""

from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge, MLAAttentionBridge


def hand_over_cache(bridge: TransformerBridge) -> None:
    """Let every attention of the bridge find the cache, in this version and in earlier ones; a second call is idle."""
    for attention in bridge.modules():
        if not isinstance(attention, AttentionBridge):
            continue
        # on the object, over its class' method; this one finds nothing of the new name in earlier versions
        attention.__dict__["_update_kv_cache"] = partial(_update, attention)
        is_handed_over = _old_name in attention._forward_pre_hooks.values()
        if isinstance(attention, MLAAttentionBridge) and _has_new_name(attention) and not is_handed_over:
            attention.register_forward_pre_hook(_old_name, with_kwargs=True)


def _update(attention: AttentionBridge, k: Tensor, v: Tensor, **named: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What attention adds to the cache and reads from it; the other named values are for TransformerLens."""
    named.setdefault("past_key_values", named.get("cache"))
    return type(attention)._update_kv_cache(attention, k, v, **named)


def _has_new_name(attention: AttentionBridge) -> bool:
    return "cache" in signature(attention.original_component.forward).parameters


def _old_name(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Latent attention (MLA) reads the cache itself, and hands nothing on to its `transformers` module."""
    renamed = {"past_key_values" if name == "cache" else name: value for name, value in named.items()}
    return args, renamed
