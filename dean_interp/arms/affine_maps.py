"""Affine maps of single neurons from unsafe answers to safe ones (Linear-AcT, arXiv 2410.23054, section 3).

The optimal map between two Gaussians of one neuron: `T(a) = m_safe + s_safe / s_unsafe (a - m_unsafe)`, followed to the
share that is the dose: `a + dose (T(a) - a)`. As in the paper, an answer counts with its mean over tokens, `m` and `s`
are mean and deviation over answers, and the map is applied to every token. Other than there: the sorted answers' least
squares are replaced by the deviations (the Gaussian case), all layers' maps come from one pass of the unchanged model,
and the place is `mlp.hook_post`. Of the two behaviours' displacements the mean is taken; it is an affine map again.

Where unsafe answers hardly vary (a deviation below a thousandth of the layer's root mean square deviation) the quotient
of deviations says nothing: there the slope is 1, and only the mean is moved. Of a routed expert's neuron an answer
counts with its mean over the tokens that are sent to the expert, and where there is none it does not count; the map is
applied to such tokens. Where fewer than five safe or five unsafe answers count, the slope is 1 as well: the quotient of
two answers' deviations can be anything. No other slope is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dean_interp.arms.answer_statistics import AnswerStatistics, answer_statistics
from dean_interp.arms.arm import BYTES_OF_NUMBER, ArmExamples, Kind, Setting, Settings
from dean_interp.arms.hooked_change import ActivationMap, hooked_state
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.neurons import as_routed
from dean_interp.models.sites import Site
from dean_interp.study.store import State

Layers = Literal["all", "first half", "second half", "middle half"]
SlopeAndShift = tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]
_STEADY = 1e-3
"""Unsafe answers whose deviation is below this share of the layer's are taken not to vary."""
_FEWEST_ANSWERS = 5
"""The deviation of fewer answers that reach an expert says nothing."""


@dataclass(frozen=True)
class AffineMaps:
    """A map of every neuron's activation in some layers, as the displacement `slope * a + shift`."""

    slopes: Mapping[Site, Float[Tensor, " d_mlp"]] = field(repr=False)
    """The map's slope minus 1."""
    shifts: Mapping[Site, Float[Tensor, " d_mlp"]] = field(repr=False)
    first_dose: float = 0.3
    largest_dose: float = 100.0
    """Far beyond the whole map, for maps that change little."""

    @property
    def n_bytes(self) -> int:
        """Two numbers are kept of each neuron, slope and shift."""
        n_neurons = sum(slope.numel() for slope in self.slopes.values())
        return 2 * BYTES_OF_NUMBER * n_neurons

    def at(self, dose: float) -> State:
        """The model with `dose` times each neuron's displacement."""
        maps, tensors = {}, {}
        for site, slope in self.slopes.items():
            shift = self.shifts[site]
            maps[site.hook_name] = _displaced(site, dose * slope, dose * shift)
            tensors[f"{site} slope"] = slope
            tensors[f"{site} shift"] = shift
        return hooked_state(maps, tensors, dose)


def _displaced(
    site: Site,
    slopes: Float[Tensor, " unit"],
    shifts: Float[Tensor, " unit"],
) -> ActivationMap:
    def displaced(model: HookedModel, activation: Tensor) -> Tensor:
        slope = slopes.to(activation)
        shift = shifts.to(activation)
        if site.is_of_experts:
            slope = as_routed(model, site, slope)
            shift = as_routed(model, site, shift)
        return activation + slope * activation + shift

    return displaced


