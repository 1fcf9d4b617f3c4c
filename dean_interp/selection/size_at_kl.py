"""The size of a change at which its KL to the original is a given one.

KL grows about as a power of the size: of the number of silenced units, or of the dose of gates. So a secant on log KL
against log size finds it in a few measurements.
"""

import math
from collections.abc import Callable


def size_at_kl(
    kl: Callable[[float], float],
    target: float,
    *,
    bounds: tuple[float, float],
    start: float = 1.0,
    power: float = 1.0,
    tolerance: float = 0.1,
    max_tries: int = 8,
) -> tuple[float, bool]:
    """The size at which the KL reaches `target`, by a secant that is kept inside the bracket found so far.

    Args:
        kl: KL to the original at a size (nats per token); a larger size does more.
        target: the KL that is wanted.
        bounds: the smallest and the largest size that may be tried.
        start: the size that is tried first.
        power: the power of the size that the KL is taken to grow with, until two tries show it.
        tolerance: how far above the target a KL may be.
        max_tries: how many sizes are tried.

    Returns:
        The size, and whether its KL is in `[target, (1 + tolerance) * target]`. Where no try falls inside, the smallest
        size that reaches the target, else the largest tried.
    """
    tried: dict[float, float] = {}
    size = start
    for _ in range(max_tries):
        size = min(max(size, bounds[0]), bounds[1])
        if size in tried:
            break
        found = kl(size)
        # A change so large that the model overflows has no KL: it is too large.
        tried[size] = math.inf if math.isnan(found) else found
        if target <= tried[size] <= (1 + tolerance) * target:
            return size, True
        size = _next_size(tried, target * (1 + tolerance / 2), power)
    enough = [size for size, reached in tried.items() if reached >= target]
    return (min(enough), False) if enough else (max(tried), False)


def _next_size(tried: dict[float, float], aim: float, power: float) -> float:
    below = max((size for size, kl in tried.items() if kl < aim), default=None)
    above = min((size for size, kl in tried.items() if kl >= aim), default=None)
    if below is None or above is None:
        size = above if below is None else below
        assert size is not None
        slope = _slope(tried) if len(tried) > 1 else power
        return size * (aim / max(tried[size], 1e-12)) ** (1 / slope)
    share = math.log(aim / tried[below]) / math.log(tried[above] / tried[below]) if tried[below] > 0 else 0.5
    return below * (above / below) ** min(max(share, 0.1), 0.9)


def _slope(tried: dict[float, float]) -> float:
    """Power of KL in size between the smallest and the largest size tried, held to what is plausible."""
    low, high = min(tried), max(tried)
    rise = math.log(max(tried[high], 1e-12) / max(tried[low], 1e-12)) / math.log(high / low)
    return min(max(rise, 0.1), 4.0)
