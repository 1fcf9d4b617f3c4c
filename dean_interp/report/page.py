"""What all pages share: the frame in a notebook, the file, the template with its style, and how numbers are written."""

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from dean_interp.evaluation.line_table import p_text
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import SHARE
from dean_interp.files import write_text
from dean_interp.report.look import css_variables
from dean_interp.statistics import Interval, interval_digits

INTERVALS = "Intervals: 95 %, paired by prompt, clustered by topic, and by prompt where there is no topic."
"""The one sentence about intervals, the same on every page: `{{ intervals }}` in a template."""

_HYPHEN = re.compile(r"(?<![\w.\-])-(?=\.?\d)|(?<=\de)-(?=\d)")
"""A hyphen that stands for a minus: before a number, or in a power of ten."""


class Page:
    """A page that a notebook shows in a frame of its own, and that can be kept as a file."""

    frame_rem = 40
    """Height of the frame."""

    def html(self) -> str:
        """The page: nothing in it is loaded from a network."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, its folder too; return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.html())
        return path

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.frame_rem}rem;border:0"
        return f'<iframe srcdoc="{html.escape(self.html())}" style="{style}"></iframe>'


def rendered(template: str, **values: object) -> str:
    """A page from its template, with the style of all pages."""
    return rendered_from("dean_interp.report", template, values)


def rendered_from(folder: str, template: str, values: Mapping[str, object]) -> str:
    """A page from a template of another room, with the style of all pages.

    Args:
        folder: the package that holds the template.
        template: the name of its file, which extends `page.html.j2`.
        values: what the template writes.
    """

    def text_of(name: str) -> str:
        if name != template:
            return _text(name)
        return (files(folder) / name).read_text(encoding="utf-8")

    environment = _environment(text_of, autoescape=True)
    style = css_variables() + "\n" + _text("style.css")
    page = environment.get_template(template)
    return page.render(style=style, sorting=_text("sort.js"), **values)


def rendered_markdown(template: str, **values: object) -> str:
    """A text in Markdown from its template. What is put in stays in its line and in its cell of a table."""
    environment = _environment(_text, finalize=_one_cell)
    return environment.get_template(template).render(**values)


def _one_cell(value: object) -> str:
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def _environment(
    text_of: Callable[[str], str], *, autoescape: bool = False, finalize: Callable[[object], str] | None = None
) -> Environment:
    environment = Environment(
        loader=FunctionLoader(text_of),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["intervals"] = INTERVALS
    environment.filters |= {
        "tiny": two_digits,
        "power": power,
        "signed": signed,
        "number": number,
        "decimals": decimals,
        "interval": interval,
        "shared_digits": shared_digits,
        "row_digits": row_digits,
        "minus": minus,
        "p": p_value,
        "percent": percent,
        "percent_of": percent_of,
        "before": before,
        "after": after,
        "change": change,
        "detectable": detectable,
        "rank": rank,
        "visible": visible,
    }
    return environment


def _text(name: str) -> str:
    return (files("dean_interp.report") / name).read_text(encoding="utf-8")


def number(value: float, digits: int | None = None) -> str:
    """A number to three decimals, to five where it is small, or to so many."""
    if digits is None:
        digits = 5 if 0 < abs(value) < 0.01 else 3
    return minus(_without_sign_at_zero(f"{value:.{digits}f}"))


def two_digits(value: float) -> str:
    """A number to two significant digits, however small."""
    return minus(f"{value:.2g}")


def power(value: float, signed: bool = False) -> str:
    """A number to three significant digits with its power of ten, with a plus where its sign counts."""
    return minus(f"{value:+.2e}" if signed else f"{value:.2e}")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, to three decimals or to so many; 0 has no sign."""
    return minus(_without_sign_at_zero(f"{value:+.{digits}f}"))


