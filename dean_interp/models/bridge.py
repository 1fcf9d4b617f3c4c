"""Puts a model of `transformers` behind a `TransformerBridge`, in place."""

import contextlib
import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import AutoProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError, first_line
from dean_interp.models.expert_hooks import hook_experts
from dean_interp.models.kv_cache import hand_over_cache
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.notes import notes
from dean_interp.models.offload import is_offloaded
from dean_interp.models.plain import plain_twin
from dean_interp.models.rounding import equal_but_for_rounding
from dean_interp.models.sites import Site
from dean_interp.models.sizes import site_shape

_N_TOKENS = 16
# Of the logits' spread; what is wrong differs by about all of it.
_TOLERANCE = 1e-2


def bridge_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, trust_remote_code: bool = False
) -> TransformerBridge:
    """The model behind a bridge. Attention becomes eager, or attention hooks and masks would not be honoured.

    Args:
        model: it is wrapped, not copied. Its `save_pretrained` still saves the model that it was.
        tokenizer: the checkpoint's own; the bridge gets a copy, and the model's notes keep this one.
        name: a folder or a name on the hub, from which TransformerLens reads the configuration.
        trust_remote_code: whether TransformerLens may run code that comes with the checkpoint.

    Raises:
        InputError: TransformerLens expects other modules or shapes, or makes another function of the model.
    """
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    # TransformerLens reloads every tokenizer by its name with a forced BOS, unless it believes that it has one.
    bridge_tokenizer = copy.deepcopy(tokenizer)
    bridge_tokenizer.init_kwargs |= {"add_bos_token": True, "name_or_path": tokenizer.name_or_path}
    device = _input_device(model.eval())
    twin = plain_twin(model)
    # offloaded weights would be fetched twice for it, and on `meta` there is nothing to compute
    tokens = None if is_offloaded(model) else _some_tokens(model, device)
    try:
        expected = None if tokens is None else _logits(model, tokens)
        with _without_mixed_device_map(model), _without_processor():
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=bridge_tokenizer, device=device, trust_remote_code=trust_remote_code
            )
        hook_experts(bridge)
        if tokens is not None and expected is not None:
            _refuse_another_model(bridge, tokens, expected, name)
    except InputError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"TransformerLens {importlib.metadata.version('transformer-lens')} cannot take '{name}' apart, a "
            f"{type(model).__name__} of this shape: {reason}"
        ) from error
    bridge.cfg.device = device
    hand_over_cache(bridge)
    notes(bridge).tokenizer = tokenizer
    notes(bridge).plain = twin
    # The caller may hold the model and save it later; its own method would save the bridge's tree of modules.
    setattr(model, "save_pretrained", twin.save_pretrained)  # noqa: B010 - it is a method in its class
    return bridge


def _some_tokens(model: PreTrainedModel, device: str) -> Int[Tensor, "1 pos"]:
    """Tokens that both models are run on."""
    embedding: Any = model.get_input_embeddings()
    n_known = embedding.weight.shape[0]
    numbers = torch.arange(1, 1 + _N_TOKENS, device=device)[None]
    return numbers % n_known


@torch.no_grad()
def _logits(model: Any, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos d_vocab"]:  # noqa: ANN401 - a model's own
    return model(tokens, use_cache=False).logits.float()


@torch.no_grad()
def _refuse_another_model(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    expected: Float[Tensor, "1 pos d_vocab"],
    name: str,
) -> None:
    """Raise `InputError` where a bridge computes something else, or shows something else than neurons.

    It takes attention in steps of its own, which are not those of every variant of an architecture. And a hook point of
    the right name may hold what a block writes, as in mixtures of experts.
    """
    checks = [(site.hook_name, _width_check(bridge, site)) for site in neuron_sites(bridge)]
    with bridge.hooks(fwd_hooks=checks):
        logits = bridge(tokens, return_type="logits")
    # weights that are not finite are told of where they are scored
    is_finite = bool(logits.isfinite().all() and expected.isfinite().all())
    if is_finite and not equal_but_for_rounding(bridge, logits, expected, least=_TOLERANCE):
        difference = (logits.float() - expected).abs().max()
        raise InputError(
            f"TransformerLens {importlib.metadata.version('transformer-lens')} makes another model of '{name}': its "
            f"logits differ by {float(difference):.2g} from those of {type(bridge.original_model).__name__}, so "
            "what is measured would not be this model"
        )


def _width_check(bridge: TransformerBridge, site: Site) -> Callable[[Tensor, Any], None]:
    width: int | None = None
    # a layer that is not plain is told of where it is scored; a model with one can be loaded and measured
    with contextlib.suppress(InputError):
        width = site_shape(bridge, site)[0] // site.n_experts

    def refuse_other_width(activation: Tensor, hook: Any) -> None:  # noqa: ANN401 - a hook point
        n_shown = activation.shape[-1]
        if width is not None and n_shown != width:
            raise InputError(
                f"{site.hook_name} of {bridge.cfg.model_name} is {n_shown} wide, and {site.out} reads "
                f"{width} neurons: what TransformerLens shows there is something else"
            )

    return refuse_other_width


def refuse_unknown_architecture(name: str, config: PretrainedConfig) -> None:
    """Raise `InputError` where TransformerLens has no bridge for what a configuration describes."""
    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        version = importlib.metadata.version("transformer-lens")
        kind = (config.architectures or [type(config).__name__])[0]
        raise InputError(f"'{name}' is a {kind}, which TransformerLens {version} does not know") from error


def _input_device(model: PreTrainedModel) -> str:
    """The device that tokens go to: that of the embedding, or the one that its offloaded weights are brought to."""
    embedding: Any = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None) if embedding.weight.is_meta else None
    return str(torch.device(hook.execution_device) if hook else embedding.weight.device)


@contextmanager
def _without_mixed_device_map(model: Any) -> Iterator[None]:  # noqa: ANN401 - with accelerate's notes on it
    """While open, the model shows no map of GPUs and host memory, which TransformerLens refuses.

    TransformerLens refuses such a map because it was never tried there; here it was.
    """
    device_map = getattr(model, "hf_device_map", None)
    devices = {str(device) for device in (device_map or {}).values()}
    is_mixed = bool({"cpu", "disk"} & devices)
    if is_mixed:
        del model.hf_device_map
    try:
        yield
    finally:
        if is_mixed:
            model.hf_device_map = device_map


@contextmanager
def _without_processor() -> Iterator[None]:
    """While open, no processor of images is loaded for a multimodal model: only its text is worked with here.

    Where the processor cannot be loaded TransformerLens runs `pip install torchvision`, which may exchange torch.
    """
    loader = AutoProcessor.__dict__["from_pretrained"]
    setattr(AutoProcessor, "from_pretrained", _no_processor)  # noqa: B010 - it is a method in its class
    try:
        yield
    finally:
        setattr(AutoProcessor, "from_pretrained", loader)  # noqa: B010


def _no_processor(*_: object, **__: object) -> None:
    """Takes what `AutoProcessor.from_pretrained` takes."""
