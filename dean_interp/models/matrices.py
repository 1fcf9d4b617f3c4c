"""The matrices of a block. In the MLP `gate` (where it is gated) and `in` read the residual stream, `out` reads the
neurons; in attention `q`, `k` and `v` read the residual stream, `o` what the heads mixed.

Weights are shown as `(d_in, d_out)`, as TransformerLens does for MLPs, however the checkpoint stores them; heads lie
side by side, and grouped-query `k` and `v` have their own few. `on_products` puts a function between what a matrix
reads and what it writes: the place of a bridge's hook points `hook_in` and `hook_out`.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.experts import routed_experts
from dean_interp.models.hooked_model import AsMatrix, HookedModel, OnProduct
from dean_interp.models.plain import parts_of_joint_tensors
from dean_interp.models.sites import MATRICES, Modules, Site


def weight_sites(model: HookedModel, modules: Modules = "mlp") -> list[Site]:
    """Every matrix of the model's MLPs, of attention, of both, or of its routers, in order of layers.

    A layer that mixes tokens in another way (a short convolution, a state space) has no matrix of attention.

    Raises `InputError` where the weights are not the checkpoint's own, or not those of separate matrices, and where a
    router was asked for and there is none.
    """
    if modules not in MATRICES:
        raise InputError(f"modules must be one of {tuple(MATRICES)}, got {modules!r}")
    sites = []
    for layer in range(len(model.blocks)):
        of_mlp = adapter_of(model).mlp_matrices(layer)
        if modules in ("mlp", "all"):
            sites += of_mlp
        if modules in ("attention", "all") and hasattr(model.blocks[layer], "attn"):
            sites += [Site(layer, part) for part in MATRICES["attention"]]
        if modules == "router" and any(site.is_of_experts for site in of_mlp):
            sites.append(Site(layer, "router"))
    if not sites:
        raise InputError(f"{model.cfg.model_name} sends no tokens to experts: it has no router")
    _refuse_processed(model)
    for site in sites:
        parameter(model, site)
    return sites


def neuron_sites(model: HookedModel) -> list[Site]:
    """The sites of neurons, in order: one a layer, or in a mixture those of routed and of shared experts."""
    sites = []
    for layer in range(len(model.blocks)):
        matrices = adapter_of(model).mlp_matrices(layer)
        sites += [matrix.neurons for matrix in matrices if matrix == matrix.neurons.out]
    return sites


def parameter(model: HookedModel, site: Site) -> tuple[nn.Parameter, AsMatrix]:
    """The parameter of a matrix, and what makes `(d_in, d_out)` of it or of its gradient (a view wherever it can)."""
    return adapter_of(model).parameter(site)


def weight(model: HookedModel, site: Site) -> Float[Tensor, "d_in d_out"]:
    """A matrix as `(d_in, d_out)`: a view of the parameter wherever it can be, a copy on the CPU where it is offloaded
    (`models.offload`). Row `i` of MLP `out` is what neuron `i` writes.
    """
    stored, as_matrix = parameter(model, site)
    values = adapter_of(model).values(site) if stored.is_meta else stored
    return as_matrix(values)


def shape(model: HookedModel, site: Site) -> tuple[int, int]:
    """`(d_in, d_out)` of a matrix, without its values."""
    stored, as_matrix = parameter(model, site)
    # On `meta` nothing is copied, whatever makes the matrix.
    without_values = stored.detach().to("meta")
    n_in, n_out = as_matrix(without_values).shape
    return n_in, n_out


def home(model: HookedModel, site: Site) -> torch.device:
    """Where as much as a matrix holds can be kept: the device that it lies on, or the CPU where it is offloaded."""
    stored, _ = parameter(model, site)
    return torch.device("cpu") if stored.is_meta else stored.device


def stored_name(model: HookedModel, site: Site) -> tuple[str, bool]:
    """What the checkpoint inside a model calls a matrix, and whether it stores the transpose of `(d_in, d_out)`.

    Of experts: what it calls their stack, and how the matrix of each expert lies in it.

    Raises `InputError` where the checkpoint keeps it in one tensor with others, and the bridge computes with a part.
    """
    stored, as_matrix = parameter(model, site)
    parts = parts_of_joint_tensors(model.original_model)
    if any(part.weight is stored for part in parts):
        raise InputError(
            f"the checkpoint of {model.cfg.model_name} keeps '{site.part}' of layer {site.layer} in one tensor with "
            "other matrices, into which no edit is written: ablate it by hooks, or edit neurons"
        )
    name = stored_names(model)[id(stored)]
    experts = routed_experts(model, site.layer) if site.is_of_experts else None
    if experts is None:
        return name, as_matrix is torch.t
    # A stack whose matrices are `(d_in, d_out)` is what `transformers` calls transposed.
    return name, not experts.module.is_transposed


def stored_names(model: HookedModel) -> dict[int, str]:
    """The checkpoint's name of every parameter, by the parameter's `id`. Tied parameters have one name.

    Only for models that wrap a checkpoint (`Adapter.wraps_checkpoint`).
    """
    names = {}
    for name, stored in model.original_model.named_parameters():
        names[id(stored)] = name.replace("_original_component.", "")
    return names


def bias(model: HookedModel, site: Site) -> Float[Tensor, " d_out"] | None:
    """What is added to an MLP matrix's product, or None. The parameter itself, so writing to it writes to the model."""
    return adapter_of(model).bias(site)


@contextmanager
def on_products(model: HookedModel, hooks: Mapping[Site, OnProduct]) -> Iterator[None]:
    """While open, every pass calls `hooks[site](x, product)` with what the matrix reads and writes.

    `x` is what the matrix really reads, after every other hook on it. A tensor that is returned takes the product's
    place. The product includes the matrix's bias where there is one.
    """
    adapter = adapter_of(model)
    with ExitStack() as stack:
        for site, hook in hooks.items():
            stack.enter_context(adapter.on_product(site, hook))
        yield


def _refuse_processed(model: HookedModel) -> None:
    """Raise `InputError` where the weights were processed: such weights are another model's.

    Folding a norm rescales what `gate` and `in` hold, centring shifts `out`.
    """
    is_folded = adapter_of(model).norms_are_folded
    outs = (weight(model, site.out) for site in neuron_sites(model))
    if is_folded or all(map(_is_centred, outs)):
        processing = "LayerNorm folded" if is_folded else "centred"
        raise InputError(
            f"the weights of this {model.cfg.model_name} were processed ({processing}): their scores are not those of "
            "the checkpoint's weights. Load it raw (load_model, or from_pretrained_no_processing), or score neurons, "
            "which processing leaves as they are"
        )


def _is_centred(out: Float[Tensor, "d_mlp d_model"]) -> bool:
    """Whether every neuron writes 0 on average."""
    if out.is_meta:
        return False
    out = out.float()
    largest_mean = out.mean(1).abs().max()
    return bool(largest_mean < 1e-5 * out.std())
