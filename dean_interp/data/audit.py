"""What is in data sets, and what one holds of another: duplicates, leakage, lengths.

Prompts are compared as they stand (`verbatim`), by their letters and digits in lower case (`exact`), and by the Jaccard
similarity of their word trigrams (`near`). Candidates for the latter come from MinHash (Broder 1997; `datasketch`), and
each is checked by its true similarity, so nothing is counted that is not near; of pairs at the threshold a few are
missed.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from datasketch import MinHash, MinHashLSH

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError

NEAR = 0.7
"""Jaccard similarity of word trigrams from which two prompts count as near duplicates."""
_TEMPLATES = {
    "ChatML": r"<\|im_(start|end)\|>",
    "Llama 2": r"\[/?INST\]|<</?SYS>>",
    "Llama 3": r"<\|(start_header_id|eot_id)\|>",
    "Gemma": r"<(start|end)_of_turn>",
    "Zephyr": r"<\|(user|assistant)\|>",
    "Alpaca": r"(?m)^### (Instruction|Response)\b",
    "Human and Assistant": r"(?m)^\s*(Human|Assistant|USER|ASSISTANT): ",
}
_N_HASHES = 128


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
        head = ["data set", "rows", "prompts", "distinct", "repeats", "near", "both", "answers", "refusals",
                "prompt chars", "answer chars", "prompt tokens", "answer tokens", "templated", "licence"]  # fmt: skip
        lines = [[one.name, one.n_rows, one.n_verbatim, one.n_prompts, one.n_repeats, one.n_near, one.n_both,
                  one.n_answers, _share(one.n_refusals, one.n_answers), _spread(one.prompt_length),
                  _spread(one.answer_length if one.n_answers else None), _spread(one.prompt_tokens),
                  _spread(one.answer_tokens), f"{one.n_templated} {one.template or ''}".strip(), one.licence]
                 for one in self.sets]  # fmt: skip
        counted = any(one.prompt_tokens for one in self.sets)
        kept = [i for i, name in enumerate(head) if counted or not name.endswith("tokens")]
        said = [*_table([[row[i] for i in kept] for row in (head, *lines)], 1), "", (
            "prompts: as they stand; distinct: by letters and digits; repeats: rows beyond these; near: prompts whose\n"
            f"word trigrams have a Jaccard similarity of {self.threshold:g} or more with those of one before; "
            "both: prompts with a safe\nand an unsafe answer; chars, tokens: quartiles")]  # fmt: skip
        shown = [[leak.second, leak.first, leak.n_exact, leak.n_verbatim, leak.n_near, leak.n_exact_rows,
                  leak.n_rows, leak.n_opposite] for leak in self.leaks if leak.n_exact or leak.n_near]  # fmt: skip
        if shown:
            head = ["prompts of", "that are in", "exact", "verbatim", "near too", "rows", "with near", "opposite"]
            said += ["", *_table([head, *shown], 2), "",
                     "rows: of the set on the left, with an exact one; opposite: answered safely in one set and "
                     "unsafely in the other"]  # fmt: skip
        return "\n".join([*said, *(["", "no prompt is in two of them"] if not shown and len(self.sets) > 1 else [])])


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
    _check(threshold)
    if len({one.name for one in behaviours}) < len(behaviours):
        raise InputError(f"each data set needs a name of its own, got {[one.name for one in behaviours]}")
    held = [_Prompts(one.prompts, threshold) for one in behaviours]
    given = licences or {}
    sets = [_set(one, prompts, refused, tokenize, given.get(one.name, "not stated"))
            for one, prompts in zip(behaviours, held, strict=True)]  # fmt: skip
    leaks = [_leak(behaviours[i], behaviours[j], held[i].holds(held[j])) for i, j in permutations(range(len(held)), 2)]
    return Audit(threshold, tuple(sets), tuple(leaks))


@dataclass(frozen=True)
class Leaked:
    """Test prompts that calibration holds too, each once, in the order of the test set."""

    name: str
    """Of the test set."""
    n_prompts: int
    """Distinct prompts of the test set, these among them."""
    exact: tuple[str, ...]
    """Prompts that are calibration prompts, normalised."""
    near: tuple[str, ...]
    """Further ones that are near duplicates of one."""


def without_leaks(
    test: Behaviour, calibration: Sequence[Behaviour], *, threshold: float = NEAR
) -> tuple[Behaviour, Leaked]:
    """The test examples whose prompts are no exact or near duplicates of a calibration prompt, and the others' prompts.

    Raises `InputError` where none is left.
    """
    return all_without_leaks([test], calibration, threshold=threshold)[0]


def all_without_leaks(
    tests: Sequence[Behaviour], calibration: Sequence[Behaviour], *, threshold: float = NEAR
) -> list[tuple[Behaviour, Leaked]]:
    """`without_leaks` of several test sets: the calibration prompts are hashed once."""
    _check(threshold)
    held = _Prompts([prompt for one in calibration for prompt in one.prompts], threshold)
    return [_without(test, held) for test in tests]


def _without(test: Behaviour, held: "_Prompts") -> tuple[Behaviour, Leaked]:
    found = held.holds(_Prompts(test.prompts, held.threshold))
    kept = tuple(one for one in test.examples if found[normalised(one.prompt)] is None)
    if not kept:
        raise InputError(f"every test prompt of '{test.name}' is among the calibration prompts: give other test data")
    exact, near = (tuple(prompt for prompt in dict.fromkeys(test.prompts) if found[normalised(prompt)] == kind)
                   for kind in ("exact", "near"))  # fmt: skip
    return dataclasses.replace(test, examples=kept), Leaked(test.name, len({*test.prompts}), exact, near)


class _Prompts:
    """The distinct prompts of a data set, normalised, that can say what they hold of another one's."""

    def __init__(self, prompts: Sequence[str], threshold: float) -> None:
        self.threshold = threshold
        self.trigrams = {key: _trigrams(key) for key in map(normalised, prompts)}

    @cached_property
    def hashes(self) -> dict[str, MinHash]:
        return {key: _hashes(trigrams) for key, trigrams in self.trigrams.items()}

    @cached_property
    def indexed(self) -> tuple[MinHashLSH, int]:
        """All of them, and how many have a near duplicate among those before."""
        index, n_near = MinHashLSH(threshold=max(0.05, self.threshold - 0.1), num_perm=_N_HASHES), 0
        for key in self.trigrams:
            n_near += self._near(index, self, key)
            index.insert(key, self.hashes[key])
        return index, n_near

    def holds(self, others: "_Prompts") -> dict[str, str | None]:
        """Each of the others: `exact`, `near` or None."""
        if not self.trigrams:
            return dict.fromkeys(others.trigrams)
        index, _ = self.indexed
        return {key: "exact" if key in self.trigrams else "near" if self._near(index, others, key) else None
                for key in others.trigrams}  # fmt: skip

    def _near(self, index: MinHashLSH, others: "_Prompts", key: str) -> bool:
        own, candidates = others.trigrams[key], index.query(others.hashes[key])
        return any(_jaccard(own, self.trigrams[str(one)]) >= self.threshold for one in candidates)


