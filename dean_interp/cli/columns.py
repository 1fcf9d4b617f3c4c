"""Texts in columns of a terminal, wrapped by the cells that letters take there; and tables that fit into it."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby, zip_longest

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


def fitted(text: str, width: int) -> str:
    """A text whose tables are at most `width` cells wide: columns that have no room stand below the others.

    Their rows begin with the first column again, or stand below it where it leaves no room. Other lines stay as they
    are, since a terminal wraps them, and a path or a command is copied in one piece.
    """
    lines: list[str] = []
    for _, block in groupby(text.split("\n"), key=lambda line: bool(line.strip())):
        of_block = list(block)
        is_wide = max(map(len, of_block)) > width
        lines += _folded(of_block, width) if is_wide else of_block
    return "\n".join(lines)


def _folded(block: Sequence[str], width: int) -> list[str]:
    """The lines of a table that is too wide; of another text, its lines as they are."""
    rows = [line for line in block if _is_row(line)]
    label, *others = _spans(rows) if len(rows) > 1 else [(0, 0)]
    if not others:
        return list(block)
    n_label = label[1]
    is_below = n_label + 2 + max(end - start for start, end in others) > width
    room = width - 2 if is_below else width - n_label - 2
    lines = []
    for group in _groups(others, room):
        for line in block:
            if not _is_row(line):
                lines.append(line)
                continue
            cells = "  ".join(line[start:end].ljust(end - start) for start, end in group).rstrip()
            name = line[:n_label].rstrip()
            lines += [name, f"  {cells}"] if is_below else [f"{name.ljust(n_label)}  {cells}".rstrip()]
    return lines


def _is_row(line: str) -> bool:
    """Whether blanks within a line part it into columns."""
    return "  " in line.strip() or line.startswith("   ")


def _spans(rows: Sequence[str]) -> list[tuple[int, int]]:
    """Where each column of a table begins and ends: between places where all rows have two blanks or more."""
    n_letters = max(map(len, rows))
    used = "".join("x" if any(row[i : i + 1].strip() for row in rows) else " " for i in range(n_letters))
    # What the first row begins with belongs to the first column, also where it is blank.
    spans = [match.span() for match in re.finditer(r"x(?: ?x)*", used)]
    return [(0, spans[0][1]), *spans[1:]]


def _groups(spans: Sequence[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """The columns that stand beside each other: as many as have room, at least one."""
    groups: list[list[tuple[int, int]]] = []
    n_used = 0
    for start, end in spans:
        n_wanted = n_used + 2 + end - start
        if groups and n_wanted <= room:
            groups[-1].append((start, end))
            n_used = n_wanted
        else:
            groups.append([(start, end)])
            n_used = end - start
    return groups


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
