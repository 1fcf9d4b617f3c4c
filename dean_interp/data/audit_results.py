"""What an audit of data sets found, as records and as tables for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Quartiles = tuple[int, int, int]
"""First quartile, median, third quartile."""


@dataclass(frozen=True)
class SetAudit:
    """One data set."""

    name: str
    n_rows: int
    n_verbatim: int
    """Distinct prompts as they stand."""
    n_prompts: int
    """Distinct prompts after normalisation (`normalised`)."""
    n_repeats: int
    """Rows whose prompt, normalised, is that of a row before: `n_rows - n_prompts`."""
    n_near: int
    """Distinct prompts with a near duplicate among those before them."""
    n_both: int
    """Distinct prompts that have a safe and an unsafe answer."""
    n_answers: int
    n_refusals: int
    """Answers that `refused` calls refusals."""
    prompt_length: Quartiles
    """Characters: first quartile, median, third quartile, over rows."""
    answer_length: Quartiles
    """The same of answers."""
    prompt_tokens: Quartiles | None
    """The same in tokens, where a tokenizer was given."""
    answer_tokens: Quartiles | None
    n_templated: int
    """Rows that hold the marks of a chat template, which should be plain text."""
    template: str | None
    """The template that most of them hold marks of: a guess."""
    licence: str


@dataclass(frozen=True)
class Leak:
    """What the second data set holds of the first one's prompts."""

    first: str
    second: str
    n_verbatim: int
    """Distinct prompts of the second that are prompts of the first as they stand."""
    n_exact: int
    """Distinct prompts of the second, normalised, that are prompts of the first."""
    n_near: int
    """Further ones that are near duplicates of a prompt of the first."""
    n_exact_rows: int
    """Rows of the second with a prompt of the first, normalised."""
    n_rows: int
    """Those and the rows with a near duplicate."""
    n_opposite: int
    """Prompts of both, normalised, that are answered safely in one and unsafely in the other."""


@dataclass(frozen=True)
class Audit:
    """Several data sets and every ordered pair of them."""

    threshold: float
    sets: tuple[SetAudit, ...]
    leaks: tuple[Leak, ...]

    def __str__(self) -> str:
        """The table of the data sets, then that of the pairs that share prompts."""
        lines = [
            *_set_table(self.sets),
            "",
            "prompts: as they stand; distinct: by letters and digits; repeats: rows beyond these; near: prompts whose",
            f"word trigrams have a Jaccard similarity of {self.threshold:g} or more with those of one before; "
            "both: prompts with a safe",
            "and an unsafe answer; chars, tokens: quartiles",
        ]
        leaks = [leak for leak in self.leaks if leak.n_exact + leak.n_near]
        if leaks:
            lines += [
                "",
                *_leak_table(leaks),
                "",
                "rows: of the set on the left, with an exact one; opposite: answered safely in one set and "
                "unsafely in the other",
            ]
        elif len(self.sets) > 1:
            lines += ["", "no prompt is in two of them"]
        return "\n".join(lines)


def _set_table(sets: Sequence[SetAudit]) -> list[str]:
    rows = []
    for data_set in sets:
        rows.append(
            {
                "data set": data_set.name,
                "rows": data_set.n_rows,
                "prompts": data_set.n_verbatim,
                "distinct": data_set.n_prompts,
                "repeats": data_set.n_repeats,
                "near": data_set.n_near,
                "both": data_set.n_both,
                "answers": data_set.n_answers,
                "refusals": _share(data_set.n_refusals, data_set.n_answers),
                "prompt chars": _spread(data_set.prompt_length),
                "answer chars": _spread(data_set.answer_length if data_set.n_answers else None),
                "prompt tokens": _spread(data_set.prompt_tokens),
                "answer tokens": _spread(data_set.answer_tokens),
                "templated": f"{data_set.n_templated} {data_set.template or ''}".strip(),
                "licence": data_set.licence,
            }
        )
    # tokens were counted where a tokenizer was given
    if not any(data_set.prompt_tokens for data_set in sets):
        for row in rows:
            del row["prompt tokens"], row["answer tokens"]
    return _table(rows, n_left=1)


def _leak_table(leaks: Sequence[Leak]) -> list[str]:
    rows = []
    for leak in leaks:
        rows.append(
            {
                "prompts of": leak.second,
                "that are in": leak.first,
                "exact": leak.n_exact,
                "verbatim": leak.n_verbatim,
                "near too": leak.n_near,
                "rows": leak.n_exact_rows,
                "with near": leak.n_rows,
                "opposite": leak.n_opposite,
            }
        )
    return _table(rows, n_left=2)


def _share(count: int, total: int) -> str:
    if not total:
        return "-"
    return f"{count} ({count / total:.1%})"


def _spread(quartiles: Quartiles | None) -> str:
    if quartiles is None:
        return "-"
    return "-".join(map(str, quartiles))


def _table(rows: Sequence[Mapping[str, object]], *, n_left: int) -> list[str]:
    """Columns as wide as what they hold; the first `n_left` are aligned left, and the last one where it is text."""
    if not rows:
        return []
    head = list(rows[0])
    lines = [head]
    for row in rows:
        lines.append([str(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last_column = head[-1]
    is_left = [column < n_left for column in range(len(head))]
    is_left[-1] = isinstance(rows[-1][last_column], str)
    table = []
    for line in lines:
        cells = []
        for cell, width, left in zip(line, widths, is_left, strict=True):
            cells.append(cell.ljust(width) if left else cell.rjust(width))
        table.append("  ".join(cells).rstrip())
    return table
