"""Controls that need an effect to be measured: random ablations grown until they do as much damage as the edit."""

import math
from collections.abc import Callable

from dean_interp.selection.selection import Selection


def grow_to_kl(
    draw: Callable[[float], Selection],
    damage: Callable[[Selection], float],
    target: float,
    *,
    bounds: tuple[float, float],
    start: float = 1.0,
    tolerance: float = 0.1,
    max_tries: int = 8,
) -> tuple[float, bool]:
    """The size at which a random ablation's KL reaches the edit's.

    A secant on log KL against log size, kept inside the bracket found so far: KL grows about as a power of the size.

    Args:
        draw: the control at a given growth; a larger growth only adds units.
        damage: KL to the original (nats per token).
        target: the edit's KL.
        start: the growth that is tried first.
        tolerance: how far above the target a KL may be.
        max_tries: how many sizes are tried.
        bounds: the smallest growth that still silences a unit, and the largest that the model has units for.

    Returns:
        The growth, and whether its KL is in `[target, (1 + tolerance) * target]`. Where no try falls inside, the
        smallest growth that reaches the target, else the largest tried.
    """
    tried: dict[float, float] = {}
    growth = start
    for _ in range(max_tries):
        growth = min(max(growth, bounds[0]), bounds[1])
        if growth in tried:
            break
        tried[growth] = damage(draw(growth))
        if target <= tried[growth] <= (1 + tolerance) * target:
            return growth, True
        growth = _next_growth(tried, target * (1 + tolerance / 2))
    enough = [size for size, kl in tried.items() if kl >= target]
    return (min(enough), False) if enough else (max(tried), False)


def _next_growth(tried: dict[float, float], aim: float) -> float:
    below = max((size for size, kl in tried.items() if kl < aim), default=None)
    above = min((size for size, kl in tried.items() if kl >= aim), default=None)
    if below is None or above is None:
        size = above if below is None else below
        assert size is not None
        slope = _slope(tried) if len(tried) > 1 else 1.0
        return size * (aim / max(tried[size], 1e-12)) ** (1 / slope)
    share = math.log(aim / tried[below]) / math.log(tried[above] / tried[below]) if tried[below] > 0 else 0.5
    return below * (above / below) ** min(max(share, 0.1), 0.9)


def _slope(tried: dict[float, float]) -> float:
    """Power of KL in size between the smallest and the largest size tried, held to what is plausible."""
    low, high = min(tried), max(tried)
    rise = math.log(max(tried[high], 1e-12) / max(tried[low], 1e-12)) / math.log(high / low)
    return min(max(rise, 0.1), 4.0)
