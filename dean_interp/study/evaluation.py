"""What the evaluation of one edit found, and how it is told: one table, the primary outcome, what judges agree on."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from dean_interp.evaluation.judges import Agreement, Sensitivity
from dean_interp.evaluation.line_table import lines_frame, lines_table
from dean_interp.evaluation.lines import Line
from dean_interp.frames import Framed
from dean_interp.study.results import Answers, Design, Primary, StateResults


@dataclass(frozen=True)
class Evaluation(Framed):
    """The table and what is needed to read it."""

    n_units: int
    n_left_out: Mapping[str, int]
    """Number of prompts of each set that are left out, because they were scored, or nearly
    (`EvaluationConfig.scored_data`)."""
    design: Design
    original: StateResults
    states: tuple[StateResults, ...]
    """The edit first, then its controls."""
    primary: Primary | None
    """The outcome fixed beforehand, where there are controls."""
    agreements: tuple[Agreement, ...]
    """How far every pair of judges agrees, over all their answers of the original and the edit."""
    sensitivity: Sensitivity | None
    """What each judge makes of the edit, on the same answers; None where none was judged."""
    judge_faults: Mapping[str, Mapping[str, int]]
    """How often each judge gave no verdict, by reason."""
    caution: Mapping[str, Mapping[str, int]]
    """Cautionary phrases in the longest answers of the original and of the edit, with counts."""
    answers: Answers | None = None
    """The longest answers of the original and of the edit to every prompt; None where none was asked for."""

    @property
    def lines(self) -> tuple[Line, ...]:
        """Every outcome of the edit, before and after, beside its controls."""
        return self.states[0].lines

    def __repr__(self) -> str:
        n_controls = len(self.states) - 1
        return f"Evaluation({self.n_units} units changed, {len(self.lines)} lines, {n_controls} controls)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a line of the table (`evaluation.line_table.lines_frame`)."""
        return lines_frame(self.lines)

    def __str__(self) -> str:
        words = [*_primary_in_words(self), *_judges_in_words(self)]
        return "\n".join([lines_table(self.lines), *words])


def _primary_in_words(evaluation: Evaluation) -> list[str]:
    words = []
    primary = evaluation.primary
    if primary:
        ranks = " and ".join(f"p = {p:.2f} for {name}" for name, p in primary.p.items())
        verdict = "reached" if primary.reached else "not reached"
        words.append(f"primary outcome (both margins rise beyond every random control): {verdict}; {ranks}")
    before = evaluation.original.perplexity
    after = evaluation.states[0].perplexity
    ratio = after / before
    words.append(f"perplexity on general answers: {before:.1f} to {after:.1f} ({ratio:.2f} times)")
    return words


def _judges_in_words(evaluation: Evaluation) -> list[str]:
    words = list(map(str, evaluation.agreements))
    if evaluation.sensitivity and len(evaluation.sensitivity.changes) > 1:
        words.append(str(evaluation.sensitivity))
    for name, counts in evaluation.judge_faults.items():
        if counts:
            n_faults = sum(counts.values())
            counted = ", ".join(f"{fault} {n}" for fault, n in counts.items())
            words.append(f"{name}: no verdict in {n_faults} answers ({counted})")
    for state, phrases in evaluation.caution.items():
        shown = [f"'{phrase}' {n}" for phrase, n in phrases.items()]
        frequent = ", ".join(shown[:4]) or "none"
        words.append(f"cautionary phrases, {state}: {frequent}")
    for name, n in evaluation.n_left_out.items():
        if n:
            words.append(f"{name}: {n} prompts left out, since they were scored (or nearly)")
    return words
