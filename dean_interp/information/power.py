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
from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError, refuse_below, refuse_below_one
from dean_interp.information.gaussian import gaussian_of_samples

Part = Float[Tensor, "#state prompt k"]
"""A part of one side, in each state of the model or in all of them alike."""


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
        InputError: negative information, a rise, too few prompts, components, controls or trials.
    """
    _check(design, n_trials)
    if not 0 <= after <= before:
        raise InputError(f"a fall goes from `before` to an `after` between 0 and it, got {before} and {after}")
    least = _fewest_prompts(design)
    if n_prompts < least:
        raise InputError(f"k={design.k} a side needs at least {least} prompts, got {n_prompts}")
    if not 0 < design.disturbed <= 1 or not 0 < design.level < 1:
        raise InputError(f"disturbed and level must be between 0 and 1, got {design.disturbed} and {design.level}")
    if 1 / (design.n_controls + 1) > design.level:
        raise InputError(f"{design.n_controls} controls can never give p <= {design.level}")
    generator = torch.Generator().manual_seed(seed)
    n_finding = 0
    for _ in range(n_trials):
        n_finding += _finds(n_prompts, before, after, design, generator=generator)
    return n_finding / n_trials


def _check(design: PowerDesign, n_trials: int) -> None:
    refuse_below(design, {"k": 1, "n_controls": 1})
    refuse_below_one(n_trials=n_trials)


def _fewest_prompts(design: PowerDesign) -> int:
    n_dims = 2 * design.k
    return n_dims + 2


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
    _check(design, n_trials)
    n_prompts = _fewest_prompts(design)
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
    estimate_before = gaussian_of_samples(*_sides(cause, own_x, own_y, before))
    # the edit, which stands first, and each control replace some of each side's own part
    n_states = design.n_controls + 1
    own_x = _disturbed(own_x, n_states, design.disturbed, generator)
    own_y = _disturbed(own_y, n_states, design.disturbed, generator)
    # only the edit weakens the cause
    edit = gaussian_of_samples(*_sides(cause, own_x[:1], own_y[:1], after))
    controls = gaussian_of_samples(*_sides(cause, own_x[1:], own_y[1:], before))
    is_as_low = controls - estimate_before <= edit - estimate_before
    p = (1 + int(is_as_low.sum())) / n_states
    return p <= design.level


def _disturbed(own: Part, n_states: int, share: float, generator: torch.Generator) -> Part:
    """A side's own part in each state: a share of its variance is new."""
    _, n_prompts, k = own.shape
    fresh = torch.randn((n_states, n_prompts, k), generator=generator, dtype=torch.float64)
    return (1 - share) ** 0.5 * own + share**0.5 * fresh


def _sides(cause: Part, own_x: Part, own_y: Part, information: float) -> tuple[Part, Part]:
    """Two sides of `information` nats, the same on each component: their correlation is the cause's share."""
    per_component = information / cause.shape[2]
    # the correlation of two Gaussians from their mutual information: I = -0.5 log(1 - rho^2)
    correlation = (1 - math.exp(-2 * per_component)) ** 0.5
    shared = correlation**0.5 * cause
    own_scale = (1 - correlation) ** 0.5
    return shared + own_scale * own_x, shared + own_scale * own_y