def normalised(text: str) -> str:
    """Lower case, letters and digits alone, one space between words; a text without any is only stripped."""
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def _set(
    behaviour: Behaviour, prompts: _Prompts, refused: Refused, tokenize: Tokenize | None, licence: str
) -> SetAudit:
    answers = [answer for one in behaviour.examples for answer in one.answers.values()]
    texts = ["\n".join((one.prompt, *one.answers.values())) for one in behaviour.examples]
    marks = [[name for name, pattern in _TEMPLATES.items() if re.search(pattern, text)] for text in texts]
    most = Counter(name for names in marks for name in names).most_common(1)
    return SetAudit(
        name=behaviour.name,
        n_rows=len(behaviour),
        n_verbatim=len(set(behaviour.prompts)),
        n_prompts=len(prompts.trigrams),
        n_repeats=len(behaviour) - len(prompts.trigrams),
        n_near=prompts.indexed[1],
        n_both=sum({"safe", "unsafe"} <= some for some in _kinds(behaviour).values()),
        n_answers=len(answers),
        n_refusals=sum(refused(answers)) if answers else 0,
        prompt_length=_quartiles(behaviour.prompts, len),
        answer_length=_quartiles(answers, len),
        prompt_tokens=_quartiles(behaviour.prompts, lambda text: len(tokenize(text))) if tokenize else None,
        answer_tokens=_quartiles(answers, lambda text: len(tokenize(text))) if tokenize and answers else None,
        n_templated=sum(map(bool, marks)),
        template=most[0][0] if most else None,
        licence=licence,
    )


def _leak(first: Behaviour, second: Behaviour, found: Mapping[str, str | None]) -> Leak:
    here, there = _kinds(first), _kinds(second)
    opposite = sum(
        ("safe" in here[key] and "unsafe" in there[key]) or ("unsafe" in here[key] and "safe" in there[key])
        for key in here.keys() & there.keys()
    )
    kinds, rows = list(found.values()), [found[normalised(prompt)] for prompt in second.prompts]
    verbatim = len(set(first.prompts) & set(second.prompts))
    return Leak(first.name, second.name, verbatim, kinds.count("exact"), kinds.count("near"),
                rows.count("exact"), len(rows) - rows.count(None), opposite)  # fmt: skip


def _kinds(behaviour: Behaviour) -> dict[str, set[str]]:
    """Kinds of answers of each prompt; a file of single answers named `..._safe...` or `..._unsafe...` tells theirs."""
    named = next((kind for kind in ("unsafe", "safe") if kind in behaviour.name), "response")
    found: dict[str, set[str]] = {}
    for one in behaviour.examples:
        kinds = {named if kind == "response" else kind for kind in one.answers}
        found.setdefault(normalised(one.prompt), set()).update(kinds)
    return found


def _quartiles(texts: Sequence[str], length: Callable[[str], int]) -> Quartiles:
    low, middle, high = np.quantile([length(text) for text in texts], [0.25, 0.5, 0.75]) if texts else (0, 0, 0)
    return round(low), round(middle), round(high)


def _share(count: int, of: int) -> str:
    return f"{count} ({count / of:.1%})" if of else "-"


def _spread(quartiles: Quartiles | None) -> str:
    return "-".join(map(str, quartiles)) if quartiles else "-"


def _table(rows: Sequence[Sequence[object]], n_left: int) -> list[str]:
    """Columns as wide as what they hold: the first `n_left` and the last to the left where it is text."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1 if isinstance(rows[-1][-1], str) else None
    return ["  ".join(f"{cell!s:<{width}}" if i < n_left or i == last else f"{cell!s:>{width}}"
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip


def _trigrams(normal: str) -> frozenset[str]:
    words = normal.split()
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def _hashes(trigrams: frozenset[str]) -> MinHash:
    hashes = MinHash(num_perm=_N_HASHES, seed=0)
    hashes.update_batch([trigram.encode() for trigram in trigrams])
    return hashes


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be in (0, 1], got {threshold}")
