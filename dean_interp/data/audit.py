"""What is in data sets, and what one holds of another: duplicates, leakage, lengths.

Prompts are compared as they stand (`verbatim`), and as `leakage` compares them (`exact` and `near`).
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from dean_interp.data.examples import Behaviour
from dean_interp.data.leakage import NEAR, Likeness, PromptIndex, check_threshold, normalised
from dean_interp.errors import InputError

_TEMPLATES = {
    "ChatML": r"<\|im_(start|end)\|>",
    "Llama 2": r"\[/?INST\]|<</?SYS>>",
    "Llama 3": r"<\|(start_header_id|eot_id)\|>",
    "Gemma": r"<(start|end)_of_turn>",
    "Zephyr": r"<\|(user|assistant)\|>",
    "Alpaca": r"(?m)^### (Instruction|Response)\b",
    "Human and Assistant": r"(?m)^\s*(Human|Assistant|USER|ASSISTANT): ",
}
Quartiles = tuple[int, int, int]
Refused = Callable[[Sequence[str]], Sequence[bool]]
Tokenize = Callable[[str], Sequence[int]]


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
        leaks = [leak for leak in self.leaks if leak.n_exact or leak.n_near]
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


def audit(
    behaviours: Sequence[Behaviour],
    *,
    refused: Refused,
    threshold: float = NEAR,
    tokenize: Tokenize | None = None,
    licences: Mapping[str, str] | None = None,
) -> Audit:
    """Look at data sets and at what each holds of the others.

    Args:
        refused: says which answers are refusals (the lexical judge, say).
        threshold: Jaccard similarity of word trigrams, in (0, 1].
        tokenize: the tokens of a text (`tokenizer.encode`), for lengths in tokens.
        licences: by name; others are "not stated".

    Raises:
        InputError: a threshold outside (0, 1], or two data sets of one name.
    """
    check_threshold(threshold)
    names = [behaviour.name for behaviour in behaviours]
    if len(set(names)) < len(names):
        raise InputError(f"each data set needs a name of its own (load_behaviour has name=...), got {names}")
    indices = [PromptIndex(behaviour.prompts, threshold) for behaviour in behaviours]
    sets = []
    for behaviour, prompts in zip(behaviours, indices, strict=True):
        licence = (licences or {}).get(behaviour.name, "not stated")
        sets.append(_set_audit(behaviour, prompts, refused, tokenize=tokenize, licence=licence))
    leaks = []
    for first, second in permutations(range(len(behaviours)), 2):
        likeness = indices[first].likeness(indices[second])
        leaks.append(_leak(behaviours[first], behaviours[second], likeness))
    return Audit(threshold, tuple(sets), tuple(leaks))


def _set_audit(
    behaviour: Behaviour, prompts: PromptIndex, refused: Refused, *, tokenize: Tokenize | None, licence: str
) -> SetAudit:
    answers = [answer for example in behaviour.examples for answer in example.answers.values()]
    n_templated, template = _chat_template(behaviour)
    prompt_tokens, answer_tokens = None, None
    if tokenize is not None:
        prompt_tokens = _quartiles([len(tokenize(prompt)) for prompt in behaviour.prompts])
        answer_tokens = _quartiles([len(tokenize(answer)) for answer in answers]) if answers else None
    return SetAudit(
        name=behaviour.name,
        n_rows=len(behaviour),
        n_verbatim=len(set(behaviour.prompts)),
        n_prompts=len(prompts.trigrams),
        n_repeats=len(behaviour) - len(prompts.trigrams),
        n_near=prompts.n_near,
        n_both=sum({"safe", "unsafe"} <= kinds for kinds in _answer_kinds(behaviour).values()),
        n_answers=len(answers),
        n_refusals=sum(refused(answers)) if answers else 0,
        prompt_length=_quartiles([len(prompt) for prompt in behaviour.prompts]),
        answer_length=_quartiles([len(answer) for answer in answers]),
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        n_templated=n_templated,
        template=template,
        licence=licence,
    )


def _chat_template(behaviour: Behaviour) -> tuple[int, str | None]:
    """How many rows hold the marks of a chat template, and the template that most of them hold marks of."""
    n_templated, counts = 0, Counter[str]()
    for example in behaviour.examples:
        text = "\n".join((example.prompt, *example.answers.values()))
        names = [name for name, pattern in _TEMPLATES.items() if re.search(pattern, text)]
        n_templated += bool(names)
        counts.update(names)
    return n_templated, counts.most_common(1)[0][0] if counts else None


def _leak(first: Behaviour, second: Behaviour, likeness: Mapping[str, Likeness | None]) -> Leak:
    kinds_first, kinds_second = _answer_kinds(first), _answer_kinds(second)
    n_opposite = 0
    for key in kinds_first.keys() & kinds_second.keys():
        safe_then_unsafe = "safe" in kinds_first[key] and "unsafe" in kinds_second[key]
        unsafe_then_safe = "unsafe" in kinds_first[key] and "safe" in kinds_second[key]
        n_opposite += safe_then_unsafe or unsafe_then_safe
    by_prompt = list(likeness.values())
    by_row = [likeness[normalised(prompt)] for prompt in second.prompts]
    return Leak(
        first=first.name,
        second=second.name,
        n_verbatim=len(set(first.prompts) & set(second.prompts)),
        n_exact=by_prompt.count("exact"),
        n_near=by_prompt.count("near"),
        n_exact_rows=by_row.count("exact"),
        n_rows=len(by_row) - by_row.count(None),
        n_opposite=n_opposite,
    )


def _answer_kinds(behaviour: Behaviour) -> dict[str, set[str]]:
    """The kinds of answers of each prompt; the name of a set of single answers, `..._safe` say, tells their kind."""
    named = next((kind for kind in ("unsafe", "safe") if kind in behaviour.name), "response")
    kinds_of_prompt: dict[str, set[str]] = {}
    for example in behaviour.examples:
        kinds = {named if kind == "response" else kind for kind in example.answers}
        kinds_of_prompt.setdefault(normalised(example.prompt), set()).update(kinds)
    return kinds_of_prompt


def _quartiles(lengths: Sequence[int]) -> Quartiles:
    if not lengths:
        return 0, 0, 0
    low, middle, high = np.quantile(lengths, [0.25, 0.5, 0.75])
    return round(low), round(middle), round(high)


def _set_table(sets: Sequence[SetAudit]) -> list[str]:
    rows = []
    for one in sets:
        rows.append(
            {
                "data set": one.name,
                "rows": one.n_rows,
                "prompts": one.n_verbatim,
                "distinct": one.n_prompts,
                "repeats": one.n_repeats,
                "near": one.n_near,
                "both": one.n_both,
                "answers": one.n_answers,
                "refusals": _share(one.n_refusals, one.n_answers),
                "prompt chars": _spread(one.prompt_length),
                "answer chars": _spread(one.answer_length if one.n_answers else None),
                "prompt tokens": _spread(one.prompt_tokens),
                "answer tokens": _spread(one.answer_tokens),
                "templated": f"{one.n_templated} {one.template or ''}".strip(),
                "licence": one.licence,
            }
        )
    # tokens were counted where a tokenizer was given
    if not any(one.prompt_tokens for one in sets):
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


def _share(count: int, of: int) -> str:
    return f"{count} ({count / of:.1%})" if of else "-"


def _spread(quartiles: Quartiles | None) -> str:
    return "-".join(map(str, quartiles)) if quartiles else "-"


def _table(rows: Sequence[Mapping[str, object]], *, n_left: int) -> list[str]:
    """Columns as wide as what they hold; the first `n_left` are aligned left, and the last one where it is text."""
    if not rows:
        return []
    head = list(rows[0])
    lines = [head, *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_left = [i < n_left for i in range(len(head))]
    is_left[-1] = isinstance(rows[-1][head[-1]], str)
    table = []
    for line in lines:
        cells = []
        for cell, width, left in zip(line, widths, is_left, strict=True):
            cells.append(cell.ljust(width) if left else cell.rjust(width))
        table.append("  ".join(cells).rstrip())
    return table
