"""Models of a few layers and random weights, in the shape of a real one: passes through them tell its time."""

import copy
from collections import defaultdict

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.load import load_model
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.sizes import neuron_shapes
from dean_interp.planning.parameters import n_parameters


def has_layers_alike(shape: HookedModel) -> bool:
    """Whether every layer has the same sites of the same widths, so that a few of them stand for all."""
    layers = defaultdict(list)
    for site, size in neuron_shapes(shape).items():
        layers[site.layer].append((site.part, tuple(size)))
    first, *others = layers.values()
    all_have_sites = len(layers) == len(shape.blocks)
    return all_have_sites and all(other == first for other in others)


def shallow_bytes(shape: HookedModel, n_layers: int) -> int:
    """Bytes of the weights of a model with `n_layers` of the same layers."""
    n_in_blocks = n_parameters(shape.blocks)
    n_outside = n_parameters(shape) - n_in_blocks
    n_in_layers = n_in_blocks * n_layers // len(shape.blocks)
    bytes_each = next(shape.parameters()).element_size()
    return bytes_each * (n_outside + n_in_layers)


def shallow_model(shape: HookedModel, n_layers: int, *, device: str) -> HookedModel:
    """A model of the shape's first layers, with random weights and the same tokenizer.

    Args:
        shape: the model, with or without its weights.
        n_layers: how many layers it gets.
        device: where it lies.
    """
    config = _with_layers(shape.original_model.config, n_layers)
    dtype = next(shape.parameters()).dtype
    # The caller's random numbers stay as they are: `torch.manual_seed` would seed those of GPUs, too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return load_model(plain.eval().to(device), tokenizer=native_tokenizer(shape))


def _with_layers(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """The configuration of a model with fewer layers, and of no checkpoint's name."""
    config = copy.deepcopy(config)
    config._name_or_path = ""
    text = config.get_text_config()
    n_before = text.num_hidden_layers
    for name, value in vars(text).items():
        # What is said of each layer, such as its kind of attention.
        is_of_layers = isinstance(value, list) and len(value) == n_before
        if is_of_layers:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return config
