"""What differs between the two kinds of TransformerLens models, each kind behind one adapter.

A `TransformerBridge` wraps a `transformers` model, with the checkpoint's own tensors. A `HookedTransformer`
(TransformerLens 3.9; its adapter is in `hooked_transformer.py`) is a model of TransformerLens' own, with its heads
apart. `adapter_of` gives the adapter of a model; nothing else asks which kind a model is.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dean_interp.errors import InputError
from dean_interp.models import offload
from dean_interp.models.expert_hooks import dense_owner, shared_owner
from dean_interp.models.experts import RoutedExperts, routed_experts
from dean_interp.models.greedy import CACHE, greedy_settings, without_its_settings
from dean_interp.models.hooked_model import AsMatrix, HookedModel, OnProduct, is_hooked_transformer
from dean_interp.models.plain_layers import why_not_plain
from dean_interp.models.routers import router_name, watch_router
from dean_interp.models.sites import MATRICES, Site
from dean_interp.models.turn_end import end_tokens

DENSE = ("gate", "in", "out")
"""The matrices of one MLP."""


@runtime_checkable
class Adapter(Protocol):
    """What this package asks of a model whose answer depends on the model's kind."""

    kind: ClassVar[str]
    """The name of the model's class, for messages."""
    wraps_checkpoint: ClassVar[bool]
    """Whether a `transformers` model with the checkpoint's own tensors is inside, as `original_model`. Only then are
    edits made from it, is it exported, does lm-eval run it, and is there a fused attention."""
    rows_may_branch: ClassVar[bool]
    """Whether a row may be a tree of branches, by an attention mask and positions of ours."""
    rows_may_pad_left: ClassVar[bool]
    """Whether rows may be padded on the left. If not, prompts that are generated from together have equal length."""
    cache_needs_check: ClassVar[bool]
    """Whether its KV cache may be wrong, as that of a bridge is in some versions of transformers."""
    keeps_cache: ClassVar[bool]
    """Whether `generate` gives its cache back, so that an answer can grow over several calls."""

    def mlp_matrices(self, layer: int) -> tuple[Site, ...]:
        """The MLP matrices of a layer, in order."""
        ...

    @property
    def norms_are_folded(self) -> bool:
        """Whether the weights hold those of the LayerNorm before them."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """How many tokens have an embedding."""
        ...

    @property
    def unembedding_shape(self) -> tuple[int, int]:
        """Width of what the unembedding reads, and number of the logits that it writes."""
        ...

    def parameter(self, site: Site) -> tuple[nn.Parameter, AsMatrix]:
        """The parameter of a matrix, and what makes `(d_in, d_out)` of it."""
        ...

    def values(self, site: Site) -> Tensor:
        """What the parameter of a matrix holds, fetched to the CPU where it is offloaded."""
        ...

    def bias(self, site: Site) -> Float[Tensor, " d_out"] | None:
        """The parameter that is added to an MLP matrix's product, or None."""
        ...

    def on_product(self, site: Site, hook: OnProduct) -> AbstractContextManager[None]:
        """While open, every pass calls `hook` with what the matrix reads and what it writes."""
        ...

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer."""
        ...

    def generate(
        self,
        tokens: Int[Tensor, "row pos"],
        real: Int[Tensor, "row pos"],
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        cached: bool,
        cache: Any,  # noqa: ANN401 - transformers' own
    ) -> tuple[Int[Tensor, "row all_pos"], Any]:
        """The tokens with greedy continuations behind them, and the KV cache where it is kept.

        Args:
            tokens: rows of tokens; padding, on the left, is where `real` is 0.
            real: 1 where a token is real.
            tokenizer: the checkpoint's own.
            max_new_tokens: fewer come where all rows have ended.
            cached: use a KV cache.
            cache: what an earlier call on the same rows gave back, or None.
        """
        ...


def adapter_of(model: HookedModel) -> Adapter:
    """The adapter of a model, by its kind."""
    if not is_hooked_transformer(model):
        return BridgeAdapter(model)
    # Here, since that module imports from this one.
    from dean_interp.models.hooked_transformer import HookedTransformerAdapter

    return HookedTransformerAdapter(model)


@dataclass(frozen=True)
class BridgeAdapter:
    """A `TransformerBridge`: modules of `transformers`, each behind an `original_component`."""

    model: HookedModel
    kind: ClassVar[str] = "TransformerBridge"
    wraps_checkpoint: ClassVar[bool] = True
    rows_may_branch: ClassVar[bool] = True
    rows_may_pad_left: ClassVar[bool] = True
    cache_needs_check: ClassVar[bool] = True
    keeps_cache: ClassVar[bool] = True

    def mlp_matrices(self, layer: int) -> tuple[Site, ...]:
        """By the components, and the stacks of routed experts."""
        mlp = self.model.blocks[layer].mlp
        sites: list[Site] = []
        dense = dense_owner(mlp)
        if dense is not None:
            owner, prefix = dense
            sites += [Site(layer, part) for part in DENSE if hasattr(owner, prefix + part)]
        experts = routed_experts(self.model, layer)
        if experts is not None:
            sites += [Site(layer, f"experts.{part}", experts.n_experts) for part in experts.parts]
        shared = shared_owner(mlp)
        if shared is not None:
            sites += [Site(layer, f"shared.{part}") for part in DENSE if hasattr(shared, part)]
        return tuple(sites)

    @property
    def norms_are_folded(self) -> bool:
        """Where TransformerLens says that it processed the weights."""
        return any(getattr(block.mlp, "_use_processed_weights", False) for block in self.model.blocks)

    @property
    def vocabulary_size(self) -> int:
        """The rows of the embedding."""
        return self.model.embed.original_component.weight.shape[0]

    @property
    def unembedding_shape(self) -> tuple[int, int]:
        """That of the head, which is an `nn.Linear` in every language model of `transformers`."""
        n_logits, width = self.model.unembed.original_component.weight.shape
        return width, n_logits

    def parameter(self, site: Site) -> tuple[nn.Parameter, AsMatrix]:
        """Raises `InputError` where the matrix is not a plain module of its own."""
        experts = self._experts(site)
        if experts is not None:
            part = site.part.removeprefix("experts.")
            return experts.stack(part), experts.as_matrix(part)
        owner, part = owner_of(self.model, site)
        component = getattr(owner, part, None)
        # TransformerLens 3.9 leaves some routers as they are.
        unwrapped = component if site.part == "router" else None
        module = getattr(component, "original_component", unwrapped)
        stored = getattr(module, "weight", None)
        side = "attention" if site.part in MATRICES["attention"] else "MLP"
        where = f"layer {site.layer}'s {side}"
        name = self.model.cfg.model_name
        own = {kind.__module__ for kind in type(self.model.original_model).__mro__}
        why = why_not_plain(module, own) if isinstance(module, nn.Module) else ""
        if why:
            raise InputError(f"the matrix '{site.part}' in {where} of {name} {why}: it is not all that is computed")
        if not isinstance(stored, nn.Parameter):
            raise InputError(f"{name} keeps no separate matrix '{site.part}' in {where}")
        # `Conv1D` stores (d_in, d_out), `nn.Linear` stores (d_out, d_in).
        as_matrix = as_it_is if isinstance(module, Conv1D) else torch.t
        return stored, as_matrix

    def values(self, site: Site) -> Tensor:
        """Offloaded values come to the CPU."""
        stored, _ = self.parameter(site)
        experts = self._experts(site)
        if experts is None:
            values = offload.values(self._component(site))
        else:
            stack_name = experts.stack_name(site.part.removeprefix("experts."))
            values = offload.values(experts.module, stack_name)
        return values if values is stored else values.cpu()

    def bias(self, site: Site) -> Float[Tensor, " d_out"] | None:
        """The bias of the component. Experts have one for each neuron, and none for `out`: those are by expert."""
        experts = self._experts(site)
        if experts is not None:
            return experts.biases(site.part.removeprefix("experts."))
        return getattr(self._component(site), "bias", None)

    @contextmanager
    def on_product(self, site: Site, hook: OnProduct) -> Iterator[None]:
        """Around the component, which reads `hook_in` and writes `hook_out`, or around the experts' products."""
        experts = self._experts(site)
        if experts is not None:
            with experts.on_product(site.part.removeprefix("experts."), hook):
                yield
            return
        watches = watch_router if site.part == "router" else _watch_matrix
        with watches(self._component(site), hook):
            yield

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Those of the checkpoint's generation settings among them."""
        settings = self.model.original_model.generation_config
        of_settings = None if settings is None else settings.eos_token_id
        return end_tokens(tokenizer, of_settings)

    def generate(
        self,
        tokens: Int[Tensor, "row pos"],
        real: Int[Tensor, "row pos"],
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        cached: bool,
        cache: Any,  # noqa: ANN401
    ) -> tuple[Int[Tensor, "row all_pos"], Any]:
        """By `transformers`' own `generate`, with settings of ours."""
        settings = greedy_settings(self.end_tokens(tokenizer), cached=cached)
        settings.max_new_tokens = max_new_tokens
        plain = self.model.original_model
        earlier = {} if cache is None else {CACHE: cache}
        with without_its_settings(plain):
            output = plain.generate(tokens, generation_config=settings, attention_mask=real, **earlier)
        return output.sequences, getattr(output, CACHE)

    def _component(self, site: Site) -> Any:  # noqa: ANN401 - a module of transformers
        owner, part = owner_of(self.model, site)
        component = getattr(owner, part)
        return getattr(component, "original_component", component)

    def _experts(self, site: Site) -> RoutedExperts | None:
        """The routed experts that a site's matrix belongs to, or None where it belongs to none."""
        if not site.is_of_experts:
            return None
        experts = routed_experts(self.model, site.layer)
        if experts is None:
            raise InputError(f"layer {site.layer} of {self.model.cfg.model_name} has no routed experts")
        return experts


@contextmanager
def _watch_matrix(component: nn.Module, hook: OnProduct) -> Iterator[None]:
    """While open, `hook` is called with what a module reads and what it writes, and may change the latter."""

    def call(module: nn.Module, args: tuple[Tensor, ...], product: Tensor) -> Tensor | None:
        return hook(args[0], product)

    handle = component.register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()


def as_it_is(stored: Tensor) -> Tensor:
    """A parameter that is `(d_in, d_out)` already."""
    return stored


def owner_of(model: HookedModel, site: Site) -> tuple[Any, str]:
    """The module of TransformerLens that a matrix belongs to, and what it calls the matrix."""
    block = model.blocks[site.layer]
    if site.part in MATRICES["attention"]:
        return getattr(block, "attn", None), site.part
    if site.part.startswith("shared."):
        return shared_owner(block.mlp), site.part.removeprefix("shared.")
    if site.part == "router":
        return block.mlp, router_name(block.mlp)
    owner, prefix = dense_owner(block.mlp) or (None, "")
    return owner, prefix + site.part
