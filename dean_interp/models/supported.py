"""Which models are supported: decoder-only language models whose layers have MLP neurons to hook."""

import contextlib
import os
from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from dean_interp.errors import InputError, did_you_mean, first_line
from dean_interp.models.adapters import adapter_of
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.offload import named_values
from dean_interp.models.plain_layers import refuse_wrapped
from dean_interp.models.templates import rendered_chat

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def refuse_no_name(name: str, known: Iterable[str]) -> None:
    """Raise `InputError` where a name can be none of the hub, so that the hub is not asked for it.

    It is a path that does not exist, or has no owner and is nearly one of the `known` names.
    """
    if os.path.exists(name):
        return
    is_path = name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1 or name.endswith("/")
    if is_path:
        raise InputError(f"cannot load the model '{name}': there is no such folder or file")
    hint = "" if "/" in name else did_you_mean(name, known)
    if hint:
        raise InputError(f"no model {name!r}{hint}: give that, a folder, a .gguf file, or an owner/name of the hub")


def refuse_architecture(name: str, config: Any) -> None:  # noqa: ANN401 - every architecture has its own config class
    """Raise `InputError` where the configuration is of an encoder or an encoder-decoder."""
    kinds = config.architectures or ()
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"'{name}' ({config.model_type}) is an encoder-decoder; a decoder-only language model is needed"
        )
    if kinds and not any(kind.endswith(_CAUSAL) for kind in kinds):
        raise InputError(f"'{name}' is a {kinds[0]}; a decoder-only language model is needed (…ForCausalLM)")


def refuse_without_neurons(model: HookedModel) -> None:
    """Raise `InputError` where a layer has no MLP neurons to hook."""
    points = [f"blocks.{layer}.mlp.hook_post" for layer in range(len(model.blocks))]
    missing = [point for point in points if point not in model.hook_dict]
    if missing:
        raise InputError(
            f"{model.cfg.model_name} has no MLP neurons to hook ({missing[0]} is missing in "
            f"{len(missing)} of {len(points)} layers): attention-only models are not supported"
        )
    for layer, block in enumerate(model.blocks):
        # TransformerLens has mixtures of its own in HookedTransformer: their `hook_post` is no neurons' activation.
        if not adapter_of(model).mlp_matrices(layer):
            raise InputError(
                f"layer {layer} of {model.cfg.model_name} is a {type(block.mlp).__name__}, whose neurons cannot be "
                "hooked; load a mixture of experts as a bridge (without hooked_transformer)"
            )


def refuse_missing_hooks(model: HookedModel, names: Collection[str], work: str) -> None:
    """Raise `InputError` where TransformerLens does not show all hook points that some work needs.

    Of a layer with a short convolution, for instance, it shows no attention.
    """
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise InputError(
            f"{work} needs hook points that TransformerLens does not show of {model.cfg.model_name}: {missing[0]} is "
            f"missing, the first of {len(missing)}. It works with models whose layers have it"
        )


def refuse_without_head(name: str, model: Any) -> None:  # noqa: ANN401 - every architecture has its own class
    """Raise `InputError` where a model in memory predicts no tokens, whatever its configuration says."""
    kind = type(model).__name__
    if not kind.endswith(_CAUSAL) or model.get_output_embeddings() is None:
        raise InputError(
            f"'{name}' is a {kind}, which predicts no next token: load it with its head (AutoModelForCausalLM)"
        )


def refuse_without_values(model: HookedModel) -> None:
    """Raise `InputError` where a model has shapes alone, so that nothing can be computed."""
    if any(values.is_meta for _, values in named_values(model)):
        raise InputError(
            f"{model.cfg.model_name} was loaded on the device 'meta', without a weight: it can be planned for, and "
            "nothing can be computed with it"
        )


def refuse_not_finite(model: HookedModel) -> None:
    """Raise `InputError` where a weight is NaN or infinite: nothing that is computed from it would mean anything.

    So it does where a layer is not plain, or there are no weights.
    """
    refuse_wrapped(model)
    refuse_without_values(model)
    not_finite = []
    for name, parameter in named_values(model):
        if not bool(parameter.isfinite().all()):
            not_finite.append(name)
    if not_finite:
        raise InputError(
            f"{model.cfg.model_name} has weights that are not finite (NaN or infinite) in {len(not_finite)} tensors, "
            f"{not_finite[0]} the first: all must be finite"
        )


def refuse_larger_tokenizer(model: HookedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` where a tokenizer gives tokens that the model has no embedding for.

    Added tokens that texts need not hold are let pass (some text models come with a token for images):
    `refuse_unknown_tokens` refuses texts that hold them.
    """
    n_known = adapter_of(model).vocabulary_size
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= n_known}
    if not beyond:
        return
    # The tokenizer's class declares this method as an attribute.
    typed: Any = tokenizer
    added = typed.get_added_vocab()
    rendered = ""
    # A template that refuses this message is told of when it is used.
    with contextlib.suppress(InputError):
        rendered = rendered_chat(tokenizer, [{"role": "user", "content": "hello"}])
    ends = {str(tokenizer.bos_token), str(tokenizer.eos_token)}
    for token, number in beyond.items():
        is_needed = token in ends or token in rendered
        if token not in added or is_needed:
            raise InputError(
                f"the tokenizer has tokens that {model.cfg.model_name} has no embedding for ({token!r} is number "
                f"{number}, and {n_known} have one): take the model's own tokenizer, or resize its embedding "
                "(resize_token_embeddings) and train it"
            )


def refuse_unknown_tokens(model: HookedModel, tokens: Iterable[int]) -> None:
    """Raise `InputError` where a text holds a token that the model has no embedding for."""
    largest = max(tokens, default=0)
    n_known = adapter_of(model).vocabulary_size
    if largest >= n_known:
        raise InputError(
            f"a text holds the token number {largest}, and {model.cfg.model_name} has {n_known}: its tokenizer is "
            "another model's, or has tokens that this model never had"
        )


def unreadable_model(name: str, error: Exception) -> InputError:
    """The error for a file or folder that cannot be read as a model, in one line."""
    return InputError(f"cannot load the model '{name}': {first_line(error)}")


def unknown_model(name: str, error: Exception, known: Iterable[str] = ()) -> InputError:
    """The error for a model that cannot be loaded, in one line; `known` are models that have names of their own."""
    reason = first_line(error)
    if os.path.isdir(name):
        return InputError(f"cannot load the model '{name}' from its folder: {reason}")
    return InputError(
        f"cannot load the model '{name}'{did_you_mean(name, known)}: no such local folder, and the Hugging Face hub "
        f"did not give it ({reason})"
    )
