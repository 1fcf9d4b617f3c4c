"""The matrices of a block. In the MLP `gate` (where it is gated) and `in` read the residual stream, `out` reads the
neurons; in attention `q`, `k` and `v` read the residual stream, `o` what the heads mixed.

Weights are shown as `(d_in, d_out)`, as TransformerLens does for MLPs, however the checkpoint stores them; heads lie
side by side, and grouped-query `k` and `v` have their own few. `on_products` puts a function between what a matrix
reads and what it writes: the place of a bridge's hook points `hook_in` and `hook_out`. A `HookedTransformer` has no
hook point on what its MLP reads (`ln2.hook_normalized` comes before the norm's own weight), so there the module's own
input is taken.
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
from dean_interp.models.offload import values
from dean_interp.models.sites import MATRICES, Modules, Site

OnProduct = Callable[[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_out"]], Tensor | None]


def weight_sites(model: HookedModel, modules: Modules = "mlp") -> list[Site]:
    """Every matrix of the model's MLPs, attention, or both, in order of layers.

    Raises `InputError` where the weights are not the checkpoint's own, or not those of separate matrices.
    """
    if modules not in MATRICES:
        raise InputError(f"modules must be one of {tuple(MATRICES)}, got {modules!r}")
    parts = [part for part in MATRICES[modules] if part != "gate" or _is_gated(model)]
    sites = [Site(layer, part) for layer in range(model.cfg.n_layers) for part in parts]
    _refuse_processed(model)
    for site in sites:
        parameter(model, site)
    return sites


def parameter(model: HookedModel, site: Site) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
    """The parameter of a matrix, and what makes `(d_in, d_out)` of it or of its gradient (a view wherever it can)."""
    owner = _owner(model, site)
    if is_hooked_transformer(model):
        name = f"W_{site.part.upper()}" if site.part in MATRICES["attention"] else f"W_{site.part}"
        stored = getattr(owner, f"_{name}", None)  # grouped-query: the property repeats the heads
        return (getattr(owner, name) if stored is None else stored), _HEADS.get(site.part, _as_it_is)
    module = getattr(getattr(owner, site.part, None), "original_component", None)
    stored = getattr(module, "weight", None)
    if not isinstance(stored, nn.Parameter):
        where = f"layer {site.layer}'s {'MLP' if site.part in MATRICES['mlp'] else 'attention'}"
        raise InputError(f"{model.cfg.model_name} keeps no separate matrix '{site.part}' in {where}")
    return stored, _as_it_is if isinstance(module, Conv1D) else torch.t  # `nn.Linear` stores (d_out, d_in)


def weight(model: HookedModel, site: Site) -> Float[Tensor, "d_in d_out"]:
    """A matrix as `(d_in, d_out)`: a view of the parameter wherever it can be, a copy on the CPU where that is away
    (`models.offload`). Row `i` of MLP `out` is what neuron `i` writes.
    """
    stored, as_matrix = parameter(model, site)
    if stored.is_meta and (held := values(getattr(_owner(model, site), site.part).original_component)) is not stored:
        stored = held.cpu()
    return as_matrix(stored)


def shape(model: HookedModel, site: Site) -> tuple[int, int]:
    """`(d_in, d_out)` of a matrix, without its values."""
    stored, as_matrix = parameter(model, site)
    n_in, n_out = as_matrix(stored).shape
    return n_in, n_out


def home(model: HookedModel, site: Site) -> torch.device:
    """Where a matrix lies, and where as much as it holds can be kept: its device, or the CPU where it is away."""
    stored, _ = parameter(model, site)
    return torch.device("cpu") if stored.is_meta else stored.device


def stored_name(model: HookedModel, site: Site) -> tuple[str, bool]:
    """What a bridge's checkpoint calls a matrix, and whether it stores the transpose of `(d_in, d_out)`."""
    stored, as_matrix = parameter(model, site)
    return stored_names(model)[id(stored)], as_matrix is not _as_it_is


