"""Every comparison becomes lines of one table, by one function: before, after, change, tests, controls.

Changes are paired by prompt, clustered by topic (else by prompt), and stand beside the same change under random
ablations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool

from dean_interp.errors import InputError
from dean_interp.evaluation.outcomes import SHARE, Better, Outcome
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
    """Number of prompts without a number in one of the two states. They are in none of the numbers of this line."""
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
    original: Sequence[Outcome],
    changed: Sequence[Outcome],
    controls: Sequence[Sequence[Outcome]] = (),
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
    detects = detectable_changes(original, controls) if detectable is None else detectable
    after = {outcome.key: outcome for outcome in changed}
    random = _by_key(controls)
    lines = []
    for before in original:
        if before.key in after:
            line = _line(before, after[before.key], random.get(before.key, []), detects.get(before.key))
            lines += [line] if line else []
    return _with_holm(lines)


def compare_each(
    original: Sequence[Outcome],
    arms: Mapping[str, Sequence[Outcome]],
    controls: Mapping[str, Sequence[Sequence[Outcome]]] | None = None,
) -> dict[str, tuple[Line, ...]]:
    """Every arm against the original, beside its random controls where it has some (`compare`)."""
    lines = {}
    for name, outcomes in arms.items():
        # A mean of shares over draws is compared with the original's share.
        units = {outcome.key: outcome.unit for outcome in outcomes}
        before = [replace(outcome, unit=units.get(outcome.key, outcome.unit)) for outcome in original]
        beside = controls.get(name, ()) if controls else ()
        lines[name] = tuple(compare(before, outcomes, beside))
    return lines


def detectable_changes(original: Sequence[Outcome], controls: Sequence[Sequence[Outcome]]) -> dict[Key, float | None]:
    """What the design can detect of each outcome, from the original and random controls alone.

    The standard error is that of the controls' changes, clustered as the outcome's intervals are. Where no control says
    how much changes vary, only shares have an answer, from `ASSUMED_DISCORDANCE`.
    """
    random = _by_key(controls)
    return {before.key: _detectable(before, random.get(before.key, [])) for before in original}


def _detectable(before: Outcome, controls: Sequence[Outcome]) -> float | None:
    variances = []
    n_clusters = len(set(before.clusters))
    if n_clusters < 2:
        return None
    for control in controls:
        has_number = _in_both(before, control)
        clusters = _clusters(before, has_number)
        if len(set(clusters)) >= 2:
            change = (control.values - before.values)[has_number]
            variances.append(standard_error(change, clusters) ** 2)
    if any(variances):
        return detectable_difference(float(np.sqrt(np.mean(variances))), n_clusters)
    if before.unit == SHARE:
        return detectable_difference(float(np.sqrt(ASSUMED_DISCORDANCE / n_clusters)), n_clusters)
    return None


def _line(before: Outcome, after: Outcome, controls: Sequence[Outcome], detectable: float | None) -> Line | None:
    """One outcome in two states; None below two clusters."""
    for other in (after, *controls):
        if other.clusters != before.clusters:
            raise InputError(f"'{before.metric}' on {before.on} was measured on other prompts in another state")
    has_number = _in_both(before, after)
    clusters = _clusters(before, has_number)
    if len(set(clusters)) < 2:
        return None
    # Levels of shares stay within 0 and 1; changes may have either sign.
    level = share_interval if before.unit == SHARE else clustered_interval
    change = after.values[has_number] - before.values[has_number]
    control_changes = _mean_changes(before, controls)
    side, rank = _SIDE[before.better], None
    if side and control_changes:
        rank = rank_p_value(side * float(change.mean()), [side * value for value in control_changes])
    return Line(
        metric=before.metric,
        on=before.on,
        unit=before.unit,
        better=before.better,
        n=int(has_number.sum()),
        n_clusters=len(set(clusters)),
        n_missing=int((~has_number).sum()),
        before=level(before.values[has_number], clusters),
        after=level(after.values[has_number], clusters),
        change=clustered_interval(change, clusters),
        p=sign_flip_p_value(change, clusters),
        p_holm=float("nan"),
        detectable=detectable,
        control_changes=control_changes,
        rank=rank,
    )


def _mean_changes(before: Outcome, controls: Sequence[Outcome]) -> tuple[float, ...]:
    """Each control's mean change, over the prompts that have a number."""
    changes = [control.values - before.values for control in controls]
    return tuple(float(np.nanmean(change)) for change in changes if not np.isnan(change).all())


