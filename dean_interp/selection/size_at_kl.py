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
    """The size at which a power law through the nearest tries has the KL `aim`."""
    below = [size for size, kl in tried.items() if kl < aim]
    above = [size for size, kl in tried.items() if kl >= aim]
    # Without a bracket, go out from the try that is nearest to the aim.
    if not below or not above:
        nearest = max(below) if below else min(above)
        slope = _slope(tried) if len(tried) > 1 else power
        return nearest * (aim / max(tried[nearest], 1e-12)) ** (1 / slope)
    # Within a bracket, go as far on the scale of log size as the aim is on that of log KL.
    low, high = max(below), min(above)
    share = 0.5
    if tried[low] > 0:
        share = math.log(aim / tried[low]) / math.log(tried[high] / tried[low])
    # Never so near to an end that the bracket hardly shrinks.
    share = min(max(share, 0.1), 0.9)
    return low * (high / low) ** share


def _slope(tried: dict[float, float]) -> float:
    """Power of KL in size between the smallest and the largest size tried, held to what is plausible."""
    low, high = min(tried), max(tried)
    # Where every try broke the model nothing says how steep it is.
    if math.isinf(tried[low]):
        return 1.0
    rise = math.log(max(tried[high], 1e-12) / max(tried[low], 1e-12)) / math.log(high / low)
    return min(max(rise, 0.1), 4.0)
