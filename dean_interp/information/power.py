"""How often a study would find a fall of the mutual information: how many prompts to collect before anything is run.

The model: each of `k` components of a side is the sum of a cause that both sides share and of a part of its own. The
edit weakens the shared cause. The edit and every control also replace some of each side's own part, which moves every
estimate a little. Before and after are the same prompts. A fall is found where its rank among the controls gives
`p <= level`, as in a study.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.information.gaussian import gaussian_of_samples


@dataclass(frozen=True)
class PowerDesign:
    """What a study of one layer looks like."""

    k: int = 5
    """Principal components a side."""
    n_controls: int = 99
    """Matched random ablations."""
    disturbed: float = 0.1
    """Share of each side's own variance that any ablation replaces."""
    level: float = 0.05
    """Significance level of the one-sided rank among the controls."""


def detection_rate(
    n_prompts: int,
    *,
    before: float,
    after: float,
    design: PowerDesign = PowerDesign(),
    n_trials: int = 200,
    seed: int = 0,
) -> float:
    """The share of studies of `n_prompts` in which a fall from `before` to `after` nats is found.

    With `after == before` this is the share of false alarms, at most `level`.

    Raises:
        InputError: negative information, a rise, too few prompts or controls.
    """
    if not 0 <= after <= before:
        raise InputError(f"a fall goes from `before` to an `after` between 0 and it, got {before} and {after}")
    if n_prompts < 2 * design.k + 2:
        raise InputError(f"k={design.k} a side needs at least {2 * design.k + 2} prompts, got {n_prompts}")
    if not 0 < design.disturbed <= 1 or not 0 < design.level < 1:
        raise InputError(f"disturbed and level must be between 0 and 1, got {design.disturbed} and {design.level}")
    if 1 / (design.n_controls + 1) > design.level:
        raise InputError(f"{design.n_controls} controls can never give p <= {design.level}")
    generator = torch.Generator().manual_seed(seed)
    n_finding = sum(_finds(n_prompts, before, after, design, generator=generator) for _ in range(n_trials))
    return n_finding / n_trials


def prompts_needed(
    *,
    before: float,
    after: float,
    power: float = 0.8,
    design: PowerDesign = PowerDesign(),
    at_most: int = 4096,
    n_trials: int = 200,
    seed: int = 0,
) -> int | None:
    """The fewest prompts (to a tenth) that find the fall with probability `power`; None where it takes over `at_most`.

    Raises:
        InputError: as `detection_rate`; `power` not between 0 and 1.
    """
    if not 0 < power < 1:
        raise InputError(f"power must be between 0 and 1, got {power}")
    n_prompts = 2 * design.k + 2
    while n_prompts <= at_most:
        rate = detection_rate(n_prompts, before=before, after=after, design=design, n_trials=n_trials, seed=seed)
        if rate >= power:
            return n_prompts
        n_prompts = math.ceil(1.1 * n_prompts)
    return None


def power_curve(
    n_prompts: Sequence[int],
    *,
    before: float,
    after: float,
    design: PowerDesign = PowerDesign(),
    n_trials: int = 200,
    seed: int = 0,
) -> list[float]:
    """`detection_rate` for several numbers of prompts."""
    rates = []
    for n in n_prompts:
        rates.append(detection_rate(n, before=before, after=after, design=design, n_trials=n_trials, seed=seed))
    return rates


def _finds(n: int, before: float, after: float, design: PowerDesign, *, generator: torch.Generator) -> bool:
    """Whether one simulated study finds the fall."""
    shape = (1, n, design.k)
    cause, own_x, own_y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    then = gaussian_of_samples(*_sides(cause, [own_x, own_y], before, design.k))
    # the edit, which stands first, and each control replace some of each side's own part
    n_states = design.n_controls + 1
    own_x = _disturbed(own_x, n_states, design.disturbed, generator)
    own_y = _disturbed(own_y, n_states, design.disturbed, generator)
    # only the edit weakens the cause
    edit = gaussian_of_samples(*_sides(cause, [own_x[:1], own_y[:1]], after, design.k))
    controls = gaussian_of_samples(*_sides(cause, [own_x[1:], own_y[1:]], before, design.k))
    n_as_low = int((controls - then <= edit - then).sum())
    return (1 + n_as_low) / n_states <= design.level


def _disturbed(own: Tensor, n_states: int, share: float, generator: torch.Generator) -> Tensor:
    """A side's own part in each state: a share of its variance is new."""
    fresh = torch.randn((n_states, *own.shape[1:]), generator=generator, dtype=torch.float64)
    return (1 - share) ** 0.5 * own + share**0.5 * fresh


def _sides(cause: Tensor, own: Sequence[Tensor], information: float, k: int) -> tuple[Tensor, Tensor]:
    """Two sides of `information` nats, the same on each component: their correlation is the cause's share."""
    share = (1 - math.exp(-2 * information / k)) ** 0.5
    first, second = (share**0.5 * cause + (1 - share) ** 0.5 * part for part in own)
    return first, second
