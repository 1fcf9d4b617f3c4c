"""What all pages share: the frame in a notebook, the file, the template with its style, and how numbers are written."""

import html
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from dean_interp.evaluation.line_table import p_text
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import SHARE
from dean_interp.files import write_text
from dean_interp.report.look import css_variables
from dean_interp.statistics import Interval

INTERVALS = "Intervals: 95 %, paired by prompt, clustered by topic, and by prompt where there is no topic."
"""The one sentence about intervals, the same on every page: `{{ intervals }}` in a template."""


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
        "signed": signed,
        "interval": interval,
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


def number(value: float) -> str:
    """A number to three decimals, to five where it is small."""
    digits = 5 if 0 < abs(value) < 0.01 else 3
    return _with_minus(f"{value:.{digits}f}")


def two_digits(value: float) -> str:
    """A number to two significant digits, however small."""
    return f"{value:.2g}"


def signed(value: float) -> str:
    """A number with its sign, to three decimals."""
    return _with_minus(f"{value:+.3f}")


def interval(values: Interval) -> str:
    """A mean with its interval."""
    return _with_minus(str(values))


def spread(values: Sequence[float]) -> str:
    """The mean of several numbers, with the lowest and the highest."""
    mean = sum(values) / len(values)
    low, high = min(values), max(values)
    return f"{signed(mean)} [{signed(low)}, {signed(high)}]"


def p_value(value: float) -> str:
    """Two decimals; more below 0.1."""
    return p_text(value) if value < 0.1 else f"{value:.2f}"


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def percent_of(fraction: float) -> str:
    """A top fraction in percent, with all its digits."""
    return f"{100 * fraction:g} %"


def before(line: Line) -> str:
    """The line's mean in the original: shares in percent."""
    return _level(line, line.before.mean)


def after(line: Line) -> str:
    """The line's mean in the changed state: shares in percent."""
    return _level(line, line.after.mean)


def change(line: Line) -> str:
    """The line's change with its interval: shares in points."""
    if not is_share(line):
        return interval(line.change)
    mean = 100 * line.change.mean
    low = 100 * line.change.low
    high = 100 * line.change.high
    return _with_minus(f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]")


def detectable(line: Line) -> str:
    """The smallest change that the design can detect: of shares in points. Empty where it is not known."""
    if line.detectable is None:
        return ""
    if is_share(line):
        return f"{100 * line.detectable:.0f}"
    return number(line.detectable)


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


def _level(line: Line, value: float) -> str:
    return percent(value) if is_share(line) else number(value)


def _with_minus(text: str) -> str:
    return text.replace("-", "−")
