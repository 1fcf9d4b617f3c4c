"""Every comparison becomes lines of one table, by one function: before, after, change, tests, controls.

Changes are paired by prompt, clustered by topic (else by prompt), and stand beside the same change under random
ablations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from jaxtyping import Bool

from dean_interp.errors import InputError
from dean_interp.evaluation.outcomes import SHARE, Better, Outcome, Outcomes
from dean_interp.statistics import (
    Interval,
    clustered_interval,
    detectable_difference,
    holm,
    rank_p_value,
    share_interval,
    sign_flip_p_value,
    standard_error,
)

ASSUMED_DISCORDANCE = 0.2
"""Share of yes/no outcomes that are assumed to change either way, where no control says how many do."""
_SIDE = {"higher": 1, "lower": -1, "neither": 0}
Key = tuple[str, str]


@dataclass(frozen=True)
class Line:
    """One outcome before and after, on the prompts that have a number in both states."""

    metric: str
    on: str
    unit: str
    better: Better
    n: int
    n_clusters: int
    n_missing: int
    """Number of prompts without a finite number in one of the two states. They are in none of this line's numbers."""
    before: Interval
    after: Interval
    change: Interval
    """Paired by prompt; 95 % interval clustered by topic, else by prompt."""
    p: float
    """Two-sided, that the mean change is 0: signs of clusters flipped (McNemar's test where clusters are single)."""
    p_holm: float
    """The same, adjusted for the number of sets that this metric was taken on."""
    detectable: float | None
    """Smallest mean change that 80 % of such designs find; None where nothing says how much changes vary."""
    control_changes: tuple[float, ...] = ()
    """Mean changes under random ablations."""
    rank: float | None = None
    """One-sided p that the change is better than under random ablations; None without them or without a better side."""


def compare(
    original: Outcomes,
    changed: Outcomes,
    controls: Sequence[Outcomes] = (),
    *,
    detectable: Mapping[Key, float | None] | None = None,
) -> list[Line]:
    """One line an outcome that has numbers of two clusters or more in both states.

    Args:
        original: outcomes of the original state.
        changed: outcomes of the state that is compared with it.
        controls: outcomes of random ablations. They need not have all outcomes: a control without one is left out of
            its line.
        detectable: what was stated beforehand (`detectable_changes`); None takes it from these controls.

    Raises:
        InputError: states that were measured on other prompts.
    """
    _refuse_other_prompts(original, (changed, *controls))
    if detectable is None:
        detectable = detectable_changes(original, controls)
    after = {outcome.key: outcome for outcome in changed}
    random = _by_key(controls)
    lines = []
    for before in original:
        key = before.key
        if key not in after:
            continue
        line = _line(before, after[key], controls=random.get(key, []), detectable=detectable.get(key))
        if line is not None:
            lines.append(line)
    return _with_holm(lines)


def compare_each(
    original: Outcomes,
    arms: Mapping[str, Outcomes],
    controls: Mapping[str, Sequence[Outcomes]] | None = None,
) -> dict[str, tuple[Line, ...]]:
    """Every arm against the original, beside its random controls where it has some (`compare`)."""
    lines = {}
    for name, outcomes in arms.items():
        # A mean of shares over draws is compared with the original's share.
        units = {outcome.key: outcome.unit for outcome in outcomes}
        before = []
        for outcome in original:
            unit = units.get(outcome.key, outcome.unit)
            before.append(replace(outcome, unit=unit))
        own_controls = controls.get(name, ()) if controls else ()
        lines[name] = tuple(compare(before, outcomes, own_controls))
    return lines


def detectable_changes(original: Outcomes, controls: Sequence[Outcomes]) -> dict[Key, float | None]:
    """What the design can detect of each outcome, from the original and random controls alone.

    The standard error is that of the controls' changes, clustered as the outcome's intervals are. Where no control says
    how much changes vary, only shares have an answer, from `ASSUMED_DISCORDANCE`.
    """
    random = _by_key(controls)
    detectable = {}
    for before in original:
        detectable[before.key] = _detectable(before, random.get(before.key, []))
    return detectable