def _with_holm(lines: Sequence[Line]) -> list[Line]:
    """The lines with p-values adjusted over the sets of each metric."""
    adjusted: dict[Key, float] = {}
    for metric in dict.fromkeys(line.metric for line in lines):
        family = {line.on: line.p for line in lines if line.metric == metric}
        adjusted |= {(metric, on): p for on, p in holm(family).items()}
    return [replace(line, p_holm=adjusted[line.metric, line.on]) for line in lines]


def _by_key(controls: Sequence[Sequence[Outcome]]) -> dict[Key, list[Outcome]]:
    by_key: dict[Key, list[Outcome]] = {}
    for outcomes in controls:
        for outcome in outcomes:
            by_key.setdefault(outcome.key, []).append(outcome)
    return by_key


def _in_both(before: Outcome, after: Outcome) -> Bool[np.ndarray, " example"]:
    return ~(np.isnan(before.values) | np.isnan(after.values))


def _clusters(outcome: Outcome, rows: Bool[np.ndarray, " example"]) -> list[str]:
    return [cluster for cluster, wanted in zip(outcome.clusters, rows, strict=True) if wanted]


def lines_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One row a line: what was measured on what, before, after, the change with its interval, p, rank."""
    rows = []
    for line in lines:
        row = {"metric": line.metric, "on": line.on, "unit": line.unit, "n": line.n}
        row |= {"before": line.before.mean, "after": line.after.mean}
        row |= {"change": line.change.mean, "low": line.change.low, "high": line.change.high}
        rows.append(row | {"p": line.p, "p_holm": line.p_holm, "rank": line.rank})
    return pd.DataFrame(rows)


def lines_table(lines: Sequence[Line]) -> str:
    """The lines for people, one block a metric."""
    head = (
        f"{'':<24}{'n':>5} {'original':>22} {'edit':>22} {'change':>26} {'p':>6} {'Holm':>6} {'rank':>6} {'detects':>8}"
    )
    text = [head, "-" * len(head)]
    for number, metric in enumerate(dict.fromkeys(line.metric for line in lines)):
        own = [line for line in lines if line.metric == metric]
        better = "" if own[0].better == "neither" else f", {own[0].better} is better"
        text += [""] if number else []
        text += [f"{metric} ({own[0].unit}{better})", *map(_row, own)]
    n_controls = max((len(line.control_changes) for line in lines), default=0)
    ranks = "rank: no random ablations were measured (give --scores)."
    if n_controls:
        ranks = f"rank: one-sided p among up to {n_controls} random ablations."
    notes = [
        "change: paired by prompt, 95 % interval clustered by topic, else by prompt.",
        "p: signs of clusters flipped; Holm: over a metric's sets.",
        ranks,
        "detects: the smallest mean change that 80 % of such designs find.",
    ]
    return "\n".join([*text, "", *notes])


def _row(line: Line) -> str:
    is_share = line.unit.startswith(SHARE)

    def number(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if is_share else f"{value:{sign}.3f}"

    def interval(shown: Interval, sign: str = "") -> str:
        return f"{number(shown.mean, sign)} [{number(shown.low, sign)}, {number(shown.high, sign)}]"

    rank = f"{line.rank:.2f}" if line.rank is not None else "-"
    detects = number(line.detectable) if line.detectable is not None else "-"
    missing = f" ({line.n_missing} without a verdict)" if line.n_missing else ""
    return (
        f"  {line.on:<22}{line.n:>5} {interval(line.before):>22} {interval(line.after):>22} "
        f"{interval(line.change, '+'):>26} {p_text(line.p):>6} {p_text(line.p_holm):>6} {rank:>6} {detects:>8}{missing}"
    )


def p_text(p: float) -> str:
    """Three decimals, or one digit and the power of ten: no p-value is 0."""
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"
