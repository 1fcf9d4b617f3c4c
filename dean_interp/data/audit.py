"""What is in data sets, and what one holds of another: duplicates, leakage, lengths.

Prompts are compared as they stand (`verbatim`), by their letters and digits in lower case (`exact`), and by the Jaccard
similarity of their word trigrams (`near`). Candidates for the latter come from MinHash (Broder 1997; `datasketch`), and
each is checked by its true similarity, so nothing is counted that is not near; of pairs at the threshold a few are
missed.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from datasketch import MinHash, MinHashLSH

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError

NEAR = 0.7
"""Jaccard similarity of word trigrams from which two prompts count as near duplicates."""
_TEMPLATE_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "<|user|>",
    "### Instruction",
    "\nAssistant:",
    "<start_of_turn>",
)
_N_HASHES = 128


@dataclass(frozen=True)
class SetAudit:
    """One data set."""

    name: str
    n_rows: int
    n_verbatim: int
    """Distinct prompts as they stand."""
    n_prompts: int
    """Distinct after normalisation; the other rows repeat one."""
    n_near: int
    """Distinct prompts with a near duplicate among those before them."""
    n_both: int
    """Distinct prompts that have a safe and an unsafe answer."""
    n_answers: int
    n_refusals: int
    """Answers that `refused` calls refusals."""
    prompt_length: tuple[int, int, int]
    """Characters: first quartile, median, third quartile."""
    answer_length: tuple[int, int, int]
    n_templated: int
    """Rows that hold the marks of a chat template, which should be plain text."""
    licence: str


@dataclass(frozen=True)
class Leak:
    """What the second data set holds of the first one's prompts."""

    first: str
    second: str
    n_verbatim: int
    """Distinct prompts of the second that are prompts of the first as they stand."""
    n_exact: int
    """The same after normalisation."""
    n_near: int
    """Further ones that are near duplicates of a prompt of the first."""
    n_rows: int
    """Rows of the second with one or the other."""
    n_opposite: int
    """Prompts of both that are answered safely in one and unsafely in the other."""


@dataclass(frozen=True)
class Audit:
    """Several data sets and every ordered pair of them."""

    threshold: float
    sets: tuple[SetAudit, ...]
    leaks: tuple[Leak, ...]

    def __str__(self) -> str:
        width = max(len(one.name) for one in self.sets)
        lines = [f"{'data set':<{width}} {'rows':>6} {'prompts':>8} {'exact':>6} {'near dup.':>9} {'both':>5} "
                 f"{'answers':>8} {'refusals':>9} {'prompt chars':>15} {'answer chars':>15} "
                 f"{'templated':>9}  licence"]  # fmt: skip
        for one in self.sets:
            spread = [f"{low}-{middle}-{high}" for low, middle, high in (one.prompt_length, one.answer_length)]
            lines.append(
                f"{one.name:<{width}} {one.n_rows:>6} {one.n_verbatim:>8} {one.n_prompts:>6} {one.n_near:>9} "
                f"{one.n_both:>5} {one.n_answers:>8} {one.n_refusals:>9} {spread[0]:>15} {spread[1]:>15} "
                f"{one.n_templated:>9}  {one.licence}"
            )
        lines += ["", "prompts: distinct as they stand; exact: distinct by letters and digits; near dup.: of these, "
                  f"word-trigram Jaccard of {self.threshold} or more to another; lengths: quartiles", ""]  # fmt: skip
        shown = [leak for leak in self.leaks if leak.n_exact or leak.n_near]
        for leak in shown:
            opposite = f"; {leak.n_opposite} answered safely here, unsafely there" if leak.n_opposite else ""
            lines.append(
                f"{leak.n_exact} prompts of {leak.second} are in {leak.first} ({leak.n_verbatim} verbatim), "
                f"{leak.n_near} more nearly ({leak.n_rows} rows){opposite}"
            )
        return "\n".join([*lines, *([] if shown or len(self.sets) < 2 else ["no prompt is in two of them"])])


def audit(
    behaviours: Sequence[Behaviour],
    *,
    refused: Callable[[Sequence[str]], Sequence[bool]],
    threshold: float = NEAR,
    licences: Mapping[str, str] | None = None,
) -> Audit:
    """Look at data sets and at what each holds of the others.

    Args:
        refused: says which answers are refusals (the lexical judge, say).
        threshold: Jaccard similarity of word trigrams, in (0, 1].
        licences: by name; others are "not stated".

    Raises:
        InputError: a threshold outside (0, 1], or two data sets of one name.
    """
    _check(threshold)
    if len({one.name for one in behaviours}) < len(behaviours):
        raise InputError(f"each data set needs a name of its own, got {[one.name for one in behaviours]}")
    sets = tuple(_set(one, refused, threshold, (licences or {}).get(one.name, "not stated")) for one in behaviours)
    leaks = tuple(_leak(first, second, threshold) for first, second in permutations(behaviours, 2))
    return Audit(threshold, sets, leaks)


