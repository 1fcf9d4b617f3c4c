"""Pictures of arms, estimators and selections, and the marks that several pictures share."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dean_interp.report.look import EDIT, FAINT, Look, with_looks
from dean_interp.report.pictures import Picture, interval_cells, range_of, styled
from dean_interp.statistics import Interval

Curve = Sequence[tuple[float, Interval]]
"""Changes with their intervals along what grows."""
Range = tuple[float, float, float]
"""Middle, low and high."""


def errors_of(intervals: Sequence[Interval]) -> list[list[float]]:
    """How far intervals reach below and above their means, as matplotlib takes it.

    A percentile interval need not hold its mean: it then reaches no way to that side.
    """
    below, above = [], []
    for interval in intervals:
        below.append(max(0.0, interval.mean - interval.low))
        above.append(max(0.0, interval.high - interval.mean))
    return [below, above]


def panels_in_a_row(n_panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Axes side by side, on one scale; width is that of a panel, in inches."""
    size = (width * n_panels, height)
    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, n_panels, sharey=True, squeeze=False)[0]
    return figure, list(row)


def label_layers(axes: Axes) -> None:
    """The lower axis counts layers, in whole numbers."""
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_line(axes: Axes, x: Sequence[float | int], y: Sequence[float], look: Look, label: str) -> None:
    """One series with a mark at each point."""
    axes.plot(
        x,
        y,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dash,
        label=label,
    )


def whiskers(axes: Axes, ranges: Mapping[str, Range], colours: Sequence[str], label: str) -> None:
    """One named row for each range, with a mark at its middle."""
    for y, colour in enumerate(colours):
        middle, low, high = list(ranges.values())[y]
        # A rare overlap has a mean above 0, and yet the middle 95 % of its draws are 0.
        error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axes.errorbar(middle, y, xerr=error, fmt="D", color=colour)
    axes.set_yticks(range(len(ranges)), list(ranges))
    axes.set_ylim(-0.6, len(ranges) - 0.4)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def estimates_beside_truth(estimates: Mapping[str, Range], truths: Mapping[str, float], *, n: str) -> Picture:
    """Estimates with their ranges beside the true values, in nats.

    Args:
        estimates: by name.
        truths: by the same names.
        n: what the estimates stand on, in words.
    """
    rows = []
    for name, (middle, low, high) in estimates.items():
        rows.append(
            {
                "case": name,
                "true_nats": truths[name],
                "mean_nats": middle,
                "low_nats": low,
                "high_nats": high,
            }
        )
    true_values = [truths[name] for name in estimates]
    height = 0.9 + 0.32 * len(estimates)
    with styled():
        figure = Figure(figsize=(8.4, height), layout="constrained")
        axes = figure.subplots()
        colours = [EDIT] * len(estimates)
        whiskers(axes, estimates, colours, "mutual information (nats)")
        places = range(len(estimates))
        axes.plot(true_values, places, "|", color="black", markersize=18)
    caption = "Diamonds: means of the draws, with their middle 95 %. Upright strokes: the truth."
    return Picture(figure, pd.DataFrame(rows), n, caption)


