"""Pictures of an improvement: the edit beside its nulls, and margins and KL by dose."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dean_interp.report.figures import draw_line, errors_of
from dean_interp.report.look import BLUE, EDIT, FAINT, GREEN, GREY, INK, PINK, Look
from dean_interp.report.pictures import Picture, interval_cells, n_of_set, styled
from dean_interp.report.study_figures import (
    EFFECT_CAPTION,
    changes_of_states,
    mark_edit,
    mark_states,
    n_of_margins,
    plane_of_changes,
)
from dean_interp.statistics import Interval
from dean_interp.study.choosing import FLIP, RANDOM_GATES
from dean_interp.study.improvement import CurvePoint, Improvement
from dean_interp.study.paper_rule import PAPER

_NONE = Interval(mean=0.0, low=0.0, high=0.0, n_clusters=0)
"""No change."""
_NULL_LOOKS = {
    FLIP: (Look(GREY, "o", ""), "gates of flipped labels"),
    RANDOM_GATES: (Look(BLUE, "s", ""), "random gates"),
    "opposite": (Look(GREEN, "v", ""), "the opposite edit"),
    PAPER: (Look(PINK, "^", ""), "the paper's rule"),
}
"""Look and label of each kind of state beside the edit."""
_BEHAVIOUR_LOOKS = (Look(EDIT, "D", "-"), Look(BLUE, "s", "--"))
"""Looks of both behaviours by dose."""


def effect_against_nulls(improvement: Improvement) -> Picture:
    """Change of both margins on confirming prompts: the edit with its intervals, its opposite and every null."""
    behaviours = improvement.behaviours
    shown = [improvement.edit]
    with styled():
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = plane_of_changes(figure, *behaviours)
        for kind, (look, label) in _NULL_LOOKS.items():
            states = improvement.of_kind(kind)
            if states:
                mark_states(axes, states, behaviours, look, label=label)
                shown += states
        mark_edit(axes, improvement.edit, behaviours, label="the edit (95 %)")
        axes.legend(loc="best")
    n_flips = len(improvement.of_kind(FLIP))
    n_random = len(improvement.of_kind(RANDOM_GATES))
    n_prompts = n_of_margins(improvement.edit, behaviours)
    return Picture(
        figure,
        data=changes_of_states(shown, behaviours),
        n=f"{n_prompts}; {n_flips} gates of flipped labels, {n_random} random gates",
        caption=EFFECT_CAPTION,
    )


def margins_and_kl_by_dose(improvement: Improvement) -> Picture:
    """Change of both margins with its intervals, and KL below, by dose, on the prompts that chose the dose."""
    points = _with_the_original(improvement)
    with styled():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.axhline(0, color=FAINT, linewidth=1)
        for name, look in zip(improvement.behaviours, _BEHAVIOUR_LOOKS, strict=True):
            _draw_margin(above, points, name, look)
        above.set_ylabel("change of the margin\n(nats per token)")
        above.legend()
        _draw_kl(below, points, budget=improvement.config.max_kl)
        below.set_ylabel("KL on general text\n(nats per token)")
        below.set_xlabel("dose (1: the edit, 0: the original, −1: the opposite)")
        below.legend()
    counts = []
    for role in improvement.roles:
        counts.append(n_of_set(role.name, role.n_examples["choose"], role.n_topics["choose"]))
    return Picture(
        figure,
        data=_dose_data(points),
        n=", ".join(counts),
        caption="Bars: 95 % intervals. All of it on prompts that choose.",
    )


def _with_the_original(improvement: Improvement) -> list[CurvePoint]:
    """The measured doses in order, with dose 0, at which nothing changes by definition."""
    points = {point.dose: point for point in improvement.curve}
    no_change = dict.fromkeys(improvement.behaviours, _NONE)
    points.setdefault(0.0, CurvePoint(dose=0.0, change=no_change, kl=0.0))
    return sorted(points.values(), key=lambda point: point.dose)


def _draw_margin(axes: Axes, points: Sequence[CurvePoint], behaviour: str, look: Look) -> None:
    doses = [point.dose for point in points]
    changes = [point.change[behaviour] for point in points]
    means = [change.mean for change in changes]
    draw_line(axes, doses, means, look, behaviour)
    axes.errorbar(doses, means, yerr=errors_of(changes), fmt="none", ecolor=look.colour)


def _draw_kl(axes: Axes, points: Sequence[CurvePoint], *, budget: float) -> None:
    doses = [point.dose for point in points]
    kls = [point.kl for point in points]
    draw_line(axes, doses, kls, Look(INK, "o", "-"), "KL")
    axes.axhline(budget, color="0.6", linewidth=1, linestyle="--", label="budget")


def _dose_data(points: Sequence[CurvePoint]) -> pd.DataFrame:
    rows = []
    for point in points:
        for name, change in point.change.items():
            row = {
                "dose": point.dose,
                "kl_nats_per_token": point.kl,
                "behaviour": name,
            }
            rows.append(row | interval_cells(change))
    return pd.DataFrame(rows)
