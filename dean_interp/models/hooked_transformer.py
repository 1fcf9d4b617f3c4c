"""The adapter of a `HookedTransformer` (TransformerLens 3.9), whose weights have an axis for the heads.

It has no hook point on what its MLP reads (`ln2.hook_normalized` comes before the norm's own weight), so there the
module's own input is taken.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dean_interp.models.adapters import DENSE, as_it_is, owner_of
from dean_interp.models.hooked_model import AsMatrix, HookedModel, OnProduct
from dean_interp.models.sites import MATRICES, Site
from dean_interp.models.turn_end import end_tokens


def _heads_write(stored: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "d_model _"]:
    """The matrix of all heads that read the residual stream."""
    return stored.transpose(0, 1).flatten(1)


def _heads_read(stored: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "_ d_model"]:
    """The matrix that reads what all heads mixed."""
    return stored.flatten(0, 1)


# For each matrix that has one: what lays its heads side by side, the argument of its module that it reads, the hook
# point that holds what it reads, and the hook point that holds what it writes.
_HEADS_SIDE_BY_SIDE: dict[str, AsMatrix] = {
    "q": _heads_write,
    "k": _heads_write,
    "v": _heads_write,
    "o": _heads_read,
}
_ARGUMENT = {"q": "query_input", "k": "key_input", "v": "value_input"}
_HOOK_BEFORE = {"out": "hook_post", "o": "hook_z"}
_HOOK_BEHIND = {"gate": "hook_pre", "q": "hook_q", "k": "hook_k", "v": "hook_v"}


@dataclass(frozen=True)
class HookedTransformerAdapter:
    """A `HookedTransformer`: TransformerLens' own modules."""

    model: HookedModel
    kind: ClassVar[str] = "HookedTransformer"
    wraps_checkpoint: ClassVar[bool] = False
    rows_may_branch: ClassVar[bool] = False
    rows_may_pad_left: ClassVar[bool] = False
    cache_needs_check: ClassVar[bool] = False
    keeps_cache: ClassVar[bool] = False

    def mlp_matrices(self, layer: int) -> tuple[Site, ...]:
        """By the parameters `W_gate` and `W_out`: a mixture has them in each of its experts."""
        mlp = self.model.blocks[layer].mlp
        if not hasattr(mlp, "W_out"):
            return ()
        parts = [part for part in DENSE if hasattr(mlp, f"W_{part}")]
        return tuple(Site(layer, part) for part in parts)

    @property
    def norms_are_folded(self) -> bool:
        """By the name of the norm that is left."""
        norm = getattr(self.model.cfg, "normalization_type", None) or ""
        return norm.endswith("Pre")

    @property
    def vocabulary_size(self) -> int:
        """The rows of `W_E`."""
        return self.model.W_E.shape[0]

    @property
    def unembedding_shape(self) -> tuple[int, int]:
        """That of `W_U`."""
        width, n_logits = self.model.W_U.shape
        return width, n_logits

    def parameter(self, site: Site) -> tuple[nn.Parameter, AsMatrix]:
        """In attention the heads are laid side by side."""
        owner, _ = owner_of(self.model, site)
        is_of_attention = site.part in MATRICES["attention"]
        name = f"W_{site.part.upper()}" if is_of_attention else f"W_{site.part}"
        # Grouped-query attention keeps its own few heads under `_W_K`, and repeats them in the property `W_K`.
        grouped = getattr(owner, f"_{name}", None)
        stored = getattr(owner, name) if grouped is None else grouped
        return stored, _HEADS_SIDE_BY_SIDE.get(site.part, as_it_is)

    def values(self, site: Site) -> Tensor:
        """The parameter itself: nothing is offloaded."""
        stored, _ = self.parameter(site)
        return stored

    def bias(self, site: Site) -> Float[Tensor, " d_out"] | None:
        """The parameter `b_in` or `b_out`."""
        owner, _ = owner_of(self.model, site)
        return getattr(owner, f"b_{site.part}", None)

    @contextmanager
    def on_product(self, site: Site, hook: OnProduct) -> Iterator[None]:
        """What a matrix reads is its module's input, or (`out`, `o`) the last hook point before it. What it writes is
        the hook point behind it, or the module's output. Heads are laid side by side on the way to `hook`, and back.
        """
        owner, _ = owner_of(self.model, site)
        argument = _ARGUMENT.get(site.part)
        point_before = _HOOK_BEFORE.get(site.part)
        read: list[Tensor] = []
        handles: list[torch.utils.hooks.RemovableHandle] = []

        def begin(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            read[:] = [_module_input(argument, args, named)]
            # Registered anew in each pass, so that it sees what every other hook made of what is read.
            if point_before:
                end()
                point = getattr(owner, point_before)
                handles.append(point.register_forward_hook(keep))

        def keep(module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
            read[0] = value

        def end() -> None:
            while handles:
                handles.pop().remove()

        def between(module: nn.Module, args: tuple[Tensor, ...], product: Tensor) -> Tensor:
            flat = product.flatten(2)
            changed = hook(read[0].flatten(2), flat)
            # Through `flat` in any case, since `hook` may watch its gradient.
            passed_on = flat if changed is None else changed
            return passed_on.reshape(product.shape)

        with ExitStack() as stack:
            before = owner.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(end)
            behind = _writer(owner, site.part).register_forward_hook(between)
            stack.callback(behind.remove)
            yield

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokenizer's end of text and the template's end of turn: no generation settings came with the weights."""
        return end_tokens(tokenizer)

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
        """By TransformerLens' own `generate`, in one call."""
        ends = self.end_tokens(tokenizer)
        output = self.model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_past_kv_cache=cached,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
            stop_at_eos=bool(ends),
            eos_token_id=ends,
        )
        return output, None


def _module_input(argument: str | None, args: tuple[Tensor, ...], named: dict[str, Any]) -> Tensor:
    """What a matrix's module reads, by the name of its argument where it has one."""
    if argument in named:
        return named[argument]
    return args[0] if args else named["query_input"]


def _writer(owner: Any, part: str) -> nn.Module:  # noqa: ANN401 - a module of TransformerLens
    """The module of a HookedTransformer whose output is what a matrix writes: a hook point, or the matrix's owner."""
    if part == "in":
        return owner.hook_pre_linear if hasattr(owner, "hook_pre_linear") else owner.hook_pre
    if part in _HOOK_BEHIND:
        return getattr(owner, _HOOK_BEHIND[part])
    return owner
