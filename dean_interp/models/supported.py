"""Which models are supported: decoder-only language models with one dense MLP a layer."""

import os
from typing import Any

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def refuse_architecture(name: str, config: Any) -> None:  # noqa: ANN401 - every architecture has its own config class
    """Raise `InputError` where the configuration is of an encoder, an encoder-decoder or a mixture of experts."""
    kinds = config.architectures or ()
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"'{name}' ({config.model_type}) is an encoder-decoder; a decoder-only language model is needed"
        )
    if kinds and not any(kind.endswith(_CAUSAL) for kind in kinds):
        raise InputError(f"'{name}' is a {kinds[0]}; a decoder-only language model is needed (…ForCausalLM)")
    n_experts = max((getattr(config, field, None) or 0) for field in _EXPERTS)
    if n_experts > 1:
        raise InputError(
            f"'{name}' is a mixture of {n_experts} experts; models with one dense MLP a layer are supported"
        )


def refuse_without_neurons(model: HookedModel) -> None:
    """Raise `InputError` where a layer has no MLP neurons to hook."""
    missing = [i for i in range(model.cfg.n_layers) if f"blocks.{i}.mlp.hook_post" not in model.hook_dict]
    if missing:
        raise InputError(
            f"{model.cfg.model_name} has no MLP neurons to hook (blocks.{missing[0]}.mlp.hook_post is missing in "
            f"{len(missing)} of {model.cfg.n_layers} layers): mixtures of experts and attention-only models are not "
            "supported"
        )


def unknown_model(name: str, error: Exception) -> InputError:
    """The error for a model that cannot be loaded, in one line."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if os.path.isdir(name):
        return InputError(f"cannot load the model '{name}' from its folder: {reason}")
    return InputError(
        f"cannot load the model '{name}': no such local folder, and the Hugging Face hub did not give it ({reason})"
    )