@dataclass(frozen=True)
class LinearTransport:
    """Moving each neuron from its distribution over unsafe answers to that over safe ones."""

    name: str = "affine maps"
    kind: Kind = "activations"
    source: str = "arXiv 2410.23054, section 3 (Linear-AcT, Gaussian case)"
    uses_labels: bool = True

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """The layers whose neurons are mapped."""
        return {"layers": get_args(Layers)}

    def fit(self, examples: ArmExamples, settings: Settings) -> AffineMaps:
        """The mean of both behaviours' displacements. Raises `InputError` as `answer_statistics`, or for layers that
        have no such name.
        """
        first, second = answer_statistics(examples, "neurons")
        slopes, shifts = {}, {}
        for site in _chosen(neuron_sites(examples.model), settings["layers"]):
            first_slope, first_shift = displacement(first, site)
            second_slope, second_shift = displacement(second, site)
            slopes[site] = torch.stack([first_slope, second_slope]).mean(0).float()
            shifts[site] = torch.stack([first_shift, second_shift]).mean(0).float()
        return AffineMaps(slopes, shifts)


def displacement(statistics: AnswerStatistics, site: Site) -> SlopeAndShift:
    """Slope and shift of `T(a) - a` for one behaviour, float64."""
    means = statistics.of("mean", site.hook_name).double()
    if site.is_of_experts:
        return _displacement_of_experts(means, statistics.reached(site).double())
    mean_safe, mean_unsafe = means.mean(0)
    deviation = means.std(0, correction=0)
    deviation_safe, deviation_unsafe = deviation
    typical = deviation.square().mean().sqrt()
    varies = deviation_unsafe > _STEADY * typical
    ratio = _quotient(deviation_safe, deviation_unsafe, varies)
    return ratio - 1, mean_safe - ratio * mean_unsafe


def _displacement_of_experts(
    means: Float[Tensor, "row answer unit"],
    reached: Float[Tensor, "row answer expert"],
) -> SlopeAndShift:
    """The same, where an answer counts with its mean over the tokens that are sent to a neuron's expert.

    An answer without such a token does not count. Where no safe one or no unsafe one is left, nothing is moved.
    """
    n_neurons_of_expert = means.shape[2] // reached.shape[2]
    reached = reached.repeat_interleave(n_neurons_of_expert, dim=2)
    # The mean over all tokens, over the share of those that are sent to the expert, is the mean over these.
    counts = reached > 0
    means_of_routed = torch.where(counts, means / torch.where(counts, reached, 1.0), 0.0)
    # Mean and deviation over the answers that count.
    n_answers = counts.sum(0).clamp(min=1)
    mean = means_of_routed.sum(0) / n_answers
    distance = torch.where(counts, means_of_routed - mean, 0.0)
    deviation = (distance.square().sum(0) / n_answers).sqrt()
    mean_safe, mean_unsafe = mean
    deviation_safe, deviation_unsafe = deviation

    is_known = counts.any(0).all(0)
    typical = deviation[:, is_known].square().mean().sqrt() if bool(is_known.any()) else 0.0
    has_enough = (counts.sum(0) >= _FEWEST_ANSWERS).all(0)
    varies = has_enough & (deviation_unsafe > _STEADY * typical)
    ratio = _quotient(deviation_safe, deviation_unsafe, varies)
    shift = mean_safe - ratio * mean_unsafe
    return ratio - 1, torch.where(is_known, shift, 0.0)


def _quotient(
    safe: Float[Tensor, " unit"],
    unsafe: Float[Tensor, " unit"],
    varies: Bool[Tensor, " unit"],
) -> Float[Tensor, " unit"]:
    """The quotient of deviations; 1 where unsafe answers do not vary."""
    divisor = torch.where(varies, unsafe, 1.0)
    return torch.where(varies, safe / divisor, 1.0)


def _chosen(sites: Sequence[Site], layers: Setting) -> Sequence[Site]:
    """The sites of the layers; of an odd number of layers the middle one is in both halves."""
    numbers = sorted({site.layer for site in sites})
    n = len(numbers)
    quarter = n // 4
    parts = {
        "all": slice(0, n),
        "first half": slice(0, (n + 1) // 2),
        "second half": slice(n // 2, n),
        "middle half": slice(quarter, n - quarter),
    }
    if layers not in parts:
        raise InputError(f"layers must be one of {get_args(Layers)}, got {layers!r}")
    chosen = numbers[parts[str(layers)]]
    return [site for site in sites if site.layer in chosen]
