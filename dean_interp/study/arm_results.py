"""Arms: several states of one model, or several models, compared with the original in one table.

An arm is measured once, by the store, like every state. It may be another model altogether (fine-tuned, quantised). No
KL is taken then: that needs two states that share their unembedding.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dean_interp.data.examples import Behaviour
from dean_interp.editing.values import Value, Zero
from dean_interp.errors import InputError, did_you_mean
from dean_interp.evaluation.line_table import lines_frame
from dean_interp.evaluation.lines import Line
from dean_interp.evaluation.outcomes import MARGIN, Outcome
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.frames import Framed
from dean_interp.models.load import HookedModel
from dean_interp.selection.selection import Selection
from dean_interp.selection.strata import Strata
from dean_interp.statistics import Interval
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import random_control
from dean_interp.study.state_outcomes import MeasurementPlan, is_known, measurement_plan, outcomes_of
from dean_interp.study.store import State, Store, file_name, fingerprint_of
from dean_interp.study.study_data import PromptSets


@dataclass(frozen=True)
class ArmResults(Framed):
    """What a study of several arms found: states of one model, or several models."""

    title: str
    model: str
    facts: Mapping[str, str]
    """How it was done. `command` makes it again."""
    conclusions: tuple[str, ...]
    """What follows from the lines, in plain words, one paragraph each."""
    arms: Mapping[str, tuple[Line, ...]]
    """The lines of each arm: every outcome before (the original) and after."""

    def __str__(self) -> str:
        return "\n\n".join(self.conclusions)

    def __repr__(self) -> str:
        return f"ArmResults({self.title!r}, {len(self.arms)} arms)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a line of an arm (`evaluation.line_table.lines_frame`)."""
        if not self.arms:
            return pd.DataFrame({"conclusions": self.conclusions})
        tables = [lines_frame(lines).assign(arm=arm) for arm, lines in self.arms.items()]
        return pd.concat(tables, ignore_index=True)

    @property
    def margins(self) -> dict[str, dict[str, Interval]]:
        """The change of each behaviour's margin in every arm."""
        changes: dict[str, dict[str, Interval]] = {}
        for arm, lines in self.arms.items():
            for name, line in margin_lines(lines).items():
                changes.setdefault(f"{name} margin", {})[arm] = line.change
        return changes

    def line(self, arm: str, metric: str, on: str) -> Line:
        """One line of one arm. Raises `InputError` where there is none."""
        for line in self.arms.get(arm, ()):
            if (line.metric, line.on) == (metric, on):
                return line
        hint = did_you_mean(arm, self.arms)
        raise InputError(f"no '{metric}' on {on} in the arm {arm!r}{hint}; arms: {', '.join(self.arms)}")


def margin_lines(lines: Sequence[Line]) -> dict[str, Line]:
    """Each behaviour's margin among an arm's lines."""
    return {line.on: line for line in lines if line.metric == MARGIN}


def arm(name: str, ablated: Selection | None = None, value: Value = Zero()) -> State:  # noqa: B008 - frozen
    """An arm as a state, with units that are changed in it or without.

    Each arm counts as another model, of its own name: what fills its units (`value`) may come from a checkpoint that
    the store knows nothing of, so no two arms share a measurement.
    """
    return State(name=name, kind="arm", ablated=ablated, value=value, model=name)


def random_arms(edit: State, strata: Strata, *, n: int, seed: int) -> list[State]:
    """Random arms beside one: as many units, matched by site and stratum, and the same value in their place.

    Args:
        strata: what they are matched on (`selection.strata`).
        n: how many.
        seed: seed of the draws, those of a study's size-matched controls.
    """
    assert edit.ablated is not None, f"{edit.name} silences nothing that random units could be like"
    arms = []
    for number in range(n):
        drawn = random_control(edit.ablated, strata, seed=seed, number=number)
        name = f"{edit.name}, random {number + 1}"
        arms.append(arm(name, drawn, edit.value))
    return arms


def arms_plan(
    config: StudyConfig,
    folder: Path,
    tests: Sequence[Behaviour],
    prompts: PromptSets = PromptSets(),  # noqa: B008 - frozen
) -> MeasurementPlan:
    """What is measured of each arm, and where it is kept.

    The folder must belong to these settings and data alone (`run_folder.owned`). Prompts are answered by arms that are
    measured in full.
    """
    store = Store(
        folder=folder,
        fingerprint=fingerprint_of(str(config), *(test.fingerprint for test in tests)),
        tests=tests,
        config=config.data,
        template=config.model.template,
    )
    # Studies of arms show bars of their own, over what they loop over.
    return measurement_plan(store=store, prompts=prompts, config=config.answers, model=None, progress=None)


def arm_outcomes(
    plan: MeasurementPlan, state: State, model: HookedModel | None, *, in_full: bool = False
) -> list[Outcome]:
    """Margins and loss on general answers of one arm; in full, also its answers and what else the settings ask for.

    Args:
        model: None where the arm is in the store (`state_outcomes.is_known`).
    """
    measured = outcomes_of(plan, model, state, reference=None, in_full=in_full)
    # Arms are compared by loss: KL is not taken.
    return [outcome for outcome in measured.outcomes if not outcome.metric.startswith("KL")]


def fine_tuned_arms(
    plan: MeasurementPlan,
    config: StudyConfig,
    name: str,
    behaviours: Sequence[Behaviour],
    tuning: FineTuningConfig,
    *,
    at: Sequence[int] | None = None,
) -> dict[int, list[Outcome]]:
    """Outcomes of one fine-tuning of the study's model, by step. Its checkpoints go when all are in the store.

    Only after the last step is the arm measured in full.

    Args:
        at: the steps to look at, multiples of `tuning.every`; None: all of them.
    """
    steps = at or range(tuning.every, tuning.n_steps + 1, tuning.every)
    states = {step: arm(f"{name}, step {step}") for step in steps}
    folder = plan.store.folder / "tuned" / file_name(name)

    def is_last(step: int) -> bool:
        return step == tuning.n_steps

    def watch(step: int, model: HookedModel) -> None:
        if step in states:
            arm_outcomes(plan, states[step], model, in_full=is_last(step))

    all_are_known = all(is_known(plan, state, in_full=is_last(step)) for step, state in states.items())
    if not all_are_known:
        fine_tune(
            config.model.name,
            behaviours,
            tuning,
            folder=folder,
            template=config.model.template,
            watch=watch,
            device=config.model.device,
            dtype=config.model.dtype,
            adapter=config.model.adapter,
        )
    shutil.rmtree(folder, ignore_errors=True)
    outcomes = {}
    for step, state in states.items():
        outcomes[step] = arm_outcomes(plan, state, None, in_full=is_last(step))
    return outcomes