def decimals(values: Iterable[float | None]) -> int:
    """The decimals of a column of numbers: at least three, and so many that the largest has two digits."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 3
    return max(3, 1 - math.floor(math.log10(max(sizes))))


@dataclass(frozen=True)
class MeanAndRange:
    """The mean of several changes, with the lowest and the highest."""

    mean: float
    low: float
    high: float

    @property
    def digits(self) -> int:
        """The decimals with which it is written."""
        return interval_digits(self.low, self.high)


def mean_and_range(values: Sequence[float]) -> MeanAndRange:
    """The mean of several numbers, with the lowest and the highest."""
    return MeanAndRange(sum(values) / len(values), min(values), max(values))


def interval(values: Interval | MeanAndRange, digits: int | None = None) -> str:
    """A mean with its interval, or with its range where that is more than one value."""
    digits = digits or values.digits
    mean = signed(values.mean, digits)
    if isinstance(values, MeanAndRange) and values.low == values.high:
        return mean
    return f"{mean} [{signed(values.low, digits)}, {signed(values.high, digits)}]"


def shared_digits(values: Iterable[Interval | MeanAndRange]) -> int:
    """The decimals of a column of intervals: between those of small and of large ones where it holds both."""
    each = {one.digits for one in values}
    return round(sum(each) / len(each)) if each else 3


def row_digits(rows: Iterable[Mapping[str, Interval | MeanAndRange]]) -> int:
    """The decimals of a table's changes: each row has them by the heading of their column."""
    return shared_digits(change for row in rows for change in row.values())


def p_value(value: float) -> str:
    """Two decimals; more below 0.1."""
    return minus(p_text(value)) if value < 0.1 else f"{value:.2f}"


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def percent_in_two_digits(share: float) -> str:
    """A share in percent: a small one with two significant digits, however small."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{two_digits(100 * share)} %"


def percent_of(fraction: float) -> str:
    """A top fraction in percent, with all its digits."""
    return f"{100 * fraction:g} %"


def before(line: Line, digits: int | None = None) -> str:
    """The line's mean in the original: shares in percent."""
    return _level(line, line.before.mean, digits)


def after(line: Line, digits: int | None = None) -> str:
    """The line's mean in the changed state: shares in percent."""
    return _level(line, line.after.mean, digits)


def change(line: Line, digits: int | None = None) -> str:
    """The line's change with its interval: shares in points."""
    if not is_share(line):
        return interval(line.change, digits)
    mean = 100 * line.change.mean
    low = 100 * line.change.low
    high = 100 * line.change.high
    return f"{signed(mean, 0)} [{signed(low, 0)}, {signed(high, 0)}]"


def detectable(line: Line, digits: int | None = None) -> str:
    """The smallest change that the design can detect: of shares in points. Empty where it is not known.

    No share changes by more than 100 points: above that, the design has too few prompts to detect any change.
    """
    if line.detectable is None:
        return ""
    if is_share(line):
        return f"{100 * line.detectable:.0f}" if line.detectable <= 1 else "> 100"
    return number(line.detectable, digits)


def rank(line: Line) -> str:
    """The p that the line's rank gives, and the number of random controls. Empty where there is none."""
    if line.rank is None:
        return ""
    return f"{p_value(line.rank)} ({len(line.control_changes)})"


def visible(token: str) -> str:
    """A token without the space around it; one of white space is shown by its escape."""
    return token.strip() or repr(token).strip("'")


def is_share(line: Line) -> bool:
    """Whether the line is about a share of prompts, which is written in percent."""
    return line.unit.startswith(SHARE)


def minus(text: str) -> str:
    """A text whose numbers below 0 have a minus, and no hyphen. Hyphens between words stay."""
    return _HYPHEN.sub("−", text)


def _level(line: Line, value: float, digits: int | None) -> str:
    return percent(value) if is_share(line) else number(value, digits)


def _without_sign_at_zero(text: str) -> str:
    return text if text.strip("+-0.") else text.lstrip("+-")
