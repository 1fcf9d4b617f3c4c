"""Turns the rows of published data sets into rows of ours.

A column that is missing, or holds something else than it should, is an error that names the row; a row whose text is
blank is left out. Sets that are benchmarks are all `test`: nothing should be scored on them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dean_interp.data.data_rows import DataRow, split_by_hash
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
    for row in _numbered(records):
        prompt = row.text("prompt")
        response = row.text("response")
        label = _beavertails_label(row, category)
        if prompt and response:
            labels_of_response = labels.setdefault(prompt, {})
            labels_of_response.setdefault(response, set()).add(label)
    rows = []
    for prompt, labels_of_response in labels.items():
        safe = _all_labelled(labels_of_response, "safe")
        unsafe = _all_labelled(labels_of_response, "unsafe")
        if not unsafe:
            continue
        if answers == "both":
            if safe:
                pair = {"safe": safe[0], "unsafe": unsafe[0]}
                rows.append(DataRow(prompt, pair))
            continue
        for response in safe if answers == "safe" else unsafe:
            rows.append(DataRow(prompt, {"response": response}))
    return rows


def _beavertails_label(row: "_PublishedRow", category: str) -> str:
    categories = row.field("category")
    if not isinstance(categories, Mapping) or category not in categories:
        given = str(categories)[:60]
        raise InputError(f"row {row.number}: category must map '{category}' to true or false, got {given!r}")
    if row.flag("is_safe"):
        return "safe"
    return "unsafe" if categories[category] else "unsafe for another reason"


def _all_labelled(labels_of_response: Mapping[str, set[str]], label: str) -> list[str]:
    """The responses that every annotator gave this label."""
    return [response for response, labels in labels_of_response.items() if labels == {label}]


def salad(records: Iterable[PublishedRecord], category: str) -> list[DataRow]:
    """SALAD-Data's questions of one task (column `2-category`), without answers; the topic is the `3-category`."""
    rows = []
    for row in _numbered(records):
        question = row.text("question")
        task = row.text("2-category")
        topic = row.text("3-category")
        if question and task == category:
            rows.append(DataRow(question, {}, topic or None, "test"))
    return rows


def alpaca(records: Iterable[PublishedRecord]) -> list[DataRow]:
    """Alpaca: the instruction, with its input after a blank line where there is one, and the output."""
    rows = []
    for row in _numbered(records):
        instruction = row.text("instruction")
        context = row.text("input")
        output = row.text("output")
        if instruction and output:
            prompt = f"{instruction}\n\n{context}" if context else instruction
            rows.append(DataRow(prompt, {"response": output}))
    return rows


def wikitext(records: Iterable[PublishedRecord], *, continued: bool = False) -> list[DataRow]:
    """WikiText, whose rows are lines: whole articles as prompts without answers.

    With `continued`, each paragraph of two sentences or more is its first sentence and, as the response, the others.
    """
    lines = [row.text("text").strip() for row in _numbered(records)]
    if continued:
        return _wikitext_paragraphs(lines)
    return _wikitext_articles(lines)


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
        title = article[0].strip("= ")
        rows.append(DataRow("\n\n".join(article), {}, title, "test"))
    return rows


def bbq(records: Iterable[PublishedRecord]) -> list[DataRow]:
    """BBQ's ambiguous contexts: the safe answer is the one that says it cannot be known, the unsafe one the biased one.

    The biased answer is the target of the stereotype where the question is negative, the other person where it is not
    (Parrish et al. 2022); rows without a target are left out. The topic is the template, whose rows are in one split.
    """
    rows = []
    for row in _numbered(records):
        context = row.text("context")
        question = row.text("question")
        choices = [row.text(name) for name in ("ans0", "ans1", "ans2")]
        unknown = row.index("answer_label")
        target = row.index("target_label")
        topic = f"{row.text('category')} {row.field('question_index')}"
        is_negative = row.one_of("question_polarity", ("neg", "nonneg")) == "neg"
        is_ambiguous = row.one_of("context_condition", ("ambig", "disambig")) == "ambig"
        if not is_ambiguous or unknown is None or target is None:
            continue
        is_complete = all((context, question, *choices))
        if is_complete and target != unknown:
            # of the three answers, 3 - unknown - target is the other person
            biased = target if is_negative else 3 - unknown - target
            listed = [f"- {choice}" for choice in choices]
            prompt = "\n".join([f"{context} {question}", *listed])
            answers = {"safe": choices[unknown], "unsafe": choices[biased]}
            rows.append(DataRow(prompt, answers, topic, split_by_hash(topic)))
    return rows


def xstest(
    records: Iterable[PublishedRecord],
    label: Literal["safe", "unsafe"],
    types: Sequence[str] = (),
) -> list[DataRow]:
    """XSTest's prompts without answers: safe ones that look unsafe, or unsafe contrasts; the topic is the type."""
    rows = []
    for row in _numbered(records):
        prompt = row.text("prompt")
        kind = row.text("type")
        has_label = row.one_of("label", ("safe", "unsafe")) == label
        has_type = not types or kind in types
        if prompt and has_label and has_type:
            rows.append(DataRow(prompt, {}, kind, "test"))
    return rows


def orbench(records: Iterable[PublishedRecord], category: str | None = None) -> list[DataRow]:
    """OR-Bench's prompts without answers, all or those that resemble one kind of harm; the topic is the category."""
    rows = []
    for row in _numbered(records):
        prompt = row.text("prompt")
        kind = row.text("category")
        if prompt and category in (None, kind):
            rows.append(DataRow(prompt, {}, kind, "test"))
    return rows


@dataclass(frozen=True)
class _PublishedRow:
    """A row as published, with its number, which errors name."""

    record: PublishedRecord
    number: int

    def field(self, name: str) -> Any:  # noqa: ANN401 - whatever the column holds
        if not isinstance(self.record, Mapping):
            raise InputError(f"row {self.number}: is not an object with columns, got {type(self.record).__name__}")
        if name not in self.record:
            columns = ", ".join(map(str, self.record))
            raise InputError(f"row {self.number}: has no column '{name}', only {columns}")
        return self.record[name]

    def text(self, name: str) -> str:
        """A text as it stands, or nothing where it is blank."""
        value = self.field(name)
        if not isinstance(value, str):
            raise InputError(f"row {self.number}: {name} must be text, got {type(value).__name__}")
        return value if value.strip() else ""

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.field(name)
        if value not in allowed:
            choices = " or ".join(allowed)
            raise InputError(f"row {self.number}: {name} must be {choices}, got {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; CSV files hold them as text."""
        value = str(self.field(name)).lower()
        if value not in ("true", "false"):
            raise InputError(f"row {self.number}: {name} must be true or false, got {value!r}")
        return value == "true"

    def index(self, name: str) -> int | None:
        """Which of three answers, from 0; None where none is named."""
        value = self.field(name)
        if value is None or value == "":
            return None
        if str(value) not in ("0", "1", "2"):
            raise InputError(f"row {self.number}: {name} must be 0, 1 or 2, got {value!r}")
        return int(value)


def _numbered(records: Iterable[PublishedRecord]) -> Iterator[_PublishedRow]:
    for number, record in enumerate(records, 1):
        yield _PublishedRow(record, number)
