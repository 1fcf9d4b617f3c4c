"""The picture of a sweep: every edit's change of both margins, and of ability."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from dean_interp.models.sites import Unit
from dean_interp.report.figures import errors_of
from dean_interp.report.look import FAINT
from dean_interp.report.pictures import Picture, interval_cells, n_of_lines, styled
from dean_interp.study.pareto import ABILITY
from dean_interp.study.sweep import Point, Sweep, margins_of, objectives

_UNIT_MARKERS: dict[Unit, str] = {"neuron": "o", "weight": "s"}
_CAPTION = (
    "A mark an edit; the lighter, the more ability. Edits on the front have a border, a name and 95 % intervals. Up "
    "and to the right is safer."
)


def sweep_plane(sweep: Sweep) -> Picture:
    """Every edit's change of both margins on the confirming half; shade is ability. The front has its intervals."""
    first, second, _ = sweep.objectives
    costs = [objectives(point.confirmed_on)[ABILITY].mean for point in sweep.points]
    limits = (min(*costs, -1e-6), max(*costs, 0.0))
    with styled():
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=FAINT, linewidth=1)
        axes.axvline(0, color=FAINT, linewidth=1)
        drawn = None
        for unit, marker in _UNIT_MARKERS.items():
            points = [point for point in sweep.points if point.unit == unit]
            if points:
                _draw_front(axes, [point for point in points if point.on_front])
                drawn = _scatter(axes, points, marker, limits)
        if drawn is not None:
            figure.colorbar(drawn, ax=axes, label="ability: minus the change of the general loss\n(nats per token)")
        axes.set_xlabel(f"change of the {first} margin on the confirming half (nats per token)")
        axes.set_ylabel(f"change of the {second} margin\non the confirming half (nats per token)")
        axes.legend()
    margins = margins_of(sweep.points[0].confirmed_on)
    n = f"{n_of_lines(margins)}; {len(sweep.points)} edits"
    return Picture(figure, _data(sweep), n, _CAPTION)


def _draw_front(axes: Axes, points: Sequence[Point]) -> None:
    """The intervals and the names of the edits on the front."""
    for point in points:
        across, along, _ = objectives(point.confirmed_on).values()
        place = (across.mean, along.mean)
        axes.errorbar(
            *place,
            xerr=errors_of([across]),
            yerr=errors_of([along]),
            color="0.6",
            linewidth=1,
            zorder=1,
        )
        name = f"{point.method} {point.fraction:g} x{point.value}"
        axes.annotate(name, place, (6, 5), textcoords="offset points", fontsize=9)


def _scatter(axes: Axes, points: Sequence[Point], marker: str, limits: tuple[float, float]) -> PathCollection:
    """The edits of one kind of unit; those on the front have a border."""
    x, y, ability, borders = [], [], [], []
    for point in points:
        across, along, cost = objectives(point.confirmed_on).values()
        x.append(across.mean)
        y.append(along.mean)
        ability.append(cost.mean)
        borders.append("black" if point.on_front else "none")
    return axes.scatter(
        x,
        y,
        c=ability,
        marker=marker,
        # Its shades also differ in grey.
        cmap="viridis",
        vmin=limits[0],
        vmax=limits[1],
        zorder=2,
        label=f"{points[0].unit}s",
        edgecolors=borders,
    )


def _data(sweep: Sweep) -> pd.DataFrame:
    rows = []
    for point in sweep.points:
        for name, change in objectives(point.confirmed_on).items():
            row = {
                "edit": point.name,
                "unit": point.unit,
                "is_on_front": point.on_front,
                "objective": name,
            }
            rows.append(row | interval_cells(change))
    return pd.DataFrame(rows)