def stored_names(model: HookedModel) -> dict[int, str]:
    """The checkpoint's name of every parameter of a bridge, by the parameter's `id`. Tied parameters have one name."""
    return {id(one): name.replace("_original_component.", "") for name, one in model.original_model.named_parameters()}


def bias(model: HookedModel, site: Site) -> Float[Tensor, " d_out"] | None:
    """What is added to an MLP matrix's product, or None. The parameter itself, so writing to it writes to the model."""
    owner = _owner(model, site)
    if is_hooked_transformer(model):
        return getattr(owner, f"b_{site.part}", None)
    return getattr(getattr(owner, site.part).original_component, "bias", None)


@contextmanager
def on_products(model: HookedModel, hooks: Mapping[Site, OnProduct]) -> Iterator[None]:
    """While open, every pass calls `hooks[site](x, product)` with what the matrix reads and writes.

    `x` is what the matrix really reads, after every other hook on it. A tensor that is returned takes the product's
    place. The product includes the matrix's bias where there is one.
    """
    install = _on_hooked_transformer if is_hooked_transformer(model) else _on_bridge
    with ExitStack() as stack:
        for site, hook in hooks.items():
            install(stack, _owner(model, site), site.part, hook)
        yield


def _on_bridge(stack: ExitStack, owner: Any, part: str, hook: OnProduct) -> None:  # noqa: ANN401 - TransformerLens' own
    module = getattr(owner, part).original_component
    stack.callback(module.register_forward_hook(lambda module, args, product: hook(args[0], product)).remove)


def _on_hooked_transformer(stack: ExitStack, owner: Any, part: str, hook: OnProduct) -> None:  # noqa: ANN401
    """What a matrix reads is its module's input, or (`out`, `o`) the last hook point before it; what it writes is the
    hook point behind it, or the module's output. Heads are laid side by side on the way to `hook`, and back.
    """
    read: list[Tensor] = []
    last: list[torch.utils.hooks.RemovableHandle] = []
    before = {"out": "hook_post", "o": "hook_z"}.get(part)
    gated = hasattr(owner, "hook_pre_linear")
    behind = {"gate": "hook_pre", "in": "hook_pre_linear" if gated else "hook_pre",
              "q": "hook_q", "k": "hook_k", "v": "hook_v"}.get(part)  # fmt: skip
    argument = {"q": "query_input", "k": "key_input", "v": "value_input"}.get(part)

    def begin(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        read[:] = [named[argument] if argument in named else args[0] if args else named["query_input"]]
        if before:  # registered anew in each pass, so that it sees what every other hook made of what is read
            end()
            point = getattr(owner, before)
            last.append(point.register_forward_hook(lambda module, args, value: read.__setitem__(0, value)))

    def end() -> None:
        while last:
            last.pop().remove()

    def between(module: nn.Module, args: tuple[Tensor, ...], product: Tensor) -> Tensor:
        flat = product.flatten(2)
        changed = hook(read[0].flatten(2), flat)
        return (flat if changed is None else changed).reshape(product.shape)  # through `flat`, which a hook may watch

    stack.callback(owner.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(end)
    stack.callback((getattr(owner, behind) if behind else owner).register_forward_hook(between).remove)


def _owner(model: HookedModel, site: Site) -> Any:  # noqa: ANN401
    block = model.blocks[site.layer]
    return block.attn if site.part in MATRICES["attention"] else block.mlp


def _is_gated(model: HookedModel) -> bool:
    return hasattr(model.blocks[0].mlp, "W_gate" if is_hooked_transformer(model) else "gate")


def _as_it_is(stored: Tensor) -> Tensor:
    return stored


def _heads_write(stored: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "d_model _"]:
    return stored.transpose(0, 1).flatten(1)


def _heads_read(stored: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "_ d_model"]:
    return stored.flatten(0, 1)


_HEADS = {"q": _heads_write, "k": _heads_write, "v": _heads_write, "o": _heads_read}


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
    return not out.is_meta and bool(out.float().mean(1).abs().max() < 1e-5 * out.float().std())
