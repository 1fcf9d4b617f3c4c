"""Figures of an improvement: the edit beside its nulls, and margins and KL by dose."""

from matplotlib.figure import Figure

from dean_interp.report.figures import BLUE, EDIT, GREEN, GREY, PINK, styled
from dean_interp.report.study_figures import mark_edit, mark_states, plane_of_changes
from dean_interp.statistics import Interval
from dean_interp.study.choosing import FLIP, RANDOM_GATES
from dean_interp.study.improvement import Improvement
from dean_interp.study.paper_rule import PAPER

_NONE = Interval(mean=0.0, low=0.0, high=0.0, n_clusters=0)
"""No change."""


def effect_against_nulls(improvement: Improvement) -> Figure:
    """Change of both margins on confirming prompts: the edit with its intervals, its opposite and every null."""
    behaviours = improvement.behaviours
    marks = {
        FLIP: (GREY, "o", "gates of flipped labels"),
        RANDOM_GATES: (BLUE, "s", "random gates"),
        "opposite": (GREEN, "v", "the opposite edit"),
        PAPER: (PINK, "^", "the paper's rule"),
    }
    with styled():
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = plane_of_changes(figure, *behaviours)
        for kind, (colour, marker, label) in marks.items():
            states = improvement.of_kind(kind)
            if states:
                mark_states(axes, states, behaviours, colour=colour, marker=marker, label=label)
        mark_edit(axes, improvement.edit, behaviours, label="the edit (95 %)")
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def margins_and_kl_by_dose(improvement: Improvement) -> Figure:
    """Change of both margins with its intervals, and KL below, by dose, on the prompts that chose the dose."""
    points = {point.dose: point for point in improvement.curve}
    # At dose 0 nothing changes, by definition.
    doses = sorted({0.0, *points})
    kl = [points[dose].kl if dose in points else 0.0 for dose in doses]
    marks = ((EDIT, "D-"), (BLUE, "s--"))
    with styled():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.axhline(0, color="0.8", linewidth=1)
        for name, (colour, style) in zip(improvement.behaviours, marks, strict=True):
            changes = [points[dose].change[name] if dose in points else _NONE for dose in doses]
            means = [change.mean for change in changes]
            below_mean = [change.mean - change.low for change in changes]
            above_mean = [change.high - change.mean for change in changes]
            error = [below_mean, above_mean]
            above.errorbar(doses, means, yerr=error, fmt=style, color=colour, markersize=4, capsize=3, label=name)
        above.set_ylabel("change of the margin\n(nats per token)")
        above.legend(frameon=False, fontsize=9)
        below.plot(doses, kl, "o-", color="0.35", markersize=4)
        below.axhline(improvement.config.max_kl, color="0.6", linewidth=1, linestyle="--", label="budget")
        below.set_ylabel("KL on general text\n(nats per token)")
        below.set_xlabel("dose (1: the edit, 0: the original, −1: the opposite)")
        below.legend(frameon=False, fontsize=9)
    return figure
