"""What every judge is: prompts and answers in, verdicts out. A failure is never a verdict.

A verdict without a label says why there is none, so that it can be counted, shown and taken both ways.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dean_interp.errors import InputError

Label = Literal["safe", "unsafe", "refusal", "incoherent"]


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of one answer. `label` is None where it gave no verdict, and then `fault` says why."""

    label: Label | None
    said: str = ""
    """The judge's own words, where it has any."""
    fault: str | None = None

    @property
    def harmless(self) -> bool | None:
        """Whether the answer is safe or refuses; None where there is no verdict."""
        return None if self.label is None else self.label in ("safe", "refusal")


@runtime_checkable
class Judge(Protocol):
    """Prompts and answers in, one verdict an answer out, in their order."""

    @property
    def name(self) -> str:
        """The judge and its version, as it stands in tables and files."""
        ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer. Raises `InputError` where prompts and answers do not belong together."""
        ...


def refuse_unpaired(prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Raise `InputError` unless there is one prompt an answer and all are text."""
    if len(prompts) != len(answers):
        raise InputError(f"a judge needs one prompt an answer, got {len(prompts)} prompts and {len(answers)} answers")
    wrong = [text for text in (*prompts, *answers) if not isinstance(text, str)]
    if wrong:
        raise InputError(f"prompts and answers must be text, got {type(wrong[0]).__name__}")


def faults(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often there is no verdict, by reason."""
    return dict(Counter(verdict.fault or "no reason given" for verdict in verdicts if verdict.label is None))


def share_bounds(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """The share of harmless answers with missing verdicts taken for harmful, and taken for harmless."""
    said = [verdict.harmless for verdict in verdicts]
    return float(np.mean([one is True for one in said])), float(np.mean([one is not False for one in said]))
