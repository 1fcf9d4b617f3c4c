"""The page of a comparison of arms: its table, damage against the smaller rise, and everything that was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dean_interp.arms.arm import in_words
from dean_interp.arms.frontier import Frontier, FrontierArm, FrontierPoint
from dean_interp.evaluation.lines import p_text
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.files import write_text
from dean_interp.report.figures import GREY, LINES, error_of, styled, to_svg
from dean_interp.report.page import rendered
from dean_interp.report.tables import metric_tables
from dean_interp.statistics import Interval
from dean_interp.study.results import save_record

COLUMNS = ("arm", "KL", "{first}", "{second}", "both rise")
MORE_COLUMNS = ("area", "p (Holm)", "p (nulls)", "size", "minutes")
_MARKS = "osD^vP*"
FIGURE = "Damage against the smaller rise"


@dataclass(frozen=True)
class FrontierPage:
    """Where the page is, and its table as text."""

    path: Path
    table: str
    """In Markdown."""


def write_frontier(frontier: Frontier, folder: Path, facts: Mapping[str, str]) -> FrontierPage:
    """Write `results.json`, `table.md`, `report.html` and the figure into the folder."""
    save_record(frontier, folder / "results.json")
    frontier.to_pandas().to_csv(folder / "points.csv", index=False)
    head, rows = table_of(frontier)
    table = _markdown(head, rows)
    write_text(folder / "table.md", table + "\n")
    figure = to_svg(damage_and_rise(frontier), FIGURE)
    write_text(folder / "frontier.svg", figure)
    at_kl = {}
    for arm in frontier.arms:
        point = arm.point(frontier.chosen_at)
        if point is not None:
            at_kl[arm.name] = point.lines
    page = rendered(
        "frontier.html.j2",
        frontier=frontier,
        head=head,
        rows=rows,
        title=FIGURE,
        figure=figure,
        tables=metric_tables(at_kl),
        further=metric_tables({arm.name: arm.further for arm in frontier.arms if arm.further}),
        choices={arm.name: _choice(arm) for arm in frontier.arms},
        facts=facts,
    )
    path = folder / "report.html"
    write_text(path, page)
    return FrontierPage(path, table)


def table_of(frontier: Frontier) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table at the KL where settings are chosen."""
    first, second = frontier.behaviours
    points = {arm.name: arm.point(frontier.chosen_at) for arm in frontier.arms}
    # Sets that an edit shall leave alone, such as the register set.
    beside = list(dict.fromkeys(name for point in points.values() if point for name in _beside(point)))
    head = [*(column.format(first=first, second=second) for column in COLUMNS), *beside, *MORE_COLUMNS]
    rows = []
    for arm in frontier.arms:
        point = points[arm.name]
        row = [arm.name, "left out", *[""] * (len(head) - 2)] if point is None else _row(arm, point, beside)
        rows.append(row)
    return head, rows


def _beside(point: FrontierPoint) -> dict[str, str]:
    """The changes of margins that are no behaviour's, by set."""
    lines = [line for line in point.lines if line.metric == MARGIN and line.on not in point.rises]
    return {line.on: str(line.change) for line in lines}


def _row(arm: FrontierArm, point: FrontierPoint, beside: Sequence[str]) -> list[str]:
    nulls = "-"
    if arm.null_p is not None and arm.null_rises:
        nulls = f"{arm.null_p:.2f} of {len(arm.null_rises)}"
    return [
        arm.name,
        f"{point.kl.mean:.3f}",
        *map(str, point.rises.values()),
        "yes" if point.raises_both else "no",
        *(_beside(point).get(name, "-") for name in beside),
        "-" if arm.area is None else str(arm.area),
        "-" if arm.p_holm is None else p_text(arm.p_holm),
        nulls,
        _size(arm.record.n_bytes),
        f"{arm.record.seconds / 60:.1f}",
    ]


def _size(n_bytes: int) -> str:
    """In bytes, kilobytes or megabytes."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    return f"{n_bytes / 1e3:.0f} kB" if n_bytes < 1e6 else f"{n_bytes / 1e6:.1f} MB"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _choice(arm: FrontierArm) -> str:
    """What was chosen, from what, or why the arm was left out."""
    record = arm.record
    if record.left_out:
        return f"left out: {record.left_out}"
    if not record.settings:
        return "nothing to choose"
    values = []
    for trial in record.trials:
        worth = "no edit" if trial.value is None else f"{trial.value:+.3f}"
        values.append(f"{in_words(trial.settings)}: {worth}")
    return f"{in_words(record.settings)} (smaller rise on choosing prompts: {'; '.join(values)})"


def damage_and_rise(frontier: Frontier) -> Figure:
    """One panel a kind of arms: KL on general text against the smaller of both rises, with intervals.

    In every panel the band is what nulls of flipped labels reach at the KL where settings are chosen, and the grey
    lines are random arms.
    """
    kinds = list(dict.fromkeys(arm.record.kind for arm in frontier.arms if arm.points and arm.record.kind != "random"))
    n_columns = min(3, max(1, len(kinds)))
    n_rows = max(1, math.ceil(len(kinds) / n_columns))
    with styled():
        figure = Figure(figsize=(4.0 * n_columns, 0.4 + 3.3 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for axes, kind in zip(panels, kinds, strict=False):
            _draw_background(axes, frontier)
            arms = [arm for arm in frontier.arms if arm.record.kind == kind and arm.points]
            for number, arm in enumerate(arms):
                _draw_arm(axes, arm, LINES[number % len(LINES)], _MARKS[number % len(_MARKS)])
            axes.set_title(kind, fontsize=10)
            axes.legend(frameon=False, fontsize=7, loc="best")
        for axes in panels[len(kinds) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("KL on general text (nats per token)")
        for axes in grid[:, 0]:
            axes.set_ylabel("smaller rise (nats per token)")
    return figure


def _draw_background(axes: Axes, frontier: Frontier) -> None:
    axes.axhline(0, color="0.8", linewidth=1)
    smaller = []
    for arm in frontier.arms:
        for rises in arm.null_rises or ():
            smaller.append(min(rises.values()))
        if arm.record.kind == "random" and arm.points:
            kls = [0.0, *(point.kl.mean for point in arm.points)]
            axes.plot(kls, [0.0, *(point.smaller.mean for point in arm.points)], color=GREY, linewidth=0.8, zorder=1)
    if smaller:
        axes.axhspan(min(smaller), max(smaller), color=GREY, alpha=0.2, linewidth=0)


def _draw_arm(axes: Axes, arm: FrontierArm, colour: str, mark: str) -> None:
    points = sorted(arm.points, key=lambda point: point.kl.mean)
    kls = [point.kl.mean for point in points]
    means = [point.smaller.mean for point in points]
    has_path = arm.area is not None
    if has_path:
        axes.plot([0.0, *kls], [0.0, *means], color=colour, linewidth=1)
    for kl, point in zip(kls, points, strict=True):
        axes.errorbar(kl, point.smaller.mean, yerr=_upright(point.smaller), fmt=mark, color=colour, markersize=4)
    axes.plot([], [], color=colour, marker=mark, markersize=4, linestyle="-" if has_path else "", label=arm.name)


def _upright(interval: Interval) -> list[list[float]]:
    return [[max(0.0, part) for part in side] for side in error_of(interval)]
