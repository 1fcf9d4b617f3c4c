"""What takes the place of a silenced unit: zero, its mean, noise, another example's value, or another model's.

All values are fixed before the first pass. No value depends on the other rows of a batch, so an ablated model gives a
text the same logits whatever else is in the batch.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import batched
from dean_interp.models.matrices import neuron_sites, shape
from dean_interp.models.neurons import read_neurons
from dean_interp.models.own_matrices import entries
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Site
from dean_interp.models.sizes import site_shape
from dean_interp.scoring.capture import stream_activations
from dean_interp.scoring.preparation import ScoringConfig, batch_tokens_of, prepare
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gates import Gates

ActivationChange = Callable[[Float[Tensor, "batch pos unit"], Int[Tensor, "batch pos"]], Tensor]
"""Gives new activations of the chosen neurons from their activations and each position's place in its text."""


@dataclass(frozen=True)
class Zero:
    """Zero: a neuron writes nothing, a weight is zero."""


@dataclass(frozen=True)
class Mean:
    """A neuron's mean activation over the examples of some scores."""

    scores: Scores


@dataclass(frozen=True)
class Scale:
    """`alpha` times the neuron's activation, or the weight: 0 silences, 1 changes nothing, 2 doubles."""

    alpha: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise InputError(f"alpha must be a finite number, got {self.alpha}")


@dataclass(frozen=True)
class Multiply:
    """Each neuron's activation times its own gate (`selection.gates`). Nested gates multiply."""

    gates: Gates


@dataclass(frozen=True)
class Noise:
    """The neuron's activation plus Gaussian noise of `scale` times its root mean square over the scores' examples.

    The noise of a neuron at a place in a text is drawn once (causal tracing, arXiv 2202.05262, adds 3 deviations).
    """

    scores: Scores
    scale: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class Resample:
    """The neurons' activations at a random position of other texts (resample ablation).

    They are whole rows of an `activation_bank`, so all neurons of all layers get values that occurred together.
    """

    bank: Mapping[Site, Float[Tensor, "row d_mlp"]]
    seed: int = 0


@dataclass(frozen=True)
class Project:
    """The neurons without their part along a direction (directional ablation, arXiv 2406.11717)."""

    directions: Mapping[Site, Float[Tensor, " d_mlp"]]


@dataclass(frozen=True)
class Restore:
    """The weights' values in another checkpoint, of which this model is a fine-tuned copy.

    A neuron is restored with the weights that make it: its columns of `gate` and `in`, its row of `out`.
    """

    other: HookedModel = field(repr=False)


@dataclass(frozen=True)
class Given:
    """Weights with these values, one for each that is selected, in order: what an edit would write."""

    weights: Mapping[Site, Float[Tensor, " unit"]]


Value = Zero | Mean | Scale | Multiply | Noise | Resample | Project | Restore | Given

# Noise is drawn for this many positions of a text; later positions use the draws again from the first.
_N_NOISE_DRAWS = 512


def activation_change(value: Value, site: Site, units: Int[Tensor, " unit"]) -> ActivationChange:
    """What a value does to the chosen neurons of a site. Raises `InputError` where it has nothing for the site."""
    match value:
        case Zero():
            return lambda activation, position: torch.zeros_like(activation)
        case Scale(alpha):
            return lambda activation, position: alpha * activation
        case Multiply(gates):
            multipliers = at_site(gates.multipliers, site, "the gates")[units]
            return lambda activation, position: multipliers.to(activation) * activation
        case Mean(scores):
            means = at_site(scores.activation_mean, site, f"the scores of {scores.behaviour}")
            return _mean_change(means[units])
        case Noise():
            return _noise_change(value, site, units)
        case Resample(bank, seed):
            rows = at_site(bank, site, "the bank")
            return _resampling_change(rows[:, units], seed)
        case Project() if site.is_of_experts:
            raise InputError(f"a projection needs all neurons of {site} at once, and a token has those of some experts")
        case Project(directions):
            direction = at_site(directions, site, "the directions")
            return _projection_change(direction.float()[units])
        case Restore() | Given():
            raise InputError(f"{type(value).__name__} gives weights: select weights, or see `weights_that_make`")


def multipliers_of(
    value: Value,
    site: Site,
    units: Int[Tensor, " unit"],
) -> Float[Tensor, " unit"] | None:
    """What a value multiplies the chosen neurons by; None where it does more than multiply."""
    match value:
        case Zero():
            return torch.zeros(len(units))
        case Scale(alpha):
            return torch.full((len(units),), float(alpha))
        case Multiply(gates):
            return at_site(gates.multipliers, site, "the gates")[units]
    return None


