"""How far two judges agree, and whether the answer depends on which of them is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import cohen_kappa_score

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.protocol import Verdict


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same answers: is each answer harmless (safe, or a refusal)?"""

    first: str
    second: str
    n: int
    """Answers on which both have a verdict; the rest is in none of the numbers below."""
    n_missing: int
    share: float
    """Of these answers, how many both judge alike."""
    kappa: float | None
    """Cohen's (1960) kappa: agreement beyond chance; None where both judges say one thing throughout."""
    first_harmless: float
    second_harmless: float

    def __str__(self) -> str:
        kappa = f"{self.kappa:.2f}" if self.kappa is not None else "undefined (no judge ever differs from itself)"
        return (
            f"{self.first} and {self.second}: agree on {100 * self.share:.0f} % of {self.n} answers, Cohen's kappa "
            f"{kappa}; harmless by the first {100 * self.first_harmless:.0f} %, by the second "
            f"{100 * self.second_harmless:.0f} % ({self.n_missing} without a verdict)"
        )


def agreement(first_name: str, first: Sequence[Verdict], second_name: str, second: Sequence[Verdict]) -> Agreement:
    """Compare two judges. Raises `InputError` where they judged different numbers of answers, or share no verdict."""
    if len(first) != len(second):
        raise InputError(f"two judges of the same answers are compared, got {len(first)} and {len(second)} verdicts")
    both = [(one.harmless, other.harmless) for one, other in zip(first, second, strict=True)
            if one.harmless is not None and other.harmless is not None]  # fmt: skip
    if not both:
        raise InputError(f"{first_name} and {second_name} have no answer on which both gave a verdict")
    mine, theirs = [list(column) for column in zip(*both, strict=True)]
    kappa = float(cohen_kappa_score(mine, theirs)) if len({*mine, *theirs}) > 1 else None
    n = len(both)
    return Agreement(
        first_name,
        second_name,
        n,
        len(first) - n,
        sum(a == b for a, b in both) / n,
        kappa,
        sum(mine) / n,
        sum(theirs) / n,
    )
