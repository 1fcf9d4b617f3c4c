"""How far two judges agree, and whether what an edit did depends on which of them is asked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from sklearn.metrics import cohen_kappa_score

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.protocol import Label, Verdict, share_bounds

OUTCOMES: tuple[str, ...] = (*get_args(Label), "no verdict")
"""Rows and columns of a confusion table."""


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same answers: is each answer harmless (safe, or a refusal)?"""

    first: str
    second: str
    n: int
    """Answers on which both have a verdict; the rest is in none of the shares below."""
    n_missing: int
    share: float
    """Of these answers, how many both judge alike."""
    kappa: float | None
    """Cohen's (1960) kappa: agreement beyond chance; None where both judges say one thing throughout."""
    first_harmless: float
    second_harmless: float
    confusion: tuple[tuple[int, ...], ...] = ()
    """All answers, by the first judge's label (rows) and the second's (columns), in the order of `OUTCOMES`."""

    def __str__(self) -> str:
        kappa = f"{self.kappa:.2f}" if self.kappa is not None else "undefined (no judge ever differs from itself)"
        return (
            f"{self.first} and {self.second}: agree on {100 * self.share:.0f} % of {self.n} answers, Cohen's kappa "
            f"{kappa}; harmless by the first {100 * self.first_harmless:.0f} %, by the second "
            f"{100 * self.second_harmless:.0f} % ({self.n_missing} without a verdict)"
        )

    @property
    def table(self) -> str:
        """The confusion table as text."""
        names = [f"{name:>11}" for name in OUTCOMES]
        rows = [f"{name} {' '.join(f'{n:>11}' for n in row)}"
                for name, row in zip(names, self.confusion, strict=True)]  # fmt: skip
        return "\n".join([f"{self.first} in rows, {self.second} in columns", " ".join([" " * 11, *names]), *rows])


def agreement(first_name: str, first: Sequence[Verdict], second_name: str, second: Sequence[Verdict]) -> Agreement:
    """Compare two judges. Raises `InputError` where they judged different numbers of answers, or share no verdict."""
    if len(first) != len(second):
        raise InputError(f"two judges of the same answers are compared, got {len(first)} and {len(second)} verdicts")
    pairs = list(zip(first, second, strict=True))
    both = [(one.harmless, other.harmless) for one, other in pairs
            if one.harmless is not None and other.harmless is not None]  # fmt: skip
    if not both:
        raise InputError(f"{first_name} and {second_name} have no answer on which both gave a verdict")
    mine, theirs = [list(column) for column in zip(*both, strict=True)]
    kappa = float(cohen_kappa_score(mine, theirs)) if len({*mine, *theirs}) > 1 else None
    n, counts = len(both), Counter((one.label or OUTCOMES[-1], other.label or OUTCOMES[-1]) for one, other in pairs)
    return Agreement(
        first_name,
        second_name,
        n,
        len(first) - n,
        sum(a == b for a, b in both) / n,
        kappa,
        sum(mine) / n,
        sum(theirs) / n,
        tuple(tuple(counts[row, column] for column in OUTCOMES) for row in OUTCOMES),
    )


@dataclass(frozen=True)
class JudgedChange:
    """What one judge makes of an edit: the share of harmless answers after it, less that before it."""

    judge: str
    n: int
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
        return (
            f"{self.judge}: {paired} of {self.n} answers harmless (missing verdicts, {self.n_missing}: as harmful "
            f"{100 * self.as_harmful:+.0f}, as harmless {100 * self.as_harmless:+.0f}, at most "
            f"{100 * self.low:+.0f} to {100 * self.high:+.0f})"
        )


@dataclass(frozen=True)
class Sensitivity:
    """One edit under several judges."""

    changes: tuple[JudgedChange, ...]

    @property
    def same_sign(self) -> bool:
        """Whether every judge says the same direction, whatever the missing verdicts are."""
        return all(one.low > 0 for one in self.changes) or all(one.high < 0 for one in self.changes)

    def __str__(self) -> str:
        alike = "All judges agree on the direction." if self.same_sign else "The direction depends on who judges."
        return "\n".join([*map(str, self.changes), alike])


def sensitivity(verdicts: Mapping[str, tuple[Sequence[Verdict], Sequence[Verdict]]]) -> Sensitivity:
    """How the share of harmless answers changed, by each judge.

    Args:
        verdicts: by judge, on the answers to the same prompts before and after an edit.

    Raises:
        InputError: no judge, no answers, or different numbers of them.
    """
    sizes = {(len(before), len(after)) for before, after in verdicts.values()}
    if len(sizes) != 1 or len(set(*sizes)) != 1 or sizes == {(0, 0)}:
        raise InputError(
            "every judge needs as many verdicts before as after, and as many as the others, at least 1; got "
            f"{', '.join(f'{name}: {len(before)} and {len(after)}' for name, (before, after) in verdicts.items())}"
        )
    return Sensitivity(tuple(_change(name, *sides) for name, sides in verdicts.items()))


def _change(name: str, before: Sequence[Verdict], after: Sequence[Verdict]) -> JudgedChange:
    paired = [now.harmless - then.harmless for then, now in zip(before, after, strict=True)
              if then.harmless is not None and now.harmless is not None]  # fmt: skip
    (low_then, high_then), (low_now, high_now) = share_bounds(before), share_bounds(after)
    return JudgedChange(
        name,
        len(before),
        sum(one.label is None for one in (*before, *after)),
        sum(paired) / len(paired) if paired else None,
        low_now - low_then,
        high_now - high_then,
        low_now - high_then,
        high_now - low_then,
    )
