"""How long estimates of mutual information take: timed on random activations of one layer.

Every layer has estimates of its own, and all layers as one have one more. They stand on as many prompts and components,
so each takes about the same. Nothing goes through the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dean_interp.data.examples import Behaviour
from dean_interp.information.activations import Activations, distinct, groups_and_clusters
from dean_interp.information.before_after import BeforeAfter
from dean_interp.information.estimands import HEADLINES, InformationArm, MutualInformationConfig
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_counts
from dean_interp.planning.rates import TimeSpan
from dean_interp.planning.stopwatch import timed
from dean_interp.selection.selection import Selection

_N_ROUNDS = 2


@dataclass(frozen=True)
class Estimates:
    """The estimates of one step: both headline estimands, under edits and beside random controls."""

    tests: Sequence[Behaviour]
    """First and second."""
    n_layers: int
    n_neurons: int
    """Neurons of one behaviour in a layer."""
    n_edits: int
    n_controls: int


def estimates_of(
    model: HookedModel, tests: Sequence[Behaviour], fraction: float, *, n_edits: int, n_controls: int
) -> Estimates:
    """The estimates between the top fraction of the neurons of each behaviour."""
    counts = neuron_counts(model)
    return Estimates(
        tests=tests[:2],
        n_layers=len(counts),
        # The estimate needs a neuron on each side.
        n_neurons=max(1, round(fraction * sum(counts) / len(counts))),
        n_edits=n_edits,
        n_controls=n_controls,
    )


def time_of(estimates: Estimates) -> TimeSpan:
    """The time of all estimates on this machine, from the faster to the slower of two rounds."""
    n_threads = torch.get_num_threads()
    # Matrices are small: other threads would only wait, and long where the machine is busy.
    torch.set_num_threads(1)
    try:
        rounds = [_seconds_of_layer(estimates) for _ in range(_N_ROUNDS)]
    finally:
        torch.set_num_threads(n_threads)
    n_places = estimates.n_layers + 1
    low, high = n_places * min(rounds), n_places * max(rounds)
    return TimeSpan((low + high) / 2, low, high)


def _seconds_of_layer(estimates: Estimates) -> float:
    """What the estimates of one layer take."""
    activations = _random_activations(estimates)
    n_each = estimates.n_neurons
    first = _neurons(activations, 0, n_each)
    second = _neurons(activations, n_each, 2 * n_each)
    # Something in a layer below is changed.
    below = Site(0, "neurons")
    changed = Selection({below: torch.tensor([0])}, {below: (1,)})
    arm = InformationArm(changed, first, second)
    names = [behaviour.name for behaviour in estimates.tests]
    seconds = 0.0
    for estimand in HEADLINES:
        estimator = BeforeAfter(MutualInformationConfig(estimand), activations, arm, names)
        changes: list[dict[str, float]] = []
        # The first state makes what all states share.
        first_state = timed(lambda e=estimator, c=changes: c.append(e.changes(arm, activations))).better
        state = timed(lambda e=estimator: e.changes(arm, activations)).better
        edit = timed(lambda e=estimator, c=changes: e.information(activations, c * estimates.n_controls)).better
        seconds += first_state + max(0, estimates.n_controls - 1) * state + estimates.n_edits * edit
    return seconds


def _random_activations(estimates: Estimates) -> Activations:
    """Activations of both behaviours' neurons in one layer."""
    prompts = distinct(estimates.tests)
    groups, clusters = groups_and_clusters(prompts)
    n_units = 2 * estimates.n_neurons
    generator = torch.Generator().manual_seed(0)
    site = Site(1, "neurons")
    return Activations(
        values={site: torch.randn(len(prompts), n_units, generator=generator)},
        units=Selection({site: torch.arange(n_units)}, {site: (n_units,)}),
        groups=groups,
        clusters=clusters,
        answers={site: torch.randn(len(prompts), 2, n_units, generator=generator)},
    )


def _neurons(activations: Activations, first: int, end: int) -> Selection:
    """The neurons of the layer from one index up to another."""
    (site,) = activations.units.units
    return Selection({site: torch.arange(first, end)}, activations.units.shapes)