def _mean_change(means: Float[Tensor, " unit"]) -> ActivationChange:
    return lambda activation, position: means.to(activation).expand_as(activation)


def _noise_change(value: Noise, site: Site, units: Int[Tensor, " unit"]) -> ActivationChange:
    norm = at_site(value.scores.activation_norm, site, f"the scores of {value.scores.behaviour}")
    # Noise is drawn for all neurons of the site, so a neuron's noise does not depend on the others that are chosen.
    generator = torch.Generator().manual_seed(value.seed * 100_003 + site.layer)
    draws = torch.randn(_N_NOISE_DRAWS, len(norm), generator=generator)
    noise = draws * (value.scale * norm)
    noise = noise[:, units]
    return lambda activation, position: activation + noise.to(activation)[position % _N_NOISE_DRAWS]


def _resampling_change(rows: Float[Tensor, "row unit"], seed: int) -> ActivationChange:
    # The order is the same for every site: a position of a text gets one row of the whole model.
    n_rows = len(rows)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    rows = rows[order]
    return lambda activation, position: rows.to(activation)[position % n_rows]


def _projection_change(direction: Float[Tensor, " unit"]) -> ActivationChange:
    unit_vector = direction / direction.norm().clamp(min=1e-12)

    def project(activation: Tensor, position: Tensor) -> Tensor:
        along = unit_vector.to(activation)
        size_along = (activation @ along)[..., None]
        return activation - size_along * along

    return project


def new_weights(
    value: Value,
    model: HookedModel,
    site: Site,
    units: Int[Tensor, " unit"],
) -> Float[Tensor, " unit"]:
    """What a value makes of the chosen weights of a matrix. Raises `InputError` where it has nothing for weights."""
    old = entries(model, site, units)
    match value:
        case Zero():
            return torch.zeros_like(old)
        case Scale(alpha):
            return alpha * old
        case Restore(other):
            shape_here = shape(model, site)
            shape_there = shape(other, site)
            if shape_here != shape_there:
                raise InputError(f"{site} is {shape_here} here and {shape_there} in the other model")
            return entries(other, site, units).to(old)
        case Given(weights):
            return at_site(weights, site, "the given weights").to(old)
    kind = type(value).__name__
    raise InputError(f"weights have no activation for {kind} to change: Zero, Scale and Restore are for weights")


@torch.inference_mode()
def activation_bank(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    n_rows: int = 256,
    seed: int = 0,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008
) -> dict[Site, Float[Tensor, "row d_mlp"]]:
    """Activations of all neurons at `n_rows` random positions of a behaviour's texts, for `Resample`.

    One row of every site comes from one position. Fewer rows where the texts have fewer positions. Raises `InputError`
    for a number of rows below 1.
    """
    refuse_below_one(n_rows=n_rows)
    data = prepare(model, behaviour, config)
    sites = neuron_sites(model)
    chosen_rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    # Of all real positions, in the order in which batches come, n_rows are chosen at random.
    branches = itertools.chain.from_iterable(data.rows)
    n_real = sum(len(branch.tokens) for branch in branches)
    draws = torch.rand(n_real, generator=torch.Generator().manual_seed(seed))
    is_chosen = draws.argsort() < n_rows
    n_seen = 0
    batch_tokens = batch_tokens_of(model, config)
    for batch in batched(model, data.rows, batch_tokens=batch_tokens, label=f"bank of {behaviour.name}"):
        # On the CPU, since the layers of a model may lie on several devices.
        real = batch.real.flatten().nonzero()[:, 0].cpu()
        chosen = real[is_chosen[n_seen : n_seen + len(real)]]
        n_seen += len(real)

        def keep(site: Site, x: Tensor, chosen: Tensor = chosen) -> None:
            if site.is_of_experts:
                all_neurons = torch.arange(site_shape(model, site)[0])
                x = read_neurons(model, site, x, all_neurons)
            chosen_rows[site].append(x.flatten(0, 1)[chosen].float().cpu())

        stream_activations(model, batch, sites, keep)
    note_scored(model, behaviour.prompt_hashes)
    return {site: torch.cat(rows) for site, rows in chosen_rows.items()}


def at_site(tensors: Mapping[Site, Tensor], site: Site, what: str) -> Tensor:
    """What there is for a site. Raises `InputError` where `what` holds nothing for it."""
    if site not in tensors:
        raise InputError(f"{what} hold nothing for {site}")
    return tensors[site]
