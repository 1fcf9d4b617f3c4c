"""Texts in columns of a terminal, wrapped by the cells that letters take there."""

import re
import unicodedata
from itertools import zip_longest

_BETWEEN = " | "


def side_by_side(left: str, right: str, *, titles: tuple[str, str], width: int) -> str:
    """Two texts under their titles in two columns that are `width` cells wide together."""
    column = (width - len(_BETWEEN)) // 2
    on_the_left = [titles[0], "-" * column, *wrapped(left, column)]
    on_the_right = [titles[1], "-" * column, *wrapped(right, column)]
    rows = []
    for line, other in zip_longest(on_the_left, on_the_right, fillvalue=""):
        blanks = " " * (column - n_cells(line))
        rows.append(f"{line}{blanks}{_BETWEEN}{other}".rstrip())
    return "\n".join(rows)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, broken between words so that none is wider than `width` cells.

    Indentation stays. Control characters, which a terminal would obey, are spelled out.
    """
    lines = []
    for line in map(_harmless, text.splitlines()):
        lines += _wrapped_line(line, width)
    return lines


def n_cells(text: str) -> int:
    """How many cells of a terminal a text takes: two a letter of East Asian scripts, none an accent on its own."""
    return sum(map(_cells_of_letter, text))


def _cells_of_letter(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def _harmless(line: str) -> str:
    letters = line.expandtabs(4)
    return "".join(repr(letter)[1:-1] if unicodedata.category(letter) == "Cc" else letter for letter in letters)


def _wrapped_line(line: str, width: int) -> list[str]:
    lines, current = [], ""
    # Words come with the blanks behind them.
    for word in re.findall(r"^\s+|\S+\s*", line):
        if current.strip() and n_cells(f"{current}{word.rstrip()}") > width:
            lines.append(current.rstrip())
            current = ""
        current += word
        # A word that is wider than the column is cut.
        while n_cells(current.rstrip()) > width:
            n_fitting = _n_fitting(current, width)
            lines.append(current[:n_fitting])
            current = current[n_fitting:]
    return [*lines, current.rstrip()]


def _n_fitting(text: str, width: int) -> int:
    """How many letters of a text fit into `width` cells, at least one."""
    cells = 0
    for n_letters, letter in enumerate(text):
        cells += _cells_of_letter(letter)
        if cells > width:
            return max(n_letters, 1)
    return len(text)
