"""The dose of gates: how far their direction is followed, set by measured KL on general text.

The dose of the edit is the largest whose KL interval ends within the budget. Gates that it is compared with are brought
to the edit's own KL.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dean_interp.editing.values import Multiply
from dean_interp.errors import InputError
from dean_interp.evaluation.measurement import BehaviourMeasurement
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.sites import Site
from dean_interp.selection.gates import Gates, dosed
from dean_interp.selection.size_at_kl import size_at_kl
from dean_interp.selection.strata import Strata
from dean_interp.statistics import Interval, clustered_interval
from dean_interp.study.store import ORIGINAL, State, Store

_START = 0.1
"""Predicted KL counts neurons each alone. Measured KL is some times that, so the search begins at this share."""
_FARTHEST = 1e4
_WITHIN = 0.1
"""A dose is good where the upper end of its KL is within so much below the budget."""


KlOf = Callable[[Gates], Interval]
"""Measures the KL of gates to the original on general text, nats per answer token."""
KlOfState = Callable[[State], Interval]
"""Measures the KL of a state to the original on general text, nats per answer token."""


def gated_state(name: str, kind: str, gates: Gates, *, dose: float = 1.0) -> State:
    """The model under gates. Those that change nothing leave the original."""
    changed = gates.selection if len(gates) else None
    return State(name=name, kind=kind, ablated=changed, value=Multiply(gates), unit="neuron", growth=dose)


def kl_interval(measured: BehaviourMeasurement, clusters: tuple[str, ...]) -> Interval:
    """KL to the original per answer token (nats), with its interval by topic."""
    kl = measured.kl[:, 0].double()
    n_tokens = measured.n_tokens[:, 0].double()
    # An answer's weight is its number of tokens, so that the mean is that over tokens.
    weighted = kl * n_tokens / n_tokens.mean()
    return clustered_interval(np.asarray(weighted.numpy(), dtype=float), clusters)


def state_kl_meter(store: Store, model: HookedModel) -> KlOfState:
    """What measures the KL of states on the store's general text, nats per answer token. Each is measured once."""
    general = store.tests[2]
    clusters = clusters_of(general)
    original = store.general(model, ORIGINAL)

    def kl(state: State) -> Interval:
        measured = store.general(model, state, reference=original)
        return kl_interval(measured[general.name], clusters)

    return kl


def kl_meter(store: Store, model: HookedModel) -> KlOf:
    """The same for the model under gates."""
    kl_of_state = state_kl_meter(store, model)
    return lambda gates: kl_of_state(gated_state("trial", "trial", gates))


@dataclass(frozen=True)
class Dose:
    """How far a direction is followed, and the KL that was measured there."""

    dose: float
    kl: Interval
    """On the general text that chooses doses, nats per answer token."""


def largest_dose(direction: Gates, meter: KlOf, *, max_kl: float) -> Dose:
    """The largest dose whose KL is within the budget: the upper end of its interval is at most `max_kl`.

    Args:
        direction: gates of a predicted KL of 1 nat per token.
        meter: measures the KL of gates.
        max_kl: nats per answer token.

    Raises:
        InputError: a budget that is not positive, or that no dose reaches.
    """
    if not max_kl > 0:
        raise InputError(f"max_kl must be above 0 nats per token, got {max_kl}")
    measured: dict[float, Interval] = {}

    def upper_end(dose: float) -> float:
        measured[dose] = meter(dosed(direction, dose))
        return measured[dose].high

    start = (_START * max_kl) ** 0.5
    farthest = _FARTHEST * start
    # The band of good doses ends at the budget.
    target = (1 - _WITHIN) * max_kl
    tolerance = _WITHIN / (1 - _WITHIN)
    size_at_kl(upper_end, target, bounds=(1e-6 * start, farthest), start=start, tolerance=tolerance)
    largest = max(measured)
    at_largest = measured[largest]
    if largest >= farthest and at_largest.high < target:
        advice = f"Give at most {at_largest.high:.2g}" if at_largest.high > 0 else "No other budget can be reached"
        raise InputError(
            f"max_kl={max_kl} cannot be reached: with every gate at its limit the KL is "
            f"{at_largest.mean:.3g} nats per token. {advice}"
        )
    within = [dose for dose, kl in measured.items() if kl.high <= max_kl]
    if not within:
        raise InputError(f"no dose has a KL within {max_kl} nats per token: raise max_kl")
    dose = max(within)
    return Dose(dose, measured[dose])


def dose_to_kl(direction: Gates, meter: KlOf, *, kl: float, start: float) -> Dose:
    """The dose at which the mean KL is about `kl`, from one measurement at `start`.

    KL grows about as the square of a dose that is this small. The KL of the result is predicted; what is measured on
    confirming text stands beside every state. Where the model breaks at `start`, which
    leaves no KL, half of it is taken.
    """
    trial = meter(dosed(direction, start))
    while math.isnan(trial.mean):
        start /= 2
        trial = meter(dosed(direction, start))
    growth = kl / max(trial.mean, 1e-12)
    predicted = Interval(
        mean=growth * trial.mean,
        low=growth * trial.low,
        high=growth * trial.high,
        n_clusters=trial.n_clusters,
    )
    return Dose(start * growth**0.5, predicted)


def random_gates(gates: Gates, strata: Strata, *, seed: int) -> Gates:
    """The same changes at other neurons: shuffled within each layer and stratum (`selection.strata`)."""
    multipliers: dict[Site, Tensor] = {}
    for number, site in enumerate(sorted(gates.multipliers)):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        multiplier = gates.multipliers[site]
        stratum_of = strata[site].flatten()
        shuffled = multiplier.clone()
        for stratum in stratum_of.unique():
            members = (stratum_of == stratum).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=generator)
            shuffled[members] = multiplier[members[order]]
        multipliers[site] = shuffled
    return Gates(multipliers, gates.prompt_hashes)
