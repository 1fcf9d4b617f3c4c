"""The picture of a comparison of arms: damage against the smaller rise."""

import math
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dean_interp.arms.frontier import Frontier, FrontierArm
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.report.figures import draw_line, errors_of
from dean_interp.report.look import FAINT, GREY, Look, with_looks
from dean_interp.report.pictures import Picture, interval_cells, n_of_lines, range_of, styled

_CAPTION = (
    "A panel a kind of arms; bars: 95 % intervals. The band is the range of the smaller rise under flipped labels at "
    "the KL where settings are chosen; grey lines are random arms."
)

_ROOM_FOR_LEGENDS = 0.25
"""Share of the height above what is drawn."""


def damage_and_rise(frontier: Frontier) -> Picture:
    """One panel a kind of arms: KL on general text against the smaller of both rises, with intervals.

    In every panel the band is what nulls of flipped labels reach at the KL where settings are chosen, and the grey
    lines are random arms.
    """
    by_kind: dict[str, dict[str, FrontierArm]] = {}
    for arm in frontier.arms:
        if arm.points and arm.record.kind != "random":
            of_kind = by_kind.setdefault(arm.record.kind, {})
            of_kind[arm.name] = arm
    with styled():
        figure, panels = _panels(max(1, len(by_kind)))
        for axes, (kind, arms) in zip(panels, by_kind.items(), strict=False):
            _draw_background(axes, frontier)
            for _, arm, look in with_looks(arms):
                _draw_arm(axes, arm, look)
            axes.set_title(kind)
            axes.legend(fontsize=8, loc="upper left")
        # Legends stand above what is drawn, on the scale that all panels share.
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high + _ROOM_FOR_LEGENDS * (high - low))
    return Picture(figure, _data(frontier), _n(frontier), _CAPTION)


def _panels(n: int) -> tuple[Figure, list[Axes]]:
    """Axes on one scale, up to three side by side."""
    n_columns = min(3, n)
    n_rows = math.ceil(n / n_columns)
    width = 4.2 * n_columns
    height = 0.4 + 3.6 * n_rows
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("smaller rise (nats per token)")
    panels = list(grid.flat)
    # The last of each column, below which there may be an empty place.
    for axes in panels[n - n_columns : n]:
        axes.set_xlabel("KL on general text (nats per token)")
        axes.tick_params(labelbottom=True)
    for axes in panels[n:]:
        axes.set_visible(False)
    return figure, panels[:n]


def _draw_background(axes: Axes, frontier: Frontier) -> None:
    """The line of no rise, random arms, and the band of the nulls."""
    axes.axhline(0, color=FAINT, linewidth=1)
    nulls: list[float] = []
    for arm in frontier.arms:
        nulls += _smaller_of_nulls(arm)
        if arm.record.kind == "random" and arm.points:
            kls, rises = _path(arm)
            axes.plot(kls, rises, color=GREY, linewidth=0.8, zorder=1)
    if nulls:
        axes.axhspan(min(nulls), max(nulls), color=GREY, alpha=0.2, linewidth=0)


def _smaller_of_nulls(arm: FrontierArm) -> list[float]:
    """The smaller rise under each null of an arm."""
    return [min(rises.values()) for rises in arm.null_rises or ()]


def _path(arm: FrontierArm) -> tuple[list[float], list[float]]:
    """KLs and smaller rises of an arm, from no rise at no KL."""
    kls, rises = [0.0], [0.0]
    for point in sorted(arm.points, key=lambda point: point.kl.mean):
        kls.append(point.kl.mean)
        rises.append(point.smaller.mean)
    return kls, rises


def _draw_arm(axes: Axes, arm: FrontierArm, look: Look) -> None:
    kls = [point.kl.mean for point in arm.points]
    rises = [point.smaller for point in arm.points]
    means = [rise.mean for rise in rises]
    axes.errorbar(
        kls,
        means,
        yerr=errors_of(rises),
        fmt=look.marker,
        color=look.colour,
        capsize=0,
    )
    # A prompt has one dose, and no path that leads to it.
    dash = ""
    if arm.area is not None:
        dash = look.dash
        axes.plot(*_path(arm), color=look.colour, linewidth=1, linestyle=dash)
    draw_line(axes, [], [], replace(look, dash=dash), arm.name)


def _data(frontier: Frontier) -> pd.DataFrame:
    """One row an arm and KL, and one row an arm and null."""
    rows = []
    for arm in frontier.arms:
        own = {"arm": arm.name, "kind": arm.record.kind}
        for point in arm.points:
            kl = point.kl.mean
            row = {**own, "what": "smaller rise", "kl_nats_per_token": kl}
            rows.append(row | interval_cells(point.smaller))
        for rise in _smaller_of_nulls(arm):
            null = {"what": "flipped labels", "mean_nats_per_token": rise}
            rows.append(own | null)
    return pd.DataFrame(rows)


def _n(frontier: Frontier) -> str:
    points = [point for arm in frontier.arms for point in arm.points]
    if not points:
        return "0 arms"
    measured = points[0]
    margins = []
    for line in measured.lines:
        if line.metric == MARGIN and line.on in measured.rises:
            margins.append(line)
    n_general = measured.kl.n_clusters
    counts = [n_of_lines(margins), f"{n_general} clusters of general text"]
    n_nulls = [len(arm.null_rises) for arm in frontier.arms if arm.null_rises]
    if n_nulls:
        counts.append(f"{range_of(n_nulls)} nulls of each of {len(n_nulls)} arms")
    return ", ".join(counts)
