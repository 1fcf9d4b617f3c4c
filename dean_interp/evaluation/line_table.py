"""The lines of a comparison as a table: for notebooks, and for people."""

from collections.abc import Sequence

import pandas as pd

from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import SHARE
from dean_interp.statistics import Interval

_WIDTHS = {"n": 5, "original": 22, "edit": 22, "change": 26, "p": 6, "Holm": 6, "rank": 6, "detects": 8}


def lines_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One row a line: what was measured on what, before, after, the change with its interval, p, rank."""
    rows = []
    for line in lines:
        row = {
            "metric": line.metric,
            "on": line.on,
            "unit": line.unit,
            "n": line.n,
            "before": line.before.mean,
            "after": line.after.mean,
            "change": line.change.mean,
            "low": line.change.low,
            "high": line.change.high,
            "p": line.p,
            "p_holm": line.p_holm,
            "rank": line.rank,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def lines_table(lines: Sequence[Line]) -> str:
    """The lines for people, one block a metric."""
    head = _in_columns("", list(_WIDTHS))
    text = [head, "-" * len(head)]
    metrics = dict.fromkeys(line.metric for line in lines)
    for number, metric in enumerate(metrics):
        if number > 0:
            text.append("")
        own = [line for line in lines if line.metric == metric]
        text.append(_title(own[0]))
        text += map(_row, own)
    return "\n".join([*text, "", *_notes(lines)])


def _title(line: Line) -> str:
    """What stands above the lines of a metric."""
    better = "" if line.better == "neither" else f", {line.better} is better"
    return f"{line.metric} ({line.unit}{better})"


def _notes(lines: Sequence[Line]) -> list[str]:
    """What the columns mean."""
    n_controls = max((len(line.control_changes) for line in lines), default=0)
    ranks = "rank: no random ablations were measured (for a selection give --scores)."
    if n_controls:
        ranks = f"rank: one-sided p among up to {n_controls} random ablations."
    return [
        "change: paired by prompt, 95 % interval clustered by topic, else by prompt.",
        "p: signs of clusters flipped; Holm: over a metric's sets.",
        ranks,
        "detects: the smallest mean change that 80 % of such designs find (>100 points: too few prompts to find any).",
    ]


def _row(line: Line) -> str:
    is_share = line.unit.startswith(SHARE)

    def number(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if is_share else f"{value:{sign}.3f}"

    def interval(shown: Interval, sign: str = "") -> str:
        mean, low, high = number(shown.mean, sign), number(shown.low, sign), number(shown.high, sign)
        return f"{mean} [{low}, {high}]"

    rank = f"{line.rank:.2f}" if line.rank is not None else "-"
    if line.detectable is None:
        detects = "-"
    else:
        detects = ">100" if is_share and line.detectable > 1 else number(line.detectable)
    missing = f" ({line.n_missing} without a verdict)" if line.n_missing else ""
    cells = [
        str(line.n),
        interval(line.before),
        interval(line.after),
        interval(line.change, "+"),
        p_text(line.p),
        p_text(line.p_holm),
        rank,
        detects,
    ]
    return _in_columns(f"  {line.on}", cells) + missing


def _in_columns(name: str, cells: Sequence[str]) -> str:
    """A row of the table: its name on the left, and each cell on the right of its column."""
    padded = [cell.rjust(width) for cell, width in zip(cells, _WIDTHS.values(), strict=True)]
    return f"{name:<24}{' '.join(padded)}"


def p_text(p: float) -> str:
    """Three decimals, or one digit and the power of ten: no p-value is 0."""
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"