def _detectable(before: Outcome, controls: Sequence[Outcome]) -> float | None:
    """What the design can detect of one outcome; None below two clusters."""
    n_clusters = len(set(before.clusters))
    if n_clusters < 2:
        return None
    variances = []
    for control in controls:
        has_number = _in_both(before, control)
        clusters = _clusters(before, has_number)
        if len(set(clusters)) >= 2:
            change = (control.values - before.values)[has_number]
            variances.append(standard_error(change, clusters) ** 2)
    if any(variances):
        variance = np.mean(variances)
    elif before.unit == SHARE:
        variance = ASSUMED_DISCORDANCE / n_clusters
    else:
        return None
    return detectable_difference(float(np.sqrt(variance)), n_clusters)


def _refuse_other_prompts(original: Outcomes, states: Sequence[Outcomes]) -> None:
    """Raise `InputError` where an outcome of the original was measured on other prompts in another state."""
    clusters = {outcome.key: outcome.clusters for outcome in original}
    for outcome in chain.from_iterable(states):
        if outcome.clusters != clusters.get(outcome.key, outcome.clusters):
            raise InputError(f"'{outcome.metric}' on {outcome.on} was measured on other prompts in another state")


def _line(before: Outcome, after: Outcome, controls: Sequence[Outcome], detectable: float | None) -> Line | None:
    """One outcome in two states; None below two clusters."""
    has_number = _in_both(before, after)
    clusters = _clusters(before, has_number)
    n_clusters = len(set(clusters))
    if n_clusters < 2:
        return None
    # Levels of shares stay within 0 and 1, and their changes within −1 and 1.
    is_share = before.unit == after.unit == SHARE
    level = share_interval if is_share else clustered_interval
    values_before = before.values[has_number]
    values_after = after.values[has_number]
    change = values_after - values_before
    interval = clustered_interval(change, clusters)
    if is_share:
        interval = replace(interval, low=max(interval.low, -1.0), high=min(interval.high, 1.0))
    control_changes = _mean_changes(before, controls)
    return Line(
        metric=before.metric,
        on=before.on,
        # lm-eval's numbers may all be 0 or 1 in one state, and others in the next
        unit=after.unit if before.unit == SHARE else before.unit,
        better=before.better,
        n=int(has_number.sum()),
        n_clusters=n_clusters,
        n_missing=int((~has_number).sum()),
        before=level(values_before, clusters),
        after=level(values_after, clusters),
        change=interval,
        p=sign_flip_p_value(change, clusters),
        p_holm=float("nan"),
        detectable=detectable,
        control_changes=control_changes,
        rank=_rank(before.better, float(change.mean()), control_changes),
    )


def _rank(better: Better, change: float, control_changes: Sequence[float]) -> float | None:
    """One-sided p that a change is better than those of the controls; None without them or without a better side."""
    side = _SIDE[better]
    if side == 0 or not control_changes:
        return None
    improvements = [side * control_change for control_change in control_changes]
    return rank_p_value(side * change, improvements)


def _mean_changes(before: Outcome, controls: Sequence[Outcome]) -> tuple[float, ...]:
    """Each control's mean change, over the prompts that have a number."""
    means = []
    for control in controls:
        has_number = _in_both(before, control)
        if has_number.any():
            change = (control.values - before.values)[has_number]
            means.append(float(change.mean()))
    return tuple(means)


def _with_holm(lines: Sequence[Line]) -> list[Line]:
    """The lines with p-values adjusted over the sets of each metric."""
    adjusted: dict[Key, float] = {}
    metrics = dict.fromkeys(line.metric for line in lines)
    for metric in metrics:
        family = {line.on: line.p for line in lines if line.metric == metric}
        for on, p in holm(family).items():
            adjusted[metric, on] = p
    with_holm = []
    for line in lines:
        p_holm = adjusted[line.metric, line.on]
        with_holm.append(replace(line, p_holm=p_holm))
    return with_holm


def _by_key(controls: Sequence[Outcomes]) -> dict[Key, list[Outcome]]:
    """Each outcome under the controls that have it."""
    by_key: dict[Key, list[Outcome]] = {}
    for outcomes in controls:
        for outcome in outcomes:
            by_key.setdefault(outcome.key, []).append(outcome)
    return by_key


def _in_both(before: Outcome, after: Outcome) -> Bool[np.ndarray, " example"]:
    """Which prompts have a number in both states; an infinite one has no mean."""
    return np.isfinite(before.values) & np.isfinite(after.values)


def _clusters(outcome: Outcome, rows: Bool[np.ndarray, " example"]) -> list[str]:
    """The clusters of the prompts where `rows` is true."""
    return [cluster for cluster, wanted in zip(outcome.clusters, rows, strict=True) if wanted]
