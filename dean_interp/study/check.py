"""One check of a run: what it holds and what is found now are the same, differ by no more than float noise, or differ.

Numbers may differ by what other batches, threads and devices change; all else must be equal.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Nats, and parts of the largest score: what other batches, threads and devices may change."""

Match = Literal["same", "within float noise", "different"]


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    match: Match
    difference: float
    """The largest; 0 for what is equal or has no size."""
    detail: str = ""


def equal(what: str, now: object, then: object) -> Check:
    """Check that two things are equal."""
    if now == then:
        return Check(what, "same", 0.0)
    return Check(what, "different", 0.0, f"{then} there, {now} now")


def close(what: str, now: Tensor, then: Tensor, *, dtype: str, detail: str) -> Check:
    """Check that two tensors differ by no more than float noise of a model of that dtype."""
    if now.shape != then.shape:
        return Check(what, "different", 0.0, f"{tuple(then.shape)} there, {tuple(now.shape)} now")
    difference = 0.0
    if now.numel():
        difference = float((now.double() - then.double()).abs().max())
    return Check(what, match_of(difference, dtype), difference, detail)


def match_of(difference: float, dtype: str) -> Match:
    """What the largest difference of numbers says, in a model of that dtype."""
    if not difference:
        return "same"
    if difference <= _TOLERANCE[dtype]:
        return "within float noise"
    return "different"


def largest_difference(then: Any, now: Any) -> float:  # noqa: ANN401 - what JSON can hold
    """The largest difference of numbers; infinite where anything else differs."""
    match then, now:
        case dict(), dict() if then.keys() == now.keys():
            differences = [largest_difference(then[key], now[key]) for key in then]
            return max(differences, default=0.0)
        case list(), list() if len(then) == len(now):
            differences = map(largest_difference, then, now)
            return max(differences, default=0.0)
        case int() | float(), int() | float():
            return abs(now - then) / max(1.0, abs(then))
        case _:
            return 0.0 if then == now else math.inf
