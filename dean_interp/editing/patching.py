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
from dean_interp.models.neurons import read_neurons, with_neurons
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.selection.selection import Selection

Tokens = Int[Tensor, "batch pos"]
ActivationSource = Tokens | Any
"""Tokens, which are run first, or a cache: hook names to activations, as `run_with_cache` gives (or a dict)."""


@torch.inference_mode()
def neuron_cache(model: HookedModel, selection: Selection, tokens: Tokens) -> dict[str, Tensor]:
    """The activations at a selection's sites in one run over `tokens`: a source for `patch_activations`.

    Of routed experts it holds which of them the tokens were sent to as well, as `run_with_cache` does.
    """
    sites = _neuron_sites(model, selection)
    _, cache = _run(model, sites, tokens)
    return cache


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
        InputError: weights; a cache without a site; a source of another shape; no positions, or some out of range.
    """
    sites = _neuron_sites(model, selection)
    cache = neuron_cache(model, selection, source) if isinstance(source, Tensor) else source
    missing = [name for name in _hook_names(sites) if name not in cache]
    if missing:
        raise InputError(f"the source has no {missing[0]}: it needs the {len(sites)} sites of the selection")
    if positions is not None and not len(positions):
        raise InputError("positions are empty: there is nothing to patch")
    n_positions = 0 if positions is None else len(positions)
    if source_positions is not None and len(source_positions) != n_positions:
        raise InputError(
            f"source_positions must name one position for each of positions, got {len(source_positions)} for "
            f"{n_positions}"
        )

    if source_positions is None:
        source_positions = positions
    hooks = []
    for site in sites:
        units = selection.units[site]
        values = _in_cache(model, site, units, cache)
        hook = _patcher(
            model,
            site,
            units,
            source=values,
            positions=positions,
            source_positions=source_positions,
        )
        hooks.append((site.hook_name, hook))
    with model.hooks(fwd_hooks=hooks):
        yield


def _in_cache(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
    cache: Any,  # noqa: ANN401 - hook names to activations
) -> Float[Tensor, "row pos unit"]:
    """The activations of some neurons in a cache."""
    # A neuron of an expert is read where the tokens of the source were sent to that expert.
    ids = cache[site.ids_hook_name] if site.is_of_experts else None
    activation = cache[site.hook_name].detach()
    return read_neurons(model, site, activation, units, ids=ids)


def _patcher(
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
    *,
    source: Float[Tensor, "row source_pos unit"],
    positions: Sequence[int] | None,
    source_positions: Sequence[int] | None,
) -> Callable[..., Tensor]:
    """A hook that puts some neurons' activations of the source, at its positions, in the place of the run's."""

    def patch(activation: Tensor, hook: object) -> Tensor:
        old = read_neurons(model, site, activation, units)
        # Some models join row and position in one axis (OPT, and the shared experts of Qwen2's mixtures).
        if old.dim() == 2:
            old = old.reshape(len(source), -1, len(units))
        places = _indices(positions, old.shape[1], "the run")
        source_places = _indices(source_positions, source.shape[1], "the source")
        if len(source) != len(old) or len(places) != len(source_places):
            raise InputError(
                f"the source is {tuple(source.shape[:2])} (rows, positions) and the run "
                f"{tuple(old.shape[:2])}: patch runs of one shape, or name positions"
            )
        new = old.clone()
        new[:, places] = source[:, source_places].to(new)
        if not site.is_of_experts:
            new = new.reshape(*activation.shape[:-1], len(units))
        return with_neurons(model, site, activation, units, new)

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
        model: the model that runs.
        selection: the neurons that are patched.
        clean: tokens of the run that shows the behaviour.
        corrupted: tokens of the run that does not.
        metric: from logits to one number, e.g. the difference of two tokens' logits at the last position.
        positions: positions that are patched, as in `patch_activations`. None: all positions.

    Raises:
        InputError: runs of two shapes without `positions`, or a metric that is the same on both.
    """
    sites = _neuron_sites(model, selection)
    clean_logits, clean_cache = _run(model, sites, clean)
    corrupted_logits, corrupted_cache = _run(model, sites, corrupted)
    clean_metric = float(metric(clean_logits))
    corrupted_metric = float(metric(corrupted_logits))
    # Without a difference between the runs the shares that patching brings back are not defined.
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
    model: HookedModel,
    sites: Sequence[Site],
    tokens: Tokens,
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
    """The logits of one run, and the activations at the sites."""
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(activation: Tensor, hook: object) -> None:
            # Some models join row and position in one axis.
            if activation.dim() == 2:
                activation = activation.unflatten(0, tuple(tokens.shape))
            activations[name] = activation.detach().clone()

        return hook

    hooks = [(name, keep(name)) for name in _hook_names(sites)]
    with model.hooks(fwd_hooks=hooks):
        logits = model(tokens, return_type="logits")
    return logits, activations


def _hook_names(sites: Sequence[Site]) -> list[str]:
    names = [site.hook_name for site in sites]
    ids_names = [site.ids_hook_name for site in sites if site.is_of_experts]
    return names + ids_names


def _neuron_sites(model: HookedModel, selection: Selection) -> list[Site]:
    if not len(selection):
        raise InputError("the selection is empty: there is nothing to patch")
    refuse_foreign(model, selection)
    sites = [site for site, n in selection.counts().items() if n]
    if any(site.unit == "weight" for site in sites):
        raise InputError("weights have no activation to patch: select neurons")
    return sites


def _indices(
    positions: Sequence[int] | None,
    n_pos: int,
    whose: str,
) -> Int[Tensor, " position"]:
    """Positions counted from the start of `whose` run of `n_pos`; all where none are named."""
    if positions is None:
        return torch.arange(n_pos)
    outside = [position for position in positions if not -n_pos <= position < n_pos]
    if outside:
        raise InputError(f"position {outside[0]} is not in {whose}, which has {n_pos}")
    return torch.tensor([position % n_pos for position in positions])
