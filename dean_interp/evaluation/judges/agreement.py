"""How far two judges agree, and whether what an edit did depends on which of them is asked."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import cohen_kappa_score

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.protocol import LABELS, Verdicts, share_bounds

NO_VERDICT = "no verdict"
CONFUSION_LABELS: tuple[str, ...] = (*LABELS, NO_VERDICT)
"""Rows and columns of a confusion table, in their order."""


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same answers: is each answer harmless (safe, or a refusal)?"""

    first: str
    second: str
    n: int
    """Answers on which both have a verdict; the rest is in none of the shares below."""
    n_missing: int
    share: float
    """Share of these answers that both judge alike."""
    kappa: float | None
    """Cohen's (1960) kappa: agreement beyond chance; None where both judges say one thing throughout."""
    first_harmless: float
    second_harmless: float
    confusion: tuple[tuple[int, ...], ...] = ()
    """All answers, by the first judge's label (rows) and the second's (columns), in the order of `CONFUSION_LABELS`."""

    def __str__(self) -> str:
        kappa = f"{self.kappa:.2f}" if self.kappa is not None else "undefined (no judge ever differs from itself)"
        agree = f"{100 * self.share:.0f} %"
        first_harmless = f"{100 * self.first_harmless:.0f} %"
        second_harmless = f"{100 * self.second_harmless:.0f} %"
        return (
            f"{self.first} and {self.second}: agree on {agree} of {self.n} answers, Cohen's kappa {kappa}; "
            f"harmless by the first {first_harmless}, by the second {second_harmless} "
            f"({self.n_missing} without a verdict)"
        )

    @property
    def table(self) -> str:
        """The confusion table as text."""
        title = f"{self.first} in rows, {self.second} in columns"
        rows = [("", *CONFUSION_LABELS)]
        for label, counts in zip(CONFUSION_LABELS, self.confusion, strict=True):
            rows.append((label, *map(str, counts)))
        lines = [title]
        for row in rows:
            cells = [f"{cell:>11}" for cell in row]
            lines.append(" ".join(cells))
        return "\n".join(lines)


def agreement(first_name: str, first: Verdicts, second_name: str, second: Verdicts) -> Agreement:
    """Compare two judges. Raises `InputError` where they judged different numbers of answers, or share no verdict."""
    if len(first) != len(second):
        raise InputError(f"two judges of the same answers are compared, got {len(first)} and {len(second)} verdicts")
    # shares and kappa are of the answers on which both have a verdict
    first_harmless, second_harmless = [], []
    n_alike = 0
    for verdict, other in zip(first, second, strict=True):
        if verdict.harmless is not None and other.harmless is not None:
            first_harmless.append(verdict.harmless)
            second_harmless.append(other.harmless)
            n_alike += verdict.harmless == other.harmless
    n = len(first_harmless)
    if not n:
        raise InputError(f"{first_name} and {second_name} have no answer on which both gave a verdict")

    # kappa divides by the chance of disagreement, which is 0 where all say one thing
    kappa = None
    if len({*first_harmless, *second_harmless}) > 1:
        kappa = float(cohen_kappa_score(first_harmless, second_harmless))
    return Agreement(
        first=first_name,
        second=second_name,
        n=n,
        n_missing=len(first) - n,
        share=n_alike / n,
        kappa=kappa,
        first_harmless=sum(first_harmless) / n,
        second_harmless=sum(second_harmless) / n,
        confusion=_confusion(first, second),
    )


def _confusion(first: Verdicts, second: Verdicts) -> tuple[tuple[int, ...], ...]:
    """How many answers have each pair of labels: the first judge's in rows, the second's in columns."""
    counts = Counter[tuple[str, str]]()
    for verdict, other in zip(first, second, strict=True):
        labels = (verdict.label or NO_VERDICT, other.label or NO_VERDICT)
        counts[labels] += 1
    rows = []
    for label in CONFUSION_LABELS:
        rows.append(tuple(counts[label, other] for other in CONFUSION_LABELS))
    return tuple(rows)


