"""Finds the experts inside a bridge and makes their neurons hook points: those of `models.experts`, and shared ones."""

from typing import Any

from torch import nn

from dean_interp.errors import InputError
from dean_interp.models.experts import OURS, RoutedExperts, keep_record

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""What TransformerLens calls the expert of every token."""


def hook_experts(bridge: Any) -> None:  # noqa: ANN401 - a TransformerBridge
    """Make the neurons of routed and of shared experts hook points of a bridge.

    Raises `InputError` where a layer is sparse in a way that shows no neurons.
    """
    n_hooked = 0
    for layer, block in enumerate(bridge.blocks):
        where = f"layer {layer} of {bridge.cfg.model_name}"
        experts = _experts_of_block(block, where)
        if experts is not None:
            _hook_layer(block, experts, where)
            n_hooked += 1
    if n_hooked:
        bridge.original_model.set_experts_implementation(OURS)
        bridge._scan_existing_hooks(bridge, "")


def _experts_of_block(block: Any, where: str) -> nn.Module | None:  # noqa: ANN401 - a component of TransformerLens
    """The routed experts of a block, or None where it is dense.

    Raises `InputError` where it is sparse in a way that shows no neurons.
    """
    mlp = getattr(block, "mlp", None)
    groups = list(_groups_of_experts(block).values())
    if len(groups) > 1:
        raise InputError(f"{where} has {len(groups)} groups of experts, not one")
    if groups and mlp is None:
        raise InputError(f"{where} has experts in a {type(block).__name__}, where TransformerLens shows no MLP")
    if groups:
        return groups[0]
    if mlp is not None and is_sparse(mlp):
        raise InputError(
            f"{where} is a mixture of experts (a {type(_inside(mlp)).__name__}) whose experts do not go through "
            "the experts interface of transformers, so their neurons cannot be hooked"
        )
    return None


def _hook_layer(block: Any, module: Any, where: str) -> None:  # noqa: ANN401 - components of TransformerLens
    """Make the neurons of one layer's experts hook points of its MLP, and keep what is known of its passes there."""
    if module._is_expert_parallel:
        raise InputError(f"the experts of {where} are spread over devices (expert parallel): load the model without")
    if module.has_post_expert_norm:
        raise InputError(f"the experts of {where} are normalised after `out`: their neurons write no fixed direction")
    record = RoutedExperts(module)
    mlp = block.mlp

    def begin(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        record.rows = (hidden.shape[0], hidden.shape[1])

    block.register_forward_pre_hook(begin, with_kwargs=True)
    keep_record(record, mlp)
    shared = shared_owner(mlp)
    if shared is None:
        return
    if not hasattr(shared, "out"):
        raise InputError(
            f"the shared expert of {where} is a {type(shared).__name__} that TransformerLens does not take apart, so "
            "its neurons cannot be hooked"
        )
    # Not through nn.Module: a hook point under two owners would have two names.
    object.__setattr__(mlp, "hook_shared_post", shared.out.hook_in)


def refuse_experts(model: nn.Module, what: str) -> None:
    """Raise `InputError` where a plain model has routed experts, which something that works on `nn.Linear` misses."""
    stacks = list(_groups_of_experts(model))
    if stacks:
        raise InputError(
            f"{what} do not reach the routed experts of this model ({stacks[0]} the first of {len(stacks)}), which are "
            "most of its MLPs: fine-tune in full (method='full')"
        )


def _groups_of_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules inside a model that go through the experts interface of `transformers`, by name."""
    # By an attribute of their own, since a component of TransformerLens shows those of what it wraps.
    return {name: module for name, module in model.named_modules() if "_is_expert_parallel" in vars(module)}


def is_sparse(mlp: nn.Module) -> bool:
    """Whether TransformerLens takes a component for a mixture: its `hook_post` is then what the block writes."""
    return hasattr(mlp, "bound_dense") and not mlp.bound_dense


def dense_owner(mlp: Any) -> tuple[Any, str] | None:  # noqa: ANN401 - a component of TransformerLens
    """The component with the matrices of a dense MLP, and what their names begin with; None for a sparse layer."""
    if is_sparse(mlp):
        return None
    prefix = "dense_" if getattr(mlp, "bound_dense", False) else ""
    return mlp, prefix


def shared_owner(mlp: Any) -> Any:  # noqa: ANN401 - a component of TransformerLens
    """The component of the expert that every token passes through; None where a layer has none."""
    if not is_sparse(mlp):
        return None
    for name in _SHARED:
        if hasattr(mlp, name):
            return getattr(mlp, name)
    return None


def _inside(component: Any) -> nn.Module:  # noqa: ANN401 - a component of TransformerLens
    """The module of `transformers` that a component wraps, or the component itself."""
    return getattr(component, "original_component", component)
