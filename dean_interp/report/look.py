"""The look of all pictures: colours, markers, dashes and fonts. Pages get the same colours as CSS variables.

The colours are those of Okabe and Ito (2008), which colour-blind readers tell apart. In grey most of them are alike. So
series that stand side by side differ in marker or dash, too (`LOOKS`), and areas in their hatch.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"
PINK, YELLOW, SKY = "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = {
    "orange": ORANGE,
    "blue": BLUE,
    "green": GREEN,
    "grey": GREY,
    "pink": PINK,
    "yellow": YELLOW,
    "sky": SKY,
}
"""Every colour by the name of its CSS variable."""
EDIT = ORANGE
"""The colour of the edit on every figure."""
INK, FAINT = "0.35", "0.8"
"""Greys of lines: what was there before, and what only guides the eye."""
FONT = "system-ui, sans-serif"
"""The font of pages and pictures, as CSS takes it."""
Values = TypeVar("Values")


@dataclass(frozen=True)
class Look:
    """How one of several series is drawn."""

    colour: str
    marker: str
    dash: str


_COLOURS = (ORANGE, BLUE, GREEN, PINK, YELLOW, SKY)
_MARKERS = ("D", "s", "^", "o", "v", "P", "*")
_DASHES = ("-", "--", ":", "-.")


def _different_looks() -> tuple[Look, ...]:
    made = []
    # 7 markers and 4 dashes have no common divisor: a pair comes again after 28 series.
    for number in range(len(_MARKERS) * len(_DASHES)):
        colour = _COLOURS[number % len(_COLOURS)]
        marker = _MARKERS[number % len(_MARKERS)]
        made.append(Look(colour, marker, dash=_DASHES[number % len(_DASHES)]))
    return tuple(made)


LOOKS = _different_looks()
"""Looks of series that stand side by side. No two have both marker and dash in common."""


def with_looks(series: Mapping[str, Values]) -> Iterator[tuple[str, Values, Look]]:
    """Name and values of each series, with the look in which it is drawn."""
    looks = itertools.cycle(LOOKS)
    for name, look in zip(series, looks, strict=False):
        yield name, series[name], look


def css_variables() -> str:
    """The colours as CSS variables: `--orange` is `ORANGE`."""
    variables = "; ".join(f"--{name}: {colour}" for name, colour in PALETTE.items())
    return f":root {{ {variables}; --font: {FONT}; }}"
