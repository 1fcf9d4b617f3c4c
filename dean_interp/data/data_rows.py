"""What a record must hold to be a row of examples, what is wrong with it, and which half of the data it belongs to.

Columns: `prompt` with either `response`, or `safe` and `unsafe`. Prompts that are only answered are `prompt` alone, in
every row, or `question` (`questions`) beside whatever else. `topic` and `split` are optional. A bad row is reported by
file and line.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dean_interp.data.prompt_text import normalised
from dean_interp.data.text_files import Unreadable, meant_columns, misnamed
from dean_interp.errors import InputError

ANSWER_KINDS = ("response", "safe", "unsafe")
# names of a column that stands in place of `prompt`: no answers belong to it
_QUESTIONS = ("question", "questions")
# a file of prompts alone may hold nothing else, since another column may be an answer under another name
_COLUMNS_WITHOUT_ANSWERS = frozenset(("prompt", "topic", "split"))
# bad rows that an error names; the rest are counted
_N_SHOWN = 5

Split = Literal["calibration", "test"]


@dataclass(frozen=True)
class DataRow:
    """One row of a file or data set: the prompt, its answers by kind, and its topic and split where it has them."""

    prompt: str
    answers: Mapping[str, str]
    topic: str | None = None
    split: str | None = None


def splits_of(rows: Sequence[DataRow]) -> list[str]:
    """The half of the data that each row belongs to: its own, else by a hash of the prompt.

    Prompts that are one (`normalised`) are on one side: a row without a split follows one that has it, and of several
    spellings the first in the alphabet decides, so that the order of rows does not.
    """
    given: dict[str, str] = {}
    spelling: dict[str, str] = {}
    forms = [normalised(row.prompt) for row in rows]
    for form, row in zip(forms, rows, strict=True):
        first_spelling = spelling.get(form, row.prompt)
        spelling[form] = min(row.prompt, first_spelling)
        if row.split:
            given[form] = row.split
    halves = []
    for form, row in zip(forms, rows, strict=True):
        half = row.split or given.get(form)
        halves.append(half or split_by_hash(spelling[form]))
    return halves


def split_by_hash(text: str) -> Split:
    """The half of the data that a text belongs to, by its SHA-256: the same on every machine and for equal texts."""
    first_byte = hashlib.sha256(text.encode()).digest()[0]
    return "calibration" if first_byte % 2 == 0 else "test"


def can_hold_examples(columns: Sequence[str]) -> bool:
    """Whether a file with these columns can hold prompts, with answers or without."""
    if set(ANSWER_KINDS) & set(columns):
        return "prompt" in columns
    if set(_QUESTIONS) & set(columns):
        return True
    return "prompt" in columns and set(columns) <= _COLUMNS_WITHOUT_ANSWERS


def used_columns(columns: Iterable[str]) -> set[str]:
    """The columns that examples are made of, of a file with these columns."""
    known = {"prompt", *ANSWER_KINDS}
    if not known & set(columns):
        known = set(_QUESTIONS)
    return known | {"topic", "split"}


def half_a_pair(names: Iterable[str]) -> str | None:
    """What is wrong where one answer of a pair is there without the other; a misspelt name is told the right one."""
    for there, missing in (("safe", "unsafe"), ("unsafe", "safe")):
        if there in names and missing not in names:
            return f"has {there} without {missing}{meant_columns(names)}"
    return None


def parsed(source: str, records: Iterable[tuple[int, Any]], unit: str) -> list[DataRow]:
    """Rows, or one error that names every bad one by its number."""
    numbered = [(number, _as_prompt(record)) for number, record in records]
    prompts_alone = _are_prompts_alone(record for _, record in numbered)
    rows = []
    faults = []
    split_of: dict[str, str] = {}
    for number, record in numbered:
        fault = _fault(record, prompts_alone)
        if fault:
            faults.append(f"{unit} {number}: {fault}")
            continue
        row = _row(record)
        rows.append(row)
        # what is scored must never be measured, nor what differs from it by a blank
        if row.split:
            first_split = split_of.setdefault(normalised(row.prompt), row.split)
            if row.split != first_split:
                faults.append(f"{unit} {number}: the prompt is in both splits")
    if faults:
        shown = "; ".join(faults[:_N_SHOWN])
        n_more = len(faults) - _N_SHOWN
        more = f" (and {n_more} more)" if n_more > 0 else ""
        raise InputError(f"{source}: {shown}{more}")
    return rows


def _are_prompts_alone(records: Iterable[Any]) -> bool:
    """Whether no record has a column that may hold an answer."""
    for record in records:
        if isinstance(record, Mapping) and not set(record) <= _COLUMNS_WITHOUT_ANSWERS:
            return False
    return True


def _row(record: Mapping[str, Any]) -> DataRow:
    """The row of a record without faults; what is empty counts as not there, and blanks around a topic do not count."""
    topic = record.get("topic") or ""
    return DataRow(
        prompt=record["prompt"],
        answers={kind: record[kind] for kind in ANSWER_KINDS if record.get(kind)},
        topic=topic.strip() or None,
        split=record.get("split") or None,
    )


def _as_prompt(record: Any) -> Any:  # noqa: ANN401 - whatever a line held
    """A record of a question becomes one of a prompt alone; every other stays as it is."""
    if not isinstance(record, Mapping):
        return record
    if {"prompt", *ANSWER_KINDS} & set(record):
        return record
    for name in _QUESTIONS:
        if name in record:
            return {
                "prompt": record[name],
                "topic": record.get("topic"),
                "split": record.get("split"),
            }
    return record


def _fault(record: object, prompts_alone: bool) -> str | None:
    """What is wrong with a record of a file, which may hold prompts alone; None where nothing is."""
    if isinstance(record, Unreadable):
        return record.reason
    if not isinstance(record, Mapping):
        return f"is not an object with a prompt, got {type(record).__name__}"
    return _text_fault(record) or _answer_fault(record, prompts_alone) or misnamed(record)


def _text_fault(record: Mapping[str, Any]) -> str | None:
    for field in ("prompt", *ANSWER_KINDS, "topic", "split"):
        value = record.get(field)
        if value is None:
            continue
        if not isinstance(value, str):
            return f"{field} must be text, got {type(value).__name__}"
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"{field} holds half a surrogate pair, which is no character"
        if "\0" in value:
            return f"{field} holds a NUL, which no text does"
    prompt = record.get("prompt") or ""
    if not prompt.strip():
        return "prompt is missing or blank"
    return None


def _answer_fault(record: Mapping[str, Any], prompts_alone: bool) -> str | None:
    kinds = [kind for kind in ANSWER_KINDS if record.get(kind) is not None]
    if not kinds and not prompts_alone:
        return "has no response (nor safe and unsafe)"
    for kind in kinds:
        if not record[kind].strip():
            return f"{kind} is blank"
    others = [name for name in record if name not in ANSWER_KINDS]
    if fault := half_a_pair([*kinds, *others]):
        return fault
    if record.get("split") not in (None, "", "calibration", "test"):
        return f"split must be 'calibration' or 'test', got {record['split']!r}"
    return None