def power_by_prompts(curves: Mapping[str, Sequence[float]], n_prompts: Sequence[int], *, n_trials: int) -> Picture:
    """How often a fall would be found, one line an effect, by the number of prompts.

    Args:
        curves: the share of studies that find it, one a number of prompts, by the effect.
        n_prompts: numbers of prompts.
        n_trials: how many studies were simulated for each point.
    """
    rows = []
    for name, rates in curves.items():
        for n, rate in zip(n_prompts, rates, strict=True):
            rows.append(
                {
                    "fall": name,
                    "n_prompts": n,
                    "share_of_studies_that_find_it": rate,
                }
            )
    with styled():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, rates, look in with_looks(curves):
            draw_line(axes, n_prompts, rates, look, name)
        axes.axhline(0.8, color=FAINT, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(n_prompts, [str(n) for n in n_prompts])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("test prompts")
        axes.set_ylabel("share of studies that find the fall")
        axes.legend(loc="lower right")
    return Picture(
        figure,
        data=pd.DataFrame(rows),
        n=f"{n_trials} simulated studies a point",
        caption="The grey line marks 80 %.",
    )


def changes_along(panels: Mapping[str, Mapping[str, Curve]], x_label: str, *, by_doubling: bool = False) -> Picture:
    """One panel a behaviour, one line an arm: changes of margins and their 95 % bands along what grows.

    Args:
        panels: the curves of each panel by name.
        x_label: what grows: steps, examples.
        by_doubling: whether equal steps of the axis are doublings, with a tick at each point.
    """
    with styled():
        figure, columns = panels_in_a_row(len(panels), width=4.6, height=4.4)
        for axes, (title, curves) in zip(columns, panels.items(), strict=True):
            axes.axhline(0, color=FAINT, linewidth=1)
            _draw_curves(axes, curves)
            axes.set_title(title)
            axes.set_xlabel(x_label)
            if by_doubling:
                _mark_doublings(axes, curves)
        columns[0].set_ylabel("change of the margin\n(nats per token)")
        handles, labels = columns[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    x_name = x_label.replace(" ", "_")
    rows = []
    n_clusters: dict[str, list[int]] = {}
    for title, curves in panels.items():
        for name, points in curves.items():
            for place, change in points:
                row = {
                    "panel": title,
                    "arm": name,
                    x_name: place,
                }
                rows.append(row | interval_cells(change))
                n_clusters.setdefault(title, []).append(change.n_clusters)
    return Picture(
        figure,
        data=pd.DataFrame(rows),
        n=_n_by_panel(n_clusters, "clusters"),
        caption="Marks: means. Bands: 95 % intervals.",
    )


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for name, points, look in with_looks(curves):
        x = [place for place, _ in points]
        changes = [change for _, change in points]
        means = [change.mean for change in changes]
        draw_line(axes, x, means, look, name)
        low = [change.low for change in changes]
        high = [change.high for change in changes]
        axes.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)


def _mark_doublings(axes: Axes, curves: Mapping[str, Curve]) -> None:
    places: set[float] = set()
    for points in curves.values():
        places.update(place for place, _ in points)
    ticks = sorted(places)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def changes_by_arm(
    panels: Mapping[str, Mapping[str, Interval]],
    x_label: str,
    *,
    counted: str = "clusters",
    bars: str = "95 % intervals",
) -> Picture:
    """One panel a behaviour, one row an arm: the change with its interval, nats per token.

    Args:
        panels: the change of every arm by name, for each panel.
        x_label: what changed, with its unit.
        counted: what `n_clusters` of the intervals counts: clusters of prompts, or splits.
        bars: what the intervals are.
    """
    arms: list[str] = []
    for changes in panels.values():
        arms += [arm for arm in changes if arm not in arms]
    # The names of the arms stand beside the first panel alone.
    width = 4.2 + 1.5 / len(panels)
    height = 1.2 + 0.32 * len(arms)
    rows = []
    n_clusters: dict[str, list[int]] = {}
    with styled():
        figure, columns = panels_in_a_row(len(panels), width=width, height=height)
        for axes, (title, changes) in zip(columns, panels.items(), strict=True):
            axes.axvline(0, color=FAINT, linewidth=1)
            for arm, change in changes.items():
                y = arms.index(arm)
                error = errors_of([change])
                axes.errorbar(change.mean, y, xerr=error, fmt="D", color=EDIT)
                row = {"panel": title, "arm": arm}
                rows.append(row | interval_cells(change, counted))
                n_clusters.setdefault(title, []).append(change.n_clusters)
            axes.set_yticks(range(len(arms)), arms)
            axes.set_title(title)
            axes.set_xlabel(x_label)
        columns[0].invert_yaxis()
    return Picture(
        figure,
        data=pd.DataFrame(rows),
        n=_n_by_panel(n_clusters, counted),
        caption=f"Diamonds: means. Bars: {bars}.",
    )


def _n_by_panel(n_clusters: Mapping[str, Sequence[int]], counted: str) -> str:
    counts = []
    for title, numbers in n_clusters.items():
        n = range_of(numbers)
        counts.append(f"{n} {counted} ({title})")
    return ", ".join(counts)


def shares_by_layer(panels: Mapping[str, Mapping[str, Sequence[float]]], *, n: str) -> Picture:
    """One panel a kind of unit: each set's share of every layer's units, in percent.

    Args:
        panels: the shares of each layer, the first one first, by set.
        n: how many units the sets hold, in words.
    """
    rows = []
    width = 5.2 * len(panels)
    with styled():
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (unit, sets) in zip(columns, panels.items(), strict=True):
            for name, shares, look in with_looks(sets):
                percents = [100 * share for share in shares]
                draw_line(axes, range(len(percents)), percents, look, name)
                for layer, percent in enumerate(percents):
                    rows.append(
                        {
                            "unit": unit,
                            "set": name,
                            "layer": layer,
                            "share_percent": percent,
                        }
                    )
            axes.set_title(f"{unit}s")
            label_layers(axes)
        columns[0].set_ylabel("% of the layer's units")
        columns[0].legend()
    caption = "A mark a layer, the first layer at the left."
    return Picture(figure, pd.DataFrame(rows), n, caption)
