"""What becomes of the rows of published data sets.

A column that is missing, or holds something else than it should, is an error that names the row; a row whose text is
blank is left out. Sets that are benchmarks are all `test`: nothing should be scored on them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dean_interp.data.readers import DataRow
from dean_interp.errors import InputError

Record = object
"""A row as published: a mapping from columns; anything else is an error that names it."""
Answers = Literal["both", "safe", "unsafe"]


def beavertails(records: Iterable[Record], category: str, answers: Answers = "both") -> list[DataRow]:
    """BeaverTails, which labels (prompt, response) pairs: the prompts with an unsafe response of one category.

    `both` gives one row a prompt, its first safe and its first unsafe response; `safe` and `unsafe` give every such
    response as a row. Responses that annotators labelled differently, or unsafe for another reason only, are left out.
    """
    labels: dict[str, dict[str, set[str]]] = {}
    for number, record in enumerate(records, 1):
        prompt, response = _text(record, "prompt", number), _text(record, "response", number)
        kinds = _field(record, "category", number)
        if not isinstance(kinds, Mapping) or category not in kinds:
            raise InputError(f"row {number}: category must map '{category}' to true or false, got {str(kinds)[:60]!r}")
        label = "safe" if _flag(record, "is_safe", number) else "unsafe" if kinds[category] else "other"
        if prompt and response:
            labels.setdefault(prompt, {}).setdefault(response, set()).add(label)
    rows = []
    for prompt, found in labels.items():
        safe, unsafe = ([text for text, given in found.items() if given == {kind}] for kind in ("safe", "unsafe"))
        if unsafe and answers != "both":
            rows += [DataRow(prompt, {"response": text}) for text in (safe if answers == "safe" else unsafe)]
        elif unsafe and safe:
            rows.append(DataRow(prompt, {"safe": safe[0], "unsafe": unsafe[0]}))
    return rows


def salad(records: Iterable[Record], category: str) -> list[DataRow]:
    """SALAD-Data's questions of one task (column `2-category`), without answers; the topic is the `3-category`."""
    read = [[_text(record, column, number) for column in ("question", "2-category", "3-category")]
            for number, record in enumerate(records, 1)]  # fmt: skip
    return [
        DataRow(question, {}, topic or None, "test") for question, task, topic in read if task == category and question
    ]


def alpaca(records: Iterable[Record]) -> list[DataRow]:
    """Alpaca: the instruction, with its input after a blank line where there is one, and the output."""
    rows = []
    for number, record in enumerate(records, 1):
        asked = [_text(record, field, number) for field in ("instruction", "input")]
        output = _text(record, "output", number)
        if asked[0] and output:
            rows.append(DataRow("\n\n".join(filter(None, asked)), {"response": output}))
    return rows


def wikitext(records: Iterable[Record], *, continued: bool = False) -> list[DataRow]:
    """WikiText, whose rows are lines: whole articles as prompts without answers.

    With `continued`, each paragraph of two sentences or more is its first sentence and, as the response, the others.
    """
    lines = [_text(record, "text", number).strip() for number, record in enumerate(records, 1)]
    if continued:
        cut = [re.split(r"(?<= \.) ", line, maxsplit=1) for line in lines if not line.startswith("= ")]
        return [DataRow(parts[0], {"response": parts[1]}) for parts in cut if len(parts) == 2]
    articles: list[list[str]] = []
    for line in filter(None, lines):
        if re.fullmatch(r"= [^=].* =", line) or not articles:
            articles.append([])
        articles[-1].append(line)
    return [DataRow("\n\n".join(article), {}, article[0].strip("= "), "test") for article in articles]


def bbq(records: Iterable[Record]) -> list[DataRow]:
    """BBQ's ambiguous contexts: the safe answer is the one that says it cannot be known, the unsafe one the biased one.

    The biased answer is the target of the stereotype where the question is negative, the other person where it is not
    (Parrish et al. 2022); rows without a target are left out. The topic is the template, whose rows are in one split.
    """
    rows = []
    for number, record in enumerate(records, 1):
        context, question, *choices = (_text(record, name, number)
                                       for name in ("context", "question", "ans0", "ans1", "ans2"))  # fmt: skip
        unknown, target = _index(record, "answer_label", number), _index(record, "target_label", number)
        topic = f"{_text(record, 'category', number)} {_field(record, 'question_index', number)}"
        negative = _one_of(record, "question_polarity", ("neg", "nonneg"), number) == "neg"
        ambiguous = _one_of(record, "context_condition", ("ambig", "disambig"), number) == "ambig"
        if ambiguous and unknown is not None and target not in (None, unknown) and all((context, question, *choices)):
            biased = target if negative else 3 - unknown - target
            prompt = f"{context} {question}\n" + "\n".join(f"- {choice}" for choice in choices)
            side = ("calibration", "test")[hashlib.sha256(topic.encode()).digest()[0] % 2]
            rows.append(DataRow(prompt, {"safe": choices[unknown], "unsafe": choices[biased]}, topic, side))
    return rows


def xstest(records: Iterable[Record], label: Literal["safe", "unsafe"], types: Sequence[str] = ()) -> list[DataRow]:
    """XSTest's prompts without answers: safe ones that look unsafe, or unsafe contrasts; the topic is the type."""
    rows = []
    for number, record in enumerate(records, 1):
        prompt, kind = _text(record, "prompt", number), _text(record, "type", number)
        if _one_of(record, "label", ("safe", "unsafe"), number) == label and (not types or kind in types) and prompt:
            rows.append(DataRow(prompt, {}, kind, "test"))
    return rows


def orbench(records: Iterable[Record], category: str | None = None) -> list[DataRow]:
    """OR-Bench's prompts without answers, all or those that resemble one kind of harm; the topic is the category."""
    read = [(_text(record, "prompt", number), _text(record, "category", number))
            for number, record in enumerate(records, 1)]  # fmt: skip
    return [DataRow(prompt, {}, kind, "test") for prompt, kind in read if prompt and category in (None, kind)]


def _field(record: Record, name: str, number: int) -> Any:  # noqa: ANN401 - whatever the column holds
    if not isinstance(record, Mapping):
        raise InputError(f"row {number}: is not an object with columns, got {type(record).__name__}")
    if name not in record:
        raise InputError(f"row {number}: has no column '{name}', only {', '.join(map(str, record))}")
    return record[name]


def _text(record: Record, name: str, number: int) -> str:
    """A text as it stands, or nothing where it is blank."""
    value = _field(record, name, number)
    if not isinstance(value, str):
        raise InputError(f"row {number}: {name} must be text, got {type(value).__name__}")
    return value if value.strip() else ""


def _one_of(record: Record, name: str, allowed: tuple[str, ...], number: int) -> str:
    value = _field(record, name, number)
    if value not in allowed:
        raise InputError(f"row {number}: {name} must be {' or '.join(allowed)}, got {value!r}")
    return value


def _flag(record: Record, name: str, number: int) -> bool:
    """True or false; CSV files hold them as text."""
    value = str(_field(record, name, number)).lower()
    if value not in ("true", "false"):
        raise InputError(f"row {number}: {name} must be true or false, got {value!r}")
    return value == "true"


def _index(record: Record, name: str, number: int) -> int | None:
    """Which of three answers, from 0; None where none is named."""
    value = _field(record, name, number)
    if value is None or value == "":
        return None
    if str(value) not in ("0", "1", "2"):
        raise InputError(f"row {number}: {name} must be 0, 1 or 2, got {value!r}")
    return int(value)
