"""Mixtures of experts: the neurons of routed experts, made hook points.

`transformers` lets a function of ours compute the experts of any model that uses its experts interface. Ours computes
what theirs does, and shows two things to TransformerLens on the way: which experts a token was sent to, and the
activations of these experts' neurons. Both have an axis for the `k` experts of a token, its slots:

- `blocks.{i}.mlp.hook_expert_ids`, `(batch, pos, k)`: the number of the expert in each slot;
- `blocks.{i}.mlp.hook_expert_post`, `(batch, pos, k, d_expert)`: what its neurons pass on to its matrix `out`.

The neurons of a layer are counted expert by expert: neuron `j` of expert `e` is number `e * d_expert + j`. So the
experts of a layer are one wide MLP, of whose neurons each token has some.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dean_interp.errors import InputError
from dean_interp.models.slots import Slots

OURS = "dean_interp"
"""Our name in the registry of `transformers`."""
_RECORD = "_dean_interp_experts"
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


@dataclass
class RoutedExperts:
    """The routed experts of one layer, and what is known of the running pass."""

    module: nn.Module
    """The experts of `transformers`: stacks of matrices, one entry an expert."""
    post: HookPoint = field(default_factory=HookPoint)
    ids_point: HookPoint = field(default_factory=HookPoint)
    on_products: dict[str, list[Callable[[Tensor, Tensor], Tensor | None]]] = field(default_factory=dict)
    """Functions between what a stack reads and what it writes, by the part: `gate`, `in` or `out`."""
    rows: tuple[int, int] = (1, 0)
    """Batch and positions of the running pass."""
    ids: Int[Tensor, "batch pos slot"] | None = None
    """The expert in each slot of the last pass; None before the first."""

    @property
    def n_experts(self) -> int:
        """How many experts the layer has."""
        return self.stack("out").shape[0]

    @property
    def d_expert(self) -> int:
        """How many neurons an expert has."""
        is_transposed: Any = self.module.is_transposed
        return self.stack("out").shape[1 if is_transposed else 2]

    @property
    def n_per_token(self) -> int:
        """How many experts a token is sent to: as in the last pass, or before the first as the configuration says."""
        if self.ids is not None:
            return self.ids.shape[2]
        config: Any = self.module.config
        given = [getattr(config, name) for name in _PER_TOKEN if isinstance(getattr(config, name, None), int)]
        if not given:
            raise InputError(f"a {type(config).__name__} does not say how many experts a token is sent to")
        return given[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The matrices of an expert."""
        has_gate: Any = self.module.has_gate
        return ("gate", "in", "out") if has_gate else ("in", "out")

    def stack_name(self, part: str) -> str:
        """The parameter that holds a part of every expert."""
        if part == "out":
            return "down_proj"
        return "gate_up_proj" if "gate" in self.parts else "up_proj"

    def stack(self, part: str) -> nn.Parameter:
        """That parameter."""
        return getattr(self.module, self.stack_name(part))

    def share(self, part: str, joint: Float[Tensor, "... joint"]) -> Float[Tensor, "... d_expert"]:
        """A part's share of what belongs to `gate` and `in` together, a view."""
        if "gate" not in self.parts:
            return joint
        is_concatenated: Any = self.module.is_concatenated
        if is_concatenated:
            return joint.chunk(2, dim=-1)[0 if part == "gate" else 1]
        return joint[..., (0 if part == "gate" else 1) :: 2]

    def own_matrix(self, part: str, stack: Float[Tensor, "expert _ _"], expert: int) -> Float[Tensor, "d_in d_out"]:
        """One expert's matrix in a stack that holds it, a view."""
        is_transposed: Any = self.module.is_transposed
        matrix = stack[expert] if is_transposed else stack[expert].mT
        return matrix if part == "out" else self.share(part, matrix)

    def as_matrix(self, part: str) -> Callable[[Tensor], Tensor]:
        """What makes the matrix of one wide MLP, `(d_in, d_out)`, of a stack or of its gradient."""

        def one_matrix(stored: Float[Tensor, "expert _ _"]) -> Float[Tensor, "d_in d_out"]:
            is_transposed: Any = self.module.is_transposed
            by_expert = stored if is_transposed else stored.mT  # (expert, d_in, d_out)
            if part == "out":
                return by_expert.flatten(0, 1)
            return self.share(part, by_expert).permute(1, 0, 2).flatten(1)

        return one_matrix

    def biases(self, part: str) -> Float[Tensor, " unit"] | None:
        """The biases of `gate` or `in`, one a neuron. None where there are none, and for `out`: those are by expert."""
        has_bias: Any = self.module.has_bias
        if part == "out" or not has_bias:
            return None
        return self.share(part, getattr(self.module, f"{self.stack_name(part)}_bias")).flatten()

    @contextmanager
    def on_product(self, part: str, hook: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
        """While open, `hook(x, product)` is called for every pass, as for a dense matrix; both have slots."""
        hooks = self.on_products.setdefault(part, [])
        hooks.append(hook)
        try:
            yield
        finally:
            hooks.remove(hook)


def by_expert(ids: Int[Tensor, "..."]) -> Iterator[tuple[int, Int[Tensor, " place"]]]:
    """Every expert that has a slot, with the slots' places in `ids` as it lies in memory, ascending."""
    flat = ids.flatten()
    places = flat.argsort(stable=True)
    experts, counts = flat[places].unique_consecutive(return_counts=True)
    yield from zip(experts.tolist(), places.split(counts.tolist()), strict=True)


def hook_experts(bridge: Any) -> None:  # noqa: ANN401 - a TransformerBridge
    """Make the neurons of routed and of shared experts hook points of a bridge.

    Raises `InputError` where a layer is sparse in a way that shows no neurons.
    """
    n_hooked = 0
    for layer, block in enumerate(bridge.blocks):
        where = f"layer {layer} of {bridge.cfg.model_name}"
        mlp = getattr(block, "mlp", None)
        found = list(_groups_of_experts(block).values())
        if len(found) > 1:
            raise InputError(f"{where} has {len(found)} groups of experts, not one")
        if found and mlp is None:
            raise InputError(f"{where} has experts in a {type(block).__name__}, where TransformerLens shows no MLP")
        if found:
            _hook_layer(block, found[0], where)
            n_hooked += 1
        elif mlp is not None and is_sparse(mlp):
            raise InputError(
                f"{where} is a mixture of experts (a {type(_inside(mlp)).__name__}) whose experts do not go through "
                "the experts interface of transformers, so their neurons cannot be hooked"
            )
    if n_hooked:
        bridge.original_model.set_experts_implementation(OURS)
        bridge._scan_existing_hooks(bridge, "")


def routed_experts(model: Any, layer: int) -> RoutedExperts | None:  # noqa: ANN401 - a hooked model
    """The routed experts of a layer, or None where it has none."""
    return vars(model.blocks[layer].mlp).get(_RECORD)


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
    return mlp, "dense_" if getattr(mlp, "bound_dense", False) else ""


def shared_owner(mlp: Any) -> Any:  # noqa: ANN401 - a component of TransformerLens
    """The component of the expert that every token passes through; None where a layer has none."""
    if not is_sparse(mlp):
        return None
    return next((getattr(mlp, name) for name in _SHARED if hasattr(mlp, name)), None)


def _hook_layer(block: Any, module: Any, where: str) -> None:  # noqa: ANN401 - components of TransformerLens
    if module._is_expert_parallel:
        raise InputError(f"the experts of {where} are spread over devices (expert parallel): load the model without")
    if module.has_post_expert_norm:
        raise InputError(f"the experts of {where} are normalised after `out`: their neurons write no fixed direction")
    record, mlp = RoutedExperts(module), block.mlp

    def begin(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        record.rows = (hidden.shape[0], hidden.shape[1])

    block.register_forward_pre_hook(begin, with_kwargs=True)
    # Not through nn.Module: a hook point under two owners would have two names.
    object.__setattr__(module, _RECORD, record)
    object.__setattr__(mlp, _RECORD, record)
    object.__setattr__(mlp, "hook_expert_post", record.post)
    object.__setattr__(mlp, "hook_expert_ids", record.ids_point)
    shared = shared_owner(mlp)
    if shared is not None and not hasattr(shared, "out"):
        raise InputError(
            f"the shared expert of {where} is a {type(shared).__name__} that TransformerLens does not take apart, so "
            "its neurons cannot be hooked"
        )
    if shared is not None:
        object.__setattr__(mlp, "hook_shared_post", getattr(shared, "out").hook_in)  # noqa: B009 - a module's name


def _inside(component: Any) -> nn.Module:  # noqa: ANN401 - a component of TransformerLens
    return getattr(component, "original_component", component)


def _hooked_forward(
    module: Any,  # noqa: ANN401 - experts of transformers
    hidden_states: Float[Tensor, "token d_model"],
    top_k_index: Int[Tensor, "token slot"],
    top_k_weights: Float[Tensor, "token slot"],
) -> Float[Tensor, "token d_model"]:
    """What the experts of a layer write: the forward that `transformers` calls."""
    record: RoutedExperts = vars(module)[_RECORD]
    n_tokens, n_slots = top_k_index.shape
    rows = record.rows if record.rows[0] * record.rows[1] == n_tokens else (1, n_tokens)
    record.ids = record.ids_point(top_k_index.reshape(*rows, n_slots))
    slots = Slots(record.ids, record.n_experts)

    def product(part: str, read: Tensor) -> Tensor:
        bias = getattr(module, f"{record.stack_name(part)}_bias") if module.has_bias else None
        return slots.product(read, record.stack(part), bias, is_transposed=module.is_transposed)

    read = hidden_states[slots.order // n_slots]
    pre = product("in", read)
    for part in record.parts[:-1]:
        pre = _watched(record, part, slots, read, pre)
    activation = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    activation = slots.sorted(record.post(slots.as_tokens_stand(activation)))
    written = _watched(record, "out", slots, activation, product("out", activation))
    weighted = written[slots.back].unflatten(0, (n_tokens, n_slots)) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


def _watched(record: RoutedExperts, part: str, slots: Slots, read: Tensor, written: Tensor) -> Tensor:
    """What a part writes, after the functions on its product. `gate` and `in` share one tensor."""
    for hook in record.on_products.get(part, ()):
        own = written if part == "out" else record.share(part, written)
        product = slots.as_tokens_stand(own)
        changed = hook(slots.as_tokens_stand(read), product)
        new = slots.sorted(product if changed is None else changed)
        written = new if part == "out" else _with_share(record, part, written, new)
    return written


def _with_share(record: RoutedExperts, part: str, joint: Tensor, new: Tensor) -> Tensor:
    """What belongs to `gate` and `in` together, with other values for one of them."""
    if "gate" not in record.parts:
        return new
    gate, up = (new, record.share("in", joint)) if part == "gate" else (record.share("gate", joint), new)
    is_concatenated: Any = record.module.is_concatenated
    return torch.cat([gate, up], -1) if is_concatenated else torch.stack([gate, up], -1).flatten(-2)


ALL_EXPERTS_FUNCTIONS.register(OURS, _hooked_forward)
