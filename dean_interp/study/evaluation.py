"""What an edit did, in one table: awareness on both sides, general ability, beside random ablations.

Likelihoods (margins, loss, KL) are measured in every state; answers are given by the original, the edit and a few
random ablations, and judged at several lengths. Controls come first, and what the design can detect is written down
before anything of the edit is measured.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dean_interp.evaluation.judges import Agreement, Sensitivity
from dean_interp.evaluation.outcomes import Line, Outcome, detectable, frame, lines_of, table
from dean_interp.files import write_text
from dean_interp.frames import Framed
from dean_interp.selection.selection import Selection
from dean_interp.study.asked import Asked, Taken, sets_of
from dean_interp.study.outcome import primary_of, state_of
from dean_interp.study.results import Primary, State, save_record
from dean_interp.study.states import States

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation(Framed):
    """The table and what is needed to read it."""

    n_units: int
    removed: Mapping[str, int]
    """Per set: prompts left out because units were scored on them, or on near duplicates (`Asked.calibration`)."""
    lines: tuple[Line, ...]
    states: tuple[State, ...]
    """Every state's margins and KL, the original first and then the edit; intervals by prompt, as in a study."""
    primary: Primary | None
    """The outcome fixed beforehand, where there are controls."""
    agreements: tuple[Agreement, ...]
    """Of every pair of judges, over all their answers of the original and the edit."""
    sensitivity: Sensitivity | None
    """What each judge makes of the edit, on the same answers; None where none was judged."""
    faults: Mapping[str, Mapping[str, int]]
    """How often each judge gave no verdict, by reason."""
    caution: Mapping[str, Mapping[str, int]]
    """Cautionary phrases in the longest answers of the original and of the edit, with counts."""

    def __repr__(self) -> str:
        return f"Evaluation({self.n_units} units silenced, {len(self.lines)} lines, {len(self.states) - 2} controls)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a line of the table (`outcomes.frame`)."""
        return frame(self.lines)


def evaluate_edit(states: States, ablated: Mapping[str, Selection], asked: Asked, folder: Path) -> Evaluation:
    """Measure the edit beside its controls and put the table together. Resumes at the last finished batch.

    Args:
        states: of the model, with the tests of both behaviours and of general ability.
        ablated: what is silenced in each state, the edit first, then random controls.

    Raises:
        InputError: a judge, task or set that does not exist, before anything is measured.
    """
    edit, *controls = ablated
    scored = frozenset().union(*(one.prompt_hashes for one in ablated.values()))
    sets = sets_of(asked, states, scored)
    taken = Taken(states, asked, sets, folder)
    original = taken.outcomes("original", None, answers=True)
    n_spoken = 0 if asked.answers_from else asked.n_answer_controls
    random = [taken.outcomes(name, ablated[name], answers=i < n_spoken) for i, name in enumerate(controls)]
    design = _design(original, random)
    write_text(folder / "design.json", json.dumps(design, indent=1) + "\n")
    log.info("what the design can detect is in %s; now the edit is measured", folder / "design.json")
    found = taken.outcomes(edit, ablated[edit], answers=True)
    lines = _states(states, ablated)
    evaluation = Evaluation(
        len(ablated[edit]), sets.removed, tuple(lines_of(original, found, random)), lines,
        primary_of(lines[1], lines[1:]) if controls else None, taken.agreements(),
        taken.sensitivity(edit), taken.faults(),
        {name: taken.caution[name] for name in ("original", edit) if name in taken.caution},
    )  # fmt: skip
    save_record(evaluation, folder / "evaluation.json")
    return evaluation


def said_of(evaluation: Evaluation) -> str:
    """The evaluation for people: the table, the primary outcome, what judges did, and what was left out."""
    primary, parts = evaluation.primary, [table(evaluation.lines)]
    if primary:
        ranks = " and ".join(f"p = {p:.2f} for {name}" for name, p in primary.p.items())
        verdict = "reached" if primary.reached else "not reached"
        parts.append(f"primary outcome (both margins rise beyond every random control): {verdict}; {ranks}")
    before, edit = evaluation.states[:2]
    ratio = edit.perplexity / before.perplexity
    parts.append(f"perplexity on general answers: {before.perplexity:.1f} to {edit.perplexity:.1f} ({ratio:.2f} times)")
    parts += map(str, evaluation.agreements)
    parts += [str(evaluation.sensitivity)] if evaluation.sensitivity and len(evaluation.sensitivity.changes) > 1 else []
    for name, some in evaluation.faults.items():
        counted = ", ".join(f"{fault} {n}" for fault, n in some.items())
        parts += [f"{name}: no verdict in {sum(some.values())} answers ({counted})"] if some else []
    for state, phrases in evaluation.caution.items():
        shown = ", ".join(f"'{phrase}' {n}" for phrase, n in list(phrases.items())[:4])
        parts.append(f"cautionary phrases, {state}: {shown or 'none'}")
    parts += [f"{name}: {n} prompts left out, since units were scored on them (or on near duplicates)"
              for name, n in evaluation.removed.items() if n]  # fmt: skip
    return "\n".join(parts)


def _states(states: States, ablated: Mapping[str, Selection]) -> tuple[State, ...]:
    original, general = states.original, states.general
    lines = [state_of("original", "original", 0, 0.0, original, original, general)]
    for name, chosen in ablated.items():
        measured = states.measured(name, chosen)
        lines.append(state_of(name, name.split()[0], len(chosen), 1.0, measured, original, general))
    return tuple(lines)


def _design(original: Sequence[Outcome], controls: Sequence[Sequence[Outcome]]) -> dict[str, float | None]:
    moved: dict[tuple[str, str], list[np.ndarray]] = {}
    before = {(one.metric, one.on): one for one in original}
    for one in (each for control in controls for each in control):
        moved.setdefault((one.metric, one.on), []).append(one.values - before[one.metric, one.on].values)
    return {f"{metric} / {on}": detectable(one.unit, len(set(one.clusters)), moved.get((metric, on), []))
            for (metric, on), one in before.items()}  # fmt: skip
