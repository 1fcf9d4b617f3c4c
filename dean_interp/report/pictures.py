"""Pictures: a figure, the numbers that it shows, and what they stand on.

On a page a picture is one element: SVG with text, a caption that says n, and a link that saves the numbers as CSV. The
link holds them itself, so a page stays one file that loads nothing. As a file it is an SVG and a CSV of the same name.
"""

import html
import io
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from dean_interp.evaluation.lines import Line
from dean_interp.files import write_text
from dean_interp.report.look import FONT
from dean_interp.statistics import Interval

_STYLE: dict[RcKeyType, object] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 5,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    # Long enough to tell dashes apart.
    "legend.handlelength": 3,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "dean_interp",
    # A "$" in a name is a "$".
    "text.parse_math": False,
}


def styled() -> AbstractContextManager[None]:
    """While open, figures are drawn in the style of the pages."""
    return rc_context(_STYLE)


@dataclass(frozen=True)
class Picture:
    """A figure with its data."""

    figure: Figure
    data: pd.DataFrame
    """The numbers that are drawn, not rounded. Columns are named with their units."""
    n: str
    """How many prompts, clusters, controls or draws the numbers stand on, in words."""
    caption: str
    """What the marks are, in sentences."""


def figure_element(picture: Picture, title: str) -> Markup:
    """The picture as an element of a page. Its title stands first in the caption, and names the file of its data."""
    drawn = Markup(to_svg(picture.figure, title))
    said = figure_caption(picture.data, title=title, caption=picture.caption, n=picture.n)
    return Markup("<figure>{}\n{}</figure>").format(drawn, said)


def figure_caption(data: pd.DataFrame, *, title: str, caption: str, n: str) -> Markup:
    """The caption below a picture: title, what is seen, n, and the link that saves its data."""
    address = f"data:text/csv;charset=utf-8,{quote(csv_of(data))}"
    link = Markup('<a class="data" href="{}" download="{}.csv" aria-label="Data (CSV): {}">Data (CSV)</a>')
    linked = link.format(address, file_stem(title), title)
    return Markup("<figcaption>{}. {} n: {}. {}</figcaption>").format(title, caption, n, linked)


def write_picture(picture: Picture, folder: Path, stem: str, title: str) -> None:
    """Write the picture into a folder: `stem.svg`, and its data as `stem.csv`."""
    write_text(folder / f"{stem}.svg", to_svg(picture.figure, title))
    write_text(folder / f"{stem}.csv", csv_of(picture.data))


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element, with a title for those who hear it read."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    text = buffer.getvalue()
    # matplotlib names the fonts that it measured with; readers see that of the pages.
    text = re.sub(r"""(style="[^"]*)'DejaVu Sans'[^;"]*""", rf"\1{FONT}", text)
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def csv_of(data: pd.DataFrame) -> str:
    """A table as CSV, with all digits of its numbers."""
    return data.to_csv(index=False, lineterminator="\n")


def file_stem(title: str) -> str:
    """A title as the name of a file: `Margins by arm` gives `margins_by_arm`."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60] or "figure"


def interval_cells(interval: Interval, counted: str = "clusters") -> dict[str, float | int]:
    """The cells of a mean with its interval, nats per token, in a row of a picture's data.

    Args:
        interval: the numbers.
        counted: what its `n_clusters` counts.
    """
    return {
        "mean_nats_per_token": interval.mean,
        "low_nats_per_token": interval.low,
        "high_nats_per_token": interval.high,
        f"n_{counted}": interval.n_clusters,
    }


def n_of_lines(lines: Iterable[Line]) -> str:
    """How many prompts and topics lines stand on, by set."""
    counts = {line.on: n_of_set(line.on, line.n, line.n_clusters) for line in lines}
    return ", ".join(counts.values())


def n_of_set(name: str, n_prompts: int, n_clusters: int) -> str:
    """How many prompts of how many topics a set holds, in words. Without topics each prompt is a cluster of its own."""
    prompts = f"{n_prompts} prompts of {name}"
    return prompts if n_clusters == n_prompts else f"{prompts} from {n_clusters} topics"


def range_of(counts: Iterable[int]) -> str:
    """Whole numbers as text: `12` where all are the same, else `12 to 16`."""
    different = sorted(set(counts))
    if len(different) > 1:
        return f"{different[0]} to {different[-1]}"
    return str(different[0]) if different else "0"
