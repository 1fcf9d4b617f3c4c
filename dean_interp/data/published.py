"""Turns the rows of published data sets into rows of ours.

A column that is missing, or holds something else than it should, is an error that names the row; a row whose text is
blank is left out. Sets that are benchmarks are all `test`: nothing should be scored on them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dean_interp.data.readers import DataRow, split_by_hash
from dean_interp.errors import InputError

PublishedRecord = object
"""A row as published: a mapping from columns; anything else is an error that names it."""
AnswerKinds = Literal["both", "safe", "unsafe"]


def beavertails(records: Iterable[PublishedRecord], category: str, answers: AnswerKinds = "both") -> list[DataRow]:
    """BeaverTails, which labels (prompt, response) pairs: the prompts with an unsafe response of one category.

    `both` gives one row a prompt, its first safe and its first unsafe response; `safe` and `unsafe` give every such
    response as a row. Responses that annotators labelled differently, or unsafe for another reason only, are left out.
    """
    # the labels that annotators gave to each response of each prompt
    labels: dict[str, dict[str, set[str]]] = {}
    for number, record in enumerate(records, 1):
        prompt, response = _text(record, "prompt", number), _text(record, "response", number)
        label = _beavertails_label(record, category, number)
        if prompt and response:
            labels.setdefault(prompt, {}).setdefault(response, set()).add(label)
    rows = []
    for prompt, labels_of_response in labels.items():
        safe = [response for response, given in labels_of_response.items() if given == {"safe"}]
        unsafe = [response for response, given in labels_of_response.items() if given == {"unsafe"}]
        if not unsafe:
            continue
        if answers != "both":
            responses = safe if answers == "safe" else unsafe
            rows += [DataRow(prompt, {"response": response}) for response in responses]
        elif safe:
            rows.append(DataRow(prompt, {"safe": safe[0], "unsafe": unsafe[0]}))
    return rows


def _beavertails_label(record: PublishedRecord, category: str, number: int) -> str:
    categories = _field(record, "category", number)
    if not isinstance(categories, Mapping) or category not in categories:
        raise InputError(f"row {number}: category must map '{category}' to true or false, got {str(categories)[:60]!r}")
    if _flag(record, "is_safe", number):
        return "safe"
    return "unsafe" if categories[category] else "unsafe for another reason"


def salad(records: Iterable[PublishedRecord], category: str) -> list[DataRow]:
    """SALAD-Data's questions of one task (column `2-category`), without answers; the topic is the `3-category`."""
    rows = []
    for number, record in enumerate(records, 1):
        question = _text(record, "question", number)
        task = _text(record, "2-category", number)
        topic = _text(record, "3-category", number)
        if question and task == category:
            rows.append(DataRow(question, {}, topic or None, "test"))
    return rows


def alpaca(records: Iterable[PublishedRecord]) -> list[DataRow]:
    """Alpaca: the instruction, with its input after a blank line where there is one, and the output."""
    rows = []
    for number, record in enumerate(records, 1):
        instruction = _text(record, "instruction", number)
        context = _text(record, "input", number)
        output = _text(record, "output", number)
        if instruction and output:
            prompt = f"{instruction}\n\n{context}" if context else instruction
            rows.append(DataRow(prompt, {"response": output}))
    return rows


def wikitext(records: Iterable[PublishedRecord], *, continued: bool = False) -> list[DataRow]:
    """WikiText, whose rows are lines: whole articles as prompts without answers.

    With `continued`, each paragraph of two sentences or more is its first sentence and, as the response, the others.
    """
    lines = [_text(record, "text", number).strip() for number, record in enumerate(records, 1)]
    return _wikitext_paragraphs(lines) if continued else _wikitext_articles(lines)


def _wikitext_paragraphs(lines: Sequence[str]) -> list[DataRow]:
    rows = []
    for line in lines:
        first_sentence, *others = re.split(r"(?<= \.) ", line, maxsplit=1)
        if others and not line.startswith("= "):
            rows.append(DataRow(first_sentence, {"response": others[0]}))
    return rows


def _wikitext_articles(lines: Sequence[str]) -> list[DataRow]:
    articles: list[list[str]] = []
    for line in filter(None, lines):
        # `= Title =` begins an article, `= = Section = =` does not
        if re.fullmatch(r"= [^=].* =", line) or not articles:
            articles.append([])
        articles[-1].append(line)
    rows = []
    for article in articles:
        rows.append(DataRow("\n\n".join(article), {}, article[0].strip("= "), "test"))
    return rows


