"""The pictures of a page as a reader's program finds them: what their captions say, and the data behind their links."""

import csv
import html
import io
import re
from dataclasses import dataclass
from urllib.parse import unquote

LINK = re.compile(
    r'<a class="data" href="data:text/csv;charset=utf-8,([^"]*)" download="(\w+\.csv)"[^>]*>Data \(CSV\)</a>'
)


@dataclass(frozen=True)
class PageFigure:
    """One picture of a page."""

    caption: str
    file: str
    rows: list[dict[str, str]]

    def numbers(self, column: str, **where: str) -> list[float]:
        """A column of the data in the rows that hold these cells."""
        return [float(row[column]) for row in self.rows if all(row[name] == cell for name, cell in where.items())]


def figures_of(page: str) -> list[PageFigure]:
    """Every figure of a page. Fails where a picture is in none, or where one lacks its caption, its n or its data."""
    elements = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    n_pictures = len(re.findall(r'<svg (?:role="img"|id="graph")', page))
    assert len(elements) == n_pictures > 0, "a picture outside of a figure, or a figure without one"
    return [_figure(element) for element in elements]


def _figure(element: str) -> PageFigure:
    (said,) = re.findall(r"<figcaption>(.*?)</figcaption>", element, re.DOTALL)
    (link,) = LINK.findall(said)
    caption = html.unescape(LINK.sub("", said)).strip()
    assert re.search(r"\bn: .*\d", caption), f"no n in {caption!r}"
    assert "<" not in LINK.sub("", said), "nothing but text and the link"
    rows = list(csv.DictReader(io.StringIO(unquote(html.unescape(link[0])))))
    assert rows, f"no data behind {caption!r}"
    return PageFigure(caption, link[1], rows)
