"""The page of a comparison of arms: its table, damage against the smaller rise, and everything that was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.arms.arm import in_words
from dean_interp.arms.frontier import Frontier, FrontierArm, FrontierPoint
from dean_interp.evaluation.line_table import p_text
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.files import write_json, write_text
from dean_interp.report.frontier_figures import damage_and_rise
from dean_interp.report.page import rendered
from dean_interp.report.pictures import figure_element, write_picture
from dean_interp.report.tables import metric_tables
from dean_interp.study.results import RESULTS_FILE

COLUMNS = ("arm", "KL", "{first}", "{second}", "both rise")
MORE_COLUMNS = ("area", "p (Holm)", "p (nulls)", "size", "minutes")
FIGURE = "Damage against the smaller rise"


@dataclass(frozen=True)
class FrontierPage:
    """Where the page is, and its table as text."""

    path: Path
    table: str
    """In Markdown."""


def write_frontier(frontier: Frontier, folder: Path, facts: Mapping[str, str]) -> FrontierPage:
    """Write `results.json`, `table.md`, `points.csv`, `report.html` and the picture (SVG, CSV) into the folder."""
    write_json(folder / RESULTS_FILE, frontier)
    frontier.to_pandas().to_csv(folder / "points.csv", index=False)
    head, rows = table_of(frontier)
    table = _markdown(head, rows)
    write_text(folder / "table.md", table + "\n")
    picture = damage_and_rise(frontier)
    write_picture(picture, folder, "frontier", FIGURE)
    at_kl, further = {}, {}
    for arm in frontier.arms:
        point = arm.point(frontier.chosen_at)
        if point is not None:
            at_kl[arm.name] = point.lines
        if arm.further:
            further[arm.name] = arm.further
    page = rendered(
        "frontier.html.j2",
        frontier=frontier,
        head=head,
        rows=rows,
        figure=figure_element(picture, FIGURE),
        tables=metric_tables(at_kl),
        further=metric_tables(further),
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
    beside: list[str] = []
    for point in points.values():
        if point is not None:
            beside += [name for name in _beside(point) if name not in beside]
    columns = [column.format(first=first, second=second) for column in COLUMNS]
    head = [*columns, *beside, *MORE_COLUMNS]
    rows = []
    for arm in frontier.arms:
        point = points[arm.name]
        if point is None:
            empty = [""] * (len(head) - 2)
            rows.append([arm.name, "left out", *empty])
        else:
            rows.append(_row(arm, point, beside))
    return head, rows


def _beside(point: FrontierPoint) -> dict[str, str]:
    """The changes of margins that are no behaviour's, by set."""
    margins = [line for line in point.lines if line.metric == MARGIN]
    return {line.on: str(line.change) for line in margins if line.on not in point.rises}


def _row(arm: FrontierArm, point: FrontierPoint, beside: Sequence[str]) -> list[str]:
    nulls = "-"
    if arm.null_p is not None and arm.null_rises:
        nulls = f"{arm.null_p:.2f} of {len(arm.null_rises)}"
    return [
        arm.name,
        f"{point.kl.mean:.3f}" + ("" if point.is_reached else " (missed)"),
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
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e6:.1f} MB"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    written = []
    for line in lines:
        cells = " | ".join(line)
        written.append(f"| {cells} |")
    return "\n".join(written)


def _choice(arm: FrontierArm) -> str:
    """What was chosen, from what, or why the arm was left out."""
    record = arm.record
    if record.left_out:
        return f"left out: {record.left_out}"
    if not record.settings:
        return "nothing to choose"
    values = []
    for trial in record.trials:
        settings = in_words(trial.settings)
        worth = "no edit" if trial.value is None else f"{trial.value:+.3f}"
        values.append(f"{settings}: {worth}")
    chosen = in_words(record.settings)
    tried = "; ".join(values)
    return f"{chosen} (smaller rise on choosing prompts: {tried})"