def bbq(records: Iterable[PublishedRecord]) -> list[DataRow]:
    """BBQ's ambiguous contexts: the safe answer is the one that says it cannot be known, the unsafe one the biased one.

    The biased answer is the target of the stereotype where the question is negative, the other person where it is not
    (Parrish et al. 2022); rows without a target are left out. The topic is the template, whose rows are in one split.
    """
    rows = []
    for number, record in enumerate(records, 1):
        context, question = _text(record, "context", number), _text(record, "question", number)
        choices = [_text(record, name, number) for name in ("ans0", "ans1", "ans2")]
        unknown, target = _index(record, "answer_label", number), _index(record, "target_label", number)
        topic = f"{_text(record, 'category', number)} {_field(record, 'question_index', number)}"
        is_negative = _one_of(record, "question_polarity", ("neg", "nonneg"), number) == "neg"
        is_ambiguous = _one_of(record, "context_condition", ("ambig", "disambig"), number) == "ambig"
        if not is_ambiguous or unknown is None or target in (None, unknown):
            continue
        if all((context, question, *choices)):
            # of the three answers, 3 - unknown - target is the other person
            biased = target if is_negative else 3 - unknown - target
            listed = [f"- {choice}" for choice in choices]
            prompt = "\n".join([f"{context} {question}", *listed])
            answers = {"safe": choices[unknown], "unsafe": choices[biased]}
            rows.append(DataRow(prompt, answers, topic, split_by_hash(topic)))
    return rows


def xstest(
    records: Iterable[PublishedRecord], label: Literal["safe", "unsafe"], types: Sequence[str] = ()
) -> list[DataRow]:
    """XSTest's prompts without answers: safe ones that look unsafe, or unsafe contrasts; the topic is the type."""
    rows = []
    for number, record in enumerate(records, 1):
        prompt, kind = _text(record, "prompt", number), _text(record, "type", number)
        is_asked_for = _one_of(record, "label", ("safe", "unsafe"), number) == label
        if prompt and is_asked_for and (not types or kind in types):
            rows.append(DataRow(prompt, {}, kind, "test"))
    return rows


def orbench(records: Iterable[PublishedRecord], category: str | None = None) -> list[DataRow]:
    """OR-Bench's prompts without answers, all or those that resemble one kind of harm; the topic is the category."""
    rows = []
    for number, record in enumerate(records, 1):
        prompt, kind = _text(record, "prompt", number), _text(record, "category", number)
        if prompt and category in (None, kind):
            rows.append(DataRow(prompt, {}, kind, "test"))
    return rows


def _field(record: PublishedRecord, name: str, number: int) -> Any:  # noqa: ANN401 - whatever the column holds
    if not isinstance(record, Mapping):
        raise InputError(f"row {number}: is not an object with columns, got {type(record).__name__}")
    if name not in record:
        raise InputError(f"row {number}: has no column '{name}', only {', '.join(map(str, record))}")
    return record[name]


def _text(record: PublishedRecord, name: str, number: int) -> str:
    """A text as it stands, or nothing where it is blank."""
    value = _field(record, name, number)
    if not isinstance(value, str):
        raise InputError(f"row {number}: {name} must be text, got {type(value).__name__}")
    return value if value.strip() else ""


def _one_of(record: PublishedRecord, name: str, allowed: tuple[str, ...], number: int) -> str:
    value = _field(record, name, number)
    if value not in allowed:
        raise InputError(f"row {number}: {name} must be {' or '.join(allowed)}, got {value!r}")
    return value


def _flag(record: PublishedRecord, name: str, number: int) -> bool:
    """True or false; CSV files hold them as text."""
    value = str(_field(record, name, number)).lower()
    if value not in ("true", "false"):
        raise InputError(f"row {number}: {name} must be true or false, got {value!r}")
    return value == "true"


def _index(record: PublishedRecord, name: str, number: int) -> int | None:
    """Which of three answers, from 0; None where none is named."""
    value = _field(record, name, number)
    if value is None or value == "":
        return None
    if str(value) not in ("0", "1", "2"):
        raise InputError(f"row {number}: {name} must be 0, 1 or 2, got {value!r}")
    return int(value)
