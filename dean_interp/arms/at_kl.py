"""The dose of a change at which the mean KL on general text is a given one, by measuring."""

import math
from dataclasses import dataclass

from dean_interp.arms.arm import Change
from dean_interp.selection.size_at_kl import size_at_kl
from dean_interp.statistics import Interval
from dean_interp.study.dosing import KlOfState

_SMALLEST = 1e-4
_POWER = 2.0


@dataclass(frozen=True)
class DoseAtKl:
    """A dose, and the KL that was measured there on the general text that chooses doses."""

    dose: float
    kl: Interval
    """Nats per answer token."""
    is_reached: bool
    """Whether this KL is the one that was looked for, or at most a tenth above it. A set that is silenced whole may do
    less damage, and units that come one by one may jump over it."""


def dose_at_kl(change: Change, meter: KlOfState, *, kl: float, start: float | None = None) -> DoseAtKl:
    """The dose whose mean KL is from `kl` to a tenth above it, else the nearest that was found from above or below.

    Args:
        change: what is followed.
        meter: measures the KL of its states.
        kl: nats per answer token.
        start: the dose that is tried first, if another than the change's own.
    """
    measured: dict[float, Interval] = {}

    def mean_kl(dose: float) -> float:
        measured[dose] = meter(change.at(dose))
        return measured[dose].mean

    first = change.first_dose if start is None else start
    dose, is_reached = size_at_kl(
        mean_kl,
        kl,
        bounds=(_SMALLEST * change.first_dose, change.largest_dose),
        start=first,
        power=_POWER,
    )
    if math.isnan(measured[dose].mean):
        # The model broke at this dose, so the largest one that did not break it is taken.
        n_clusters = measured[dose].n_clusters
        unbroken = [tried for tried, interval in measured.items() if not math.isnan(interval.mean)]
        if not unbroken:
            # Every dose broke it: nothing is changed, which costs nothing.
            return DoseAtKl(0.0, Interval(0.0, 0.0, 0.0, n_clusters), is_reached)
        dose = max(unbroken)
    return DoseAtKl(dose, measured[dose], is_reached)