@dataclass(frozen=True)
class Leaked:
    """Test prompts that calibration holds too."""

    exact: tuple[str, ...]
    near: tuple[str, ...]


def without_leaks(
    test: Behaviour, calibration: Sequence[Behaviour], *, threshold: float = NEAR
) -> tuple[Behaviour, Leaked]:
    """The test examples whose prompts are no exact or near duplicates of a calibration prompt, and the others' prompts.

    Raises `InputError` where none is left.
    """
    _check(threshold)
    held = _Prompts([prompt for one in calibration for prompt in one.prompts], threshold)
    found = {prompt: held.holds(prompt) for prompt in dict.fromkeys(test.prompts)}
    kept = tuple(one for one in test.examples if found[one.prompt] is None)
    exact, near = (tuple(prompt for prompt, how in found.items() if how == kind) for kind in ("exact", "near"))
    if not kept:
        raise InputError(f"every test prompt of '{test.name}' is among the calibration prompts: give other test data")
    return dataclasses.replace(test, examples=kept), Leaked(exact, near)


class _Prompts:
    """A set of prompts that can say whether it holds another one, exactly or nearly."""

    def __init__(self, prompts: Sequence[str], threshold: float) -> None:
        self.threshold = threshold
        self.known = {normalised(prompt): _trigrams(prompt) for prompt in prompts}
        self.index = MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=_N_HASHES)
        for key, trigrams in self.known.items():
            self.index.insert(key, _hashes(trigrams))

    def holds(self, prompt: str) -> str | None:
        """`exact`, `near` or None."""
        if normalised(prompt) in self.known:
            return "exact"
        own = _trigrams(prompt)
        near = (self.known[str(key)] for key in self.index.query(_hashes(own)))
        return "near" if any(_jaccard(own, other) >= self.threshold for other in near) else None


def normalised(text: str) -> str:
    """Lower case, letters and digits alone, one space between words."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _set(
    behaviour: Behaviour, refused: Callable[[Sequence[str]], Sequence[bool]], threshold: float, licence: str
) -> SetAudit:
    answers = [answer for one in behaviour.examples for answer in one.answers.values()]
    distinct = [str(prompt) for prompt in {normalised(prompt): prompt for prompt in behaviour.prompts}.values()]
    held, n_near = _Prompts([], threshold), 0
    for prompt in distinct:
        n_near += held.holds(prompt) is not None
        held.known[normalised(prompt)] = _trigrams(prompt)
        held.index.insert(normalised(prompt), _hashes(_trigrams(prompt)))
    kinds = _kinds(behaviour)
    marked = [any(mark in text for mark in _TEMPLATE_MARKS for text in (one.prompt, *one.answers.values()))
              for one in behaviour.examples]  # fmt: skip
    return SetAudit(
        behaviour.name,
        len(behaviour),
        len(set(behaviour.prompts)),
        len(distinct),
        n_near,
        sum({"safe", "unsafe"} <= some for some in kinds.values()),
        len(answers),
        sum(refused(answers)) if answers else 0,
        _quartiles(behaviour.prompts),
        _quartiles(answers),
        sum(marked),
        licence,
    )


def _leak(first: Behaviour, second: Behaviour, threshold: float) -> Leak:
    held = _Prompts(first.prompts, threshold)
    found = {normalised(prompt): held.holds(prompt) for prompt in second.prompts}
    here, there = _kinds(first), _kinds(second)
    opposite = sum(
        ("safe" in here[key] and "unsafe" in there[key]) or ("unsafe" in here[key] and "safe" in there[key])
        for key in here.keys() & there.keys()
    )
    kinds = list(found.values())
    rows = sum(found[normalised(prompt)] is not None for prompt in second.prompts)
    verbatim = len(set(first.prompts) & set(second.prompts))
    return Leak(first.name, second.name, verbatim, kinds.count("exact"), kinds.count("near"), rows, opposite)


def _kinds(behaviour: Behaviour) -> dict[str, set[str]]:
    """Kinds of answers of each prompt; a file of single answers named `..._safe...` or `..._unsafe...` tells theirs."""
    named = next((kind for kind in ("unsafe", "safe") if kind in behaviour.name), "response")
    found: dict[str, set[str]] = {}
    for one in behaviour.examples:
        kinds = {named if kind == "response" else kind for kind in one.answers}
        found.setdefault(normalised(one.prompt), set()).update(kinds)
    return found


def _quartiles(texts: Sequence[str]) -> tuple[int, int, int]:
    low, middle, high = np.quantile([len(text) for text in texts], [0.25, 0.5, 0.75]) if texts else (0, 0, 0)
    return round(low), round(middle), round(high)


def _trigrams(text: str) -> frozenset[str]:
    words = normalised(text).split()
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
