"""How long passes of a model take: seconds for each thing that goes through it, fitted to passes of shallow models."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from dean_interp.planning.amounts import Amount, PassKind

ROUGHLY = 3.0
"""The factor to which a time is believed that comes from the arithmetic alone."""


@dataclass(frozen=True)
class Rates:
    """Seconds of one kind of pass through the whole model, for each thing that is counted (`Amount`)."""

    call: float = 0.0
    row: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    logit: float = 0.0

    def seconds(self, amount: Amount) -> float:
        """The time of some passes."""
        rates = (self.call, self.row, self.token, self.pair, self.logit)
        return sum(map(operator.mul, rates, amount.values))


@dataclass(frozen=True)
class TimedPass:
    """What one pass through a model of some layers took."""

    n_layers: int
    amount: Amount
    seconds: float


def fitted(passes: Sequence[TimedPass], n_layers: int, *, by_row: bool = False) -> Rates:
    """The rates of a model of `n_layers` layers, from passes through models with fewer of the same layers.

    A pass takes its time in every layer (a call, tokens, pairs) and once (the call, the unembedding). Least squares of
    relative errors, no rate below 0.

    Args:
        passes: what was timed.
        n_layers: how many layers the model has.
        by_row: whether something is done for each row, too: weights' scores add a matrix of products for each.
    """
    table = []
    for timed_pass in passes:
        amount = timed_pass.amount
        n_rows = amount.n_rows if by_row else 0.0
        in_layer = np.array([amount.n_calls, n_rows, amount.n_tokens, amount.n_pairs])
        in_layers = timed_pass.n_layers * in_layer
        once = (amount.n_calls, amount.n_logits)
        # Divided by the time: then an error of 1 is one of 100 %.
        table.append(np.array([*in_layers, *once]) / timed_pass.seconds)
    # Columns of like size: tokens and pairs are some orders of magnitude apart.
    matrix = np.array(table)
    scale = np.maximum(matrix.max(0), 1e-300)
    ones = np.ones(len(passes))
    scaled_solution, _ = nnls(matrix / scale, ones)
    call, row, token, pair, call_once, logit = map(float, scaled_solution / scale)
    return Rates(
        call=n_layers * call + call_once,
        row=n_layers * row,
        token=n_layers * token,
        pair=n_layers * pair,
        logit=logit,
    )


@dataclass(frozen=True)
class TimeSpan:
    """A time with the range that it is believed to lie in, in seconds."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: "TimeSpan") -> "TimeSpan":
        """Both, one after the other."""
        return TimeSpan(self.seconds + other.seconds, self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Pace:
    """How long each kind of pass takes on one device."""

    rates: Mapping[PassKind, Rates]
    rounds: tuple[Mapping[PassKind, Rates], ...] = ()
    """The same from each round of a calibration alone; empty where the time comes from the arithmetic."""
    said: str = ""
    """Where it comes from, in words."""
    busy: str = ""
    """Why it may be too slow: the machine did other work. Empty where it did not."""

    def span(self, amounts: Mapping[PassKind, Amount]) -> TimeSpan:
        """The time of some passes, from the fastest to the slowest round; without rounds to a factor of three."""
        seconds = _total(self.rates, amounts)
        if not self.rounds:
            return TimeSpan(seconds, seconds / ROUGHLY, seconds * ROUGHLY)
        each = [_total(rates, amounts) for rates in self.rounds]
        fastest = min(seconds, *each)
        slowest = max(seconds, *each)
        return TimeSpan(seconds, fastest, slowest)


def _total(rates: Mapping[PassKind, Rates], amounts: Mapping[PassKind, Amount]) -> float:
    """Seconds of all passes."""
    seconds = 0.0
    for kind, amount in amounts.items():
        seconds += rates[kind].seconds(amount)
    return seconds
