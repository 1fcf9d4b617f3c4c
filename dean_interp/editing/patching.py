"""Activation patching: activations of one run are put into another run.

**Denoising** runs the corrupted input with activations of the clean run: what brings the clean behaviour back is
sufficient for it. **Noising** runs the clean input with activations of the corrupted run: what breaks the behaviour is
necessary. The two need not agree (arXiv 2404.15255).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.editing.ablation import refuse_foreign
from dean_interp.editing.reusable import reusable
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.selection.selection import Selection

Tokens = Int[Tensor, "batch pos"]
ActivationSource = Tokens | Any
"""Tokens, which are run first, or a cache: hook names to activations, as `run_with_cache` gives (or a dict)."""


@torch.inference_mode()
def neuron_cache(
    model: HookedModel, selection: Selection, tokens: Tokens
) -> dict[str, Float[Tensor, "batch pos d_mlp"]]:
    """The activations at a selection's sites in one run over `tokens`: a source for `patch_activations`."""
    return _run(model, _neuron_sites(model, selection), tokens)[1]


@reusable
@contextmanager
def patch_activations(
    model: HookedModel,
    selection: Selection,
    *,
    source: ActivationSource,
    positions: Sequence[int] | None = None,
    source_positions: Sequence[int] | None = None,
) -> Iterator[None]:
    """While open, the selected neurons have the activations that they have in `source`.

    Args:
        selection: neurons of this model.
        source: tokens, or a cache of a run over as many rows.
        positions: positions of the run that are patched, negative ones from its end. None: all positions.
        source_positions: the position of the source for each of `positions`. None: the same positions.

    Raises:
        InputError: weights; a cache without a site; a source of another shape; positions out of range.
    """
    sites = _neuron_sites(model, selection)
    cache = neuron_cache(model, selection, source) if isinstance(source, Tensor) else source
    missing = [site.hook_name for site in sites if site.hook_name not in cache]
    if missing:
        raise InputError(f"the source has no {missing[0]}: it needs the {len(sites)} sites of the selection")
    if source_positions is not None and len(source_positions) != len(positions or ()):
        raise InputError(
            f"source_positions must name one position for each of positions, got {len(source_positions)} "
            f"for {len(positions or ())}"
        )

    if source_positions is None:
        source_positions = positions
    hooks = []
    for site in sites:
        patcher = _patcher(selection.units[site], cache[site.hook_name].detach(), positions, source_positions)
        hooks.append((site.hook_name, patcher))
    with model.hooks(fwd_hooks=hooks):
        yield


def _patcher(
    units: Tensor,
    source: Float[Tensor, "row source_pos d_mlp"],
    positions: Sequence[int] | None,
    source_positions: Sequence[int] | None,
) -> Callable[..., Tensor]:
    """A hook that puts some neurons' activations of the source, at its positions, in the place of the run's."""

    def patch(activation: Tensor, hook: object) -> Tensor:
        to = _indices(positions, activation.shape[1], "the run")
        taken = _indices(source_positions, source.shape[1], "the source")
        if len(source) != len(activation) or len(to) != len(taken):
            raise InputError(
                f"the source is {tuple(source.shape[:2])} (rows, positions) and the run "
                f"{tuple(activation.shape[:2])}: patch runs of one shape, or name positions"
            )
        patched = activation.clone()
        rows, columns = torch.meshgrid(to, units, indexing="ij")
        patched[:, rows, columns] = source[:, taken][:, :, units].to(activation)
        return patched

    return patch


@dataclass(frozen=True)
class Patching:
    """A metric on the clean and the corrupted run, and on each with the other's activations."""

    clean: float
    corrupted: float
    denoised: float
    """The corrupted run with clean activations."""
    noised: float
    """The clean run with corrupted activations."""

    @property
    def sufficient(self) -> float:
        """Share of the difference that denoising brings back: 0 nothing, 1 all."""
        return (self.denoised - self.corrupted) / (self.clean - self.corrupted)

    @property
    def necessary(self) -> float:
        """Share of the difference that noising takes away: 0 nothing, 1 all."""
        return (self.clean - self.noised) / (self.clean - self.corrupted)


@own_torch_settings()
@torch.inference_mode()
def patching(
    model: HookedModel,
    selection: Selection,
    *,
    clean: Tokens,
    corrupted: Tokens,
    metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
    positions: Sequence[int] | None = None,
) -> Patching:
    """Denoising and noising of a selection between two runs of one shape, e.g. a safe and an unsafe answer to a prompt.

    Args:
        metric: from logits to one number, e.g. the difference of two tokens' logits at the last position.

    Raises:
        InputError: runs of two shapes without `positions`, or a metric that is the same on both.
    """
    sites = _neuron_sites(model, selection)
    clean_logits, clean_cache = _run(model, sites, clean)
    corrupted_logits, corrupted_cache = _run(model, sites, corrupted)
    # Without a difference between the runs the shares that patching brings back are not defined.
    clean_metric, corrupted_metric = float(metric(clean_logits)), float(metric(corrupted_logits))
    if clean_metric == corrupted_metric:
        raise InputError(f"the metric is {clean_metric} on both runs: there is no difference to patch")

    def patched(run: Tokens, source: ActivationSource) -> float:
        with patch_activations(model, selection, source=source, positions=positions):
            return float(metric(model(run, return_type="logits")))

    return Patching(
        clean=clean_metric,
        corrupted=corrupted_metric,
        denoised=patched(corrupted, clean_cache),
        noised=patched(clean, corrupted_cache),
    )


def _run(
    model: HookedModel, sites: Sequence[Site], tokens: Tokens
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Float[Tensor, "batch pos d_mlp"]]]:
    """The logits of one run, and the activations at the sites."""
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(activation: Tensor, hook: object) -> None:
            activations[name] = activation.detach().clone()

        return hook

    with model.hooks(fwd_hooks=[(site.hook_name, keep(site.hook_name)) for site in sites]):
        return model(tokens, return_type="logits"), activations


def _neuron_sites(model: HookedModel, selection: Selection) -> list[Site]:
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to patch")
    refuse_foreign(model, selection)
    sites = [site for site, n in selection.counts().items() if n]
    if any(site.unit == "weight" for site in sites):
        raise InputError("weights have no activation to patch: select neurons")
    return sites


def _indices(positions: Sequence[int] | None, n_pos: int, whose: str) -> Int[Tensor, " position"]:
    """Positions counted from the start of `whose` run of `n_pos`; all where none are named."""
    if positions is None:
        return torch.arange(n_pos)
    outside = [position for position in positions if not -n_pos <= position < n_pos]
    if outside:
        raise InputError(f"position {outside[0]} is not in {whose}, which has {n_pos}")
    return torch.tensor([position % n_pos for position in positions])
