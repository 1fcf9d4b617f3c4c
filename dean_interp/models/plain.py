"""The plain `transformers` model inside a bridge: what is saved, since a bridge changes the tree of modules in place.

A bridge puts components of its own between the modules, and where a checkpoint keeps several matrices in one tensor
(the `c_attn` of GPT-2, the `gate_up_proj` of Phi-3) it computes with parts that it split off. Neither belongs in a
checkpoint. So the tree is copied before it is bridged. The copy holds the same parameters, not copies of them.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from dean_interp.errors import InputError


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model's tree of modules with the same parameters and buffers, to be saved after the model itself is bridged.

    Its `state_dict` raises `InputError` where the bridge computes with something else than these parameters.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        # What a layer has computed from its parameters (pruned ones do) has a history, and cannot be copied.
        shared += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        # The hooks of accelerate hold offloaded weights.
        if hasattr(module, "_hf_hook"):
            shared.append(module._hf_hook)
    twin = copy.deepcopy(model, {id(item): item for item in shared})
    twin.register_state_dict_pre_hook(partial(_refuse_stale, model))
    return twin


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, with the generation settings as they are.

    `transformers` reads settings that it does not write (a temperature where nothing is sampled).
    """
    settings = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / GENERATION_CONFIG_NAME)


def parts_of_joint_tensors(model: nn.Module) -> Iterator[nn.Linear]:
    """What a bridge split off joint tensors of the checkpoint inside it, and computes with."""
    for _, _, parts in _joint_components(model):
        yield from parts


def _joint_components(model: nn.Module) -> Iterator[tuple[nn.Module, Callable, list[nn.Linear]]]:
    """By component of a bridge: the module with the joint tensor, what splits it, and the parts that it made."""
    component: Any
    for component in model.modules():
        if hasattr(component, "split_qkv_matrix"):
            names = ("q", "k", "v")
            split = component.split_qkv_matrix
        elif hasattr(component, "split_gate_up_matrix"):
            names = ("gate", "in")
            split = component.split_gate_up_matrix
        else:
            continue
        parts = [getattr(component, name).original_component for name in names]
        yield component.original_component, split, parts


def _refuse_stale(model: PreTrainedModel, twin: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise `InputError` where the bridged model holds other parameters than its twin, or changed parts of them."""
    bridged = set(map(id, model.parameters()))
    if any(id(parameter) not in bridged for parameter in twin.parameters()):
        raise InputError(
            "parameters of the model were exchanged after load_model wrapped it: it cannot be saved as the checkpoint "
            "that it came from"
        )
    for joint, split, parts in _joint_components(model):
        # A joint tensor that is away (offloaded) cannot be split again.
        if any(parameter.is_meta for parameter in joint.parameters()):
            continue
        fresh_parts = split(joint)
        if not all(map(_are_equal, parts, fresh_parts)):
            raise InputError(
                "matrices that the bridge split off a joint tensor of the checkpoint were changed, and the joint "
                "tensor was not: what was changed would be lost, so change the joint tensor before load_model"
            )


def _are_equal(part: nn.Linear, fresh: nn.Linear) -> bool:
    """Whether two layers hold the same numbers."""
    return all(map(torch.equal, part.parameters(), fresh.parameters()))
