"""Hands the KV cache of `transformers` to the attention of a bridge, by the name that each of them knows.

From transformers 5.24 on a layer gives its attention the cache as `cache`; before it was `past_key_values`.
TransformerLens (up to 4.3) reads the old name only, so that a bridge's cache stayed empty there and each new token saw
itself alone. The latent attention of DeepSeek reads the name elsewhere; its models are mixtures of experts, which are
not supported.
"""

from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge


def hand_over_cache(bridge: TransformerBridge) -> None:
    """Let every attention of the bridge find the cache under both names; a second call changes nothing."""
    for module in bridge.modules():
        if isinstance(module, AttentionBridge):
            # on the object, over its class' own method
            module.__dict__["_update_kv_cache"] = partial(_update, module)


def _update(attention: AttentionBridge, k: Tensor, v: Tensor, **named: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What attention adds to the cache and reads from it; the other named values are for TransformerLens."""
    named.setdefault("past_key_values", named.get("cache"))
    return type(attention)._update_kv_cache(attention, k, v, **named)
