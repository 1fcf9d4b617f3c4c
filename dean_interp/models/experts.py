"""Mixtures of experts: the neurons of routed experts, made hook points.

`transformers` lets a function of ours compute the experts of any model that uses its experts interface. Ours computes
what theirs does, and shows two things to TransformerLens on the way: which experts a token was sent to, and the
activations of these experts' neurons. Both have an axis for the `k` experts of a token, its slots:

- `blocks.{i}.mlp.hook_expert_ids`, `(batch, pos, k)`: the number of the expert in each slot;
- `blocks.{i}.mlp.hook_expert_post`, `(batch, pos, k, d_expert)`: what its neurons pass on to its matrix `out`.

The neurons of a layer are counted expert by expert: neuron `j` of expert `e` is number `e * d_expert + j`. So the
experts of a layer are one wide MLP, of whose neurons each token has some.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dean_interp.errors import InputError
from dean_interp.models.hooked_model import AsMatrix, OnProduct
from dean_interp.models.slots import Slots

OURS = "dean_interp"
"""Our name in the registry of `transformers`."""
_RECORD = "_dean_interp_experts"
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


@dataclass
class RoutedExperts:
    """The routed experts of one layer, and what is known of the running pass."""

    module: nn.Module
    """The experts of `transformers`: stacks of matrices, one entry an expert."""
    post: HookPoint = field(default_factory=HookPoint)
    ids_point: HookPoint = field(default_factory=HookPoint)
    on_products: dict[str, list[OnProduct]] = field(default_factory=dict)
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
        axis = 1 if is_transposed else 2
        return self.stack("out").shape[axis]

    @property
    def n_per_token(self) -> int:
        """How many experts a token is sent to: as in the last pass, or before the first as the configuration says."""
        if self.ids is not None:
            return self.ids.shape[2]
        config: Any = self.module.config
        for name in _PER_TOKEN:
            n_per_token = getattr(config, name, None)
            if isinstance(n_per_token, int):
                return n_per_token
        raise InputError(f"a {type(config).__name__} does not say how many experts a token is sent to")

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
        # `gate` and `in` stand one behind the other, or take turns.
        is_concatenated: Any = self.module.is_concatenated
        place = 0 if part == "gate" else 1
        if is_concatenated:
            return joint.chunk(2, dim=-1)[place]
        return joint[..., place::2]

    def own_matrix(
        self,
        part: str,
        stack: Float[Tensor, "expert _ _"],
        expert: int,
    ) -> Float[Tensor, "d_in d_out"]:
        """One expert's matrix in a stack that holds it, a view."""
        is_transposed: Any = self.module.is_transposed
        stored = stack[expert]
        matrix = stored if is_transposed else stored.mT
        return matrix if part == "out" else self.share(part, matrix)

    def as_matrix(self, part: str) -> AsMatrix:
        """What makes the matrix of one wide MLP, `(d_in, d_out)`, of a stack or of its gradient."""

        def one_matrix(stored: Float[Tensor, "expert _ _"]) -> Float[Tensor, "d_in d_out"]:
            # By expert, input and output.
            is_transposed: Any = self.module.is_transposed
            by_expert = stored if is_transposed else stored.mT
            if part == "out":
                return by_expert.flatten(0, 1)
            by_input = self.share(part, by_expert).permute(1, 0, 2)
            return by_input.flatten(1)

        return one_matrix

    def biases(self, part: str) -> Float[Tensor, " unit"] | None:
        """The biases of `gate` or `in`, one a neuron. None where there are none, and for `out`: those are by expert."""
        has_bias: Any = self.module.has_bias
        if part == "out" or not has_bias:
            return None
        joint = getattr(self.module, f"{self.stack_name(part)}_bias")
        return self.share(part, joint).flatten()

    @contextmanager
    def on_product(self, part: str, hook: OnProduct) -> Iterator[None]:
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
    places_of_experts = places.split(counts.tolist())
    yield from zip(experts.tolist(), places_of_experts, strict=True)


def routed_experts(model: Any, layer: int) -> RoutedExperts | None:  # noqa: ANN401 - a hooked model
    """The routed experts of a layer, or None where it has none."""
    return vars(model.blocks[layer].mlp).get(_RECORD)


def keep_record(record: RoutedExperts, mlp: Any) -> None:  # noqa: ANN401 - a component of TransformerLens
    """Keep a layer's record with its experts and with its MLP, whose hook points it gives."""
    # Not through nn.Module: a hook point under two owners would have two names.
    object.__setattr__(record.module, _RECORD, record)
    object.__setattr__(mlp, _RECORD, record)
    object.__setattr__(mlp, "hook_expert_post", record.post)
    object.__setattr__(mlp, "hook_expert_ids", record.ids_point)


def _hooked_forward(
    module: Any,  # noqa: ANN401 - experts of transformers
    hidden_states: Float[Tensor, "token d_model"],
    top_k_index: Int[Tensor, "token slot"],
    top_k_weights: Float[Tensor, "token slot"],
) -> Float[Tensor, "token d_model"]:
    """What the experts of a layer write: the forward that `transformers` calls."""
    record: RoutedExperts = vars(module)[_RECORD]
    n_tokens, n_slots = top_k_index.shape
    n_rows, n_positions = record.rows
    if n_rows * n_positions != n_tokens:
        n_rows = 1
        n_positions = n_tokens
    ids = top_k_index.reshape(n_rows, n_positions, n_slots)
    record.ids = record.ids_point(ids)
    slots = Slots(record.ids, record.n_experts)

    def product(part: str, read: Tensor) -> Tensor:
        stack = record.stack(part)
        bias = None
        if module.has_bias:
            bias = getattr(module, f"{record.stack_name(part)}_bias")
        return slots.product(read, stack, bias, is_transposed=module.is_transposed)

    # Every slot reads its token; `gate` and `in` are one product.
    read = hidden_states[slots.order // n_slots]
    pre = product("in", read)
    for part in record.parts[:-1]:
        pre = _watched(record, part, slots, read=read, written=pre)
    activation = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    activation = record.post(slots.as_tokens_stand(activation))
    activation = slots.sorted(activation)
    written = product("out", activation)
    written = _watched(record, "out", slots, read=activation, written=written)
    # A token gets what its slots write, times its router's weights.
    written = written[slots.back].unflatten(0, (n_tokens, n_slots))
    weighted = written * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


def _watched(
    record: RoutedExperts,
    part: str,
    slots: Slots,
    *,
    read: Float[Tensor, "place d_in"],
    written: Float[Tensor, "place d_out"],
) -> Float[Tensor, "place d_out"]:
    """What a part writes, after the functions on its product. `gate` and `in` share one tensor."""
    for hook in record.on_products.get(part, ()):
        own = written if part == "out" else record.share(part, written)
        product = slots.as_tokens_stand(own)
        changed = hook(slots.as_tokens_stand(read), product)
        own = slots.sorted(product if changed is None else changed)
        written = own if part == "out" else _with_share(record, part, written, own)
    return written


def _with_share(record: RoutedExperts, part: str, joint: Tensor, new: Tensor) -> Tensor:
    """What belongs to `gate` and `in` together, with other values for one of them."""
    if "gate" not in record.parts:
        return new
    gate = new if part == "gate" else record.share("gate", joint)
    up = new if part == "in" else record.share("in", joint)
    is_concatenated: Any = record.module.is_concatenated
    if is_concatenated:
        return torch.cat([gate, up], -1)
    return torch.stack([gate, up], -1).flatten(-2)


ALL_EXPERTS_FUNCTIONS.register(OURS, _hooked_forward)