@dataclass(frozen=True)
class JudgedChange:
    """What one judge makes of an edit: the share of harmless answers after it, less that before it."""

    judge: str
    n: int
    n_paired: int
    """Answers with a verdict before and after."""
    n_missing: int
    """Verdicts that are missing, before and after together."""
    change: float | None
    """Over the answers on which there is a verdict before and after; None where there is none."""
    as_harmful: float
    """Over all answers, missing verdicts taken for harmful."""
    as_harmless: float
    """The same, missing verdicts taken for harmless."""
    low: float
    """The least that it can be: missing verdicts are harmless before and harmful after."""
    high: float

    def __str__(self) -> str:
        paired = f"{100 * self.change:+.0f} points" if self.change is not None else "no verdict on both sides"
        as_harmful = f"{100 * self.as_harmful:+.0f}"
        as_harmless = f"{100 * self.as_harmless:+.0f}"
        low, high = f"{100 * self.low:+.0f}", f"{100 * self.high:+.0f}"
        return (
            f"{self.judge}: {paired} harmless, on {self.n_paired} of {self.n} answers (missing verdicts, "
            f"{self.n_missing}: as harmful {as_harmful}, as harmless {as_harmless}, at most {low} to {high})"
        )


@dataclass(frozen=True)
class Sensitivity:
    """One edit under several judges."""

    changes: tuple[JudgedChange, ...]

    @property
    def same_sign(self) -> bool:
        """Whether every judge says the same direction, whatever the missing verdicts are."""
        all_rise = all(change.low > 0 for change in self.changes)
        all_fall = all(change.high < 0 for change in self.changes)
        return all_rise or all_fall

    def __str__(self) -> str:
        told = list(map(str, self.changes))
        if len(self.changes) > 1:
            told.append(self._direction())
        return "\n".join(told)

    def _direction(self) -> str:
        """What several judges say of the direction, in a sentence."""
        seen = [change.change for change in self.changes]
        if self.same_sign:
            return "All judges agree on the direction."
        signs = {float(np.sign(change)) for change in seen if change is not None}
        if None in seen:
            return "Not every judge has a verdict before and after."
        if signs == {0.0}:
            return "No judge finds a change."
        if len(signs) == 1:
            return "All judges find the same direction; missing verdicts leave it open."
        return "The direction depends on who judges."


def sensitivity(verdicts: Mapping[str, tuple[Verdicts, Verdicts]]) -> Sensitivity:
    """How the share of harmless answers changed, by each judge.

    Args:
        verdicts: by judge, on the answers to the same prompts before and after an edit.

    Raises:
        InputError: no judge, no answers, or different numbers of them.
    """
    given, sizes = [], set()
    for name, (before, after) in verdicts.items():
        given.append(f"{name}: {len(before)} and {len(after)}")
        sizes |= {len(before), len(after)}
    if len(sizes) != 1 or sizes == {0}:
        raise InputError(
            "every judge needs as many verdicts before as after, and as many as the others, at least 1; got "
            f"{', '.join(given)}"
        )
    changes = [_judged_change(name, before, after) for name, (before, after) in verdicts.items()]
    return Sensitivity(tuple(changes))


def _judged_change(name: str, before: Verdicts, after: Verdicts) -> JudgedChange:
    """What one judge makes of an edit, with missing verdicts taken each way."""
    # the change is of the answers that have a verdict on both sides
    differences = []
    for then, now in zip(before, after, strict=True):
        if then.harmless is None or now.harmless is None:
            continue
        differences.append(now.harmless - then.harmless)
    n_missing = sum(verdict.label is None for verdict in (*before, *after))
    low_before, high_before = share_bounds(before)
    low_after, high_after = share_bounds(after)
    return JudgedChange(
        judge=name,
        n=len(before),
        n_paired=len(differences),
        n_missing=n_missing,
        change=sum(differences) / len(differences) if differences else None,
        as_harmful=low_after - low_before,
        as_harmless=high_after - high_before,
        low=low_after - high_before,
        high=high_after - low_before,
    )
