"""The matrices of an MLP: `gate` (where it is gated) and `in` read the residual stream, `out` reads the neurons.

Weights are shown as `(d_in, d_out)`, as TransformerLens does, however the checkpoint stores them. `on_products` puts a
function between what a matrix reads and what it writes: the place of the hook points `mlp.{part}.hook_in` and
`.hook_out` of a bridge. A `HookedTransformer` has no hook point on what its MLP reads (`ln2.hook_normalized` comes
before the norm's own weight), so there the MLP's own input is taken.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel, is_hooked_transformer
from dean_interp.models.sites import MATRICES, Site

OnProduct = Callable[[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_out"]], Tensor | None]


def weight_sites(model: HookedModel) -> list[Site]:
    """Every MLP matrix of the model: two or three a layer, in order.

    Raises `InputError` where the weights are not the checkpoint's own, or not those of separate matrices.
    """
    parts = [part for part in MATRICES if _has_part(model, part)]
    sites = [Site(layer, part) for layer in range(model.cfg.n_layers) for part in parts]
    _refuse_processed(model)
    for site in sites:
        parameter(model, site)
    return sites


def parameter(model: HookedModel, site: Site) -> tuple[nn.Parameter, bool]:
    """The parameter of a matrix, and whether it is stored as `(d_out, d_in)`: `nn.Linear` is, GPT-2's `Conv1D` not."""
    mlp = model.blocks[site.layer].mlp
    if is_hooked_transformer(model):
        return getattr(mlp, f"W_{site.part}"), False
    module = getattr(getattr(mlp, site.part, None), "original_component", None)
    stored = getattr(module, "weight", None)
    if not isinstance(stored, nn.Parameter):
        raise InputError(f"{model.cfg.model_name} keeps no separate matrix '{site.part}' in layer {site.layer}'s MLP")
    return stored, not isinstance(module, Conv1D)


def weight(model: HookedModel, site: Site) -> Float[Tensor, "d_in d_out"]:
    """A matrix as `(d_in, d_out)`: a view of the parameter. Row `i` of `out` is what neuron `i` writes."""
    stored, transposed = parameter(model, site)
    return stored.T if transposed else stored


@contextmanager
def on_products(model: HookedModel, hooks: Mapping[Site, OnProduct]) -> Iterator[None]:
    """While open, every pass calls `hooks[site](x, product)` with what the matrix reads and writes.

    `x` is what the matrix really reads, after every other hook on it. A tensor that is returned takes the product's
    place. The product includes the matrix's bias where there is one.
    """
    install = _on_hooked_transformer if is_hooked_transformer(model) else _on_bridge
    with ExitStack() as stack:
        for site, hook in hooks.items():
            install(stack, model.blocks[site.layer].mlp, site.part, hook)
        yield


def _on_bridge(stack: ExitStack, mlp: Any, part: str, hook: OnProduct) -> None:  # noqa: ANN401 - TransformerLens' own
    module = getattr(mlp, part).original_component
    stack.callback(module.register_forward_hook(lambda module, args, product: hook(args[0], product)).remove)


def _on_hooked_transformer(stack: ExitStack, mlp: Any, part: str, hook: OnProduct) -> None:  # noqa: ANN401
    """`gate` and `in`: the MLP's input, and the hook point behind the product. `out`: `hook_post`, the MLP's output."""
    read: list[Tensor] = []
    last: list[torch.utils.hooks.RemovableHandle] = []

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[:] = [args[0]]
        if part == "out":  # registered anew in each pass, so that it sees what every other hook made of the neurons
            end()
            last.append(mlp.hook_post.register_forward_hook(lambda module, args, post: read.__setitem__(0, post)))

    def end() -> None:
        while last:
            last.pop().remove()

    stack.callback(mlp.register_forward_pre_hook(begin).remove)
    stack.callback(end)
    behind = {"gate": "hook_pre", "in": "hook_pre_linear" if hasattr(mlp, "hook_pre_linear") else "hook_pre"}
    point = getattr(mlp, behind[part]) if part in behind else mlp
    stack.callback(point.register_forward_hook(lambda module, args, product: hook(read[0], product)).remove)


def _has_part(model: HookedModel, part: str) -> bool:
    mlp = model.blocks[0].mlp
    return hasattr(mlp, f"W_{part}" if is_hooked_transformer(model) else part)


def _refuse_processed(model: HookedModel) -> None:
    """Folding a norm rescales what `gate` and `in` hold, centring shifts `out`: such weights are another model's."""
    folded = (getattr(model.cfg, "normalization_type", None) or "").endswith("Pre") and is_hooked_transformer(model)
    folded = folded or any(getattr(block.mlp, "_use_processed_weights", False) for block in model.blocks)
    if folded or all(_is_centred(weight(model, Site(i, "out"))) for i in range(model.cfg.n_layers)):
        raise InputError(
            f"the weights of this {model.cfg.model_name} were processed ({'LayerNorm folded' if folded else 'centred'})"
            ": their scores are not those of the checkpoint's weights. Load it raw (load_model, or "
            "from_pretrained_no_processing), or score neurons, which processing leaves as they are"
        )


def _is_centred(out: Float[Tensor, "d_mlp d_model"]) -> bool:
    return bool(out.float().mean(1).abs().max() < 1e-5 * out.float().std())
