"""Steps 6 to 9 of `improve`: the edit and its nulls on prompts that chose nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dean_interp.files import write_json
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished
from dean_interp.selection.gates import dosed
from dean_interp.selection.selection import Selection
from dean_interp.study.choosing import Chosen
from dean_interp.study.conclusions import design_of
from dean_interp.study.dosing import gated_state
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.method import information_before_and_under, original_of
from dean_interp.study.results import Design
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, outcomes_of
from dean_interp.study.store import State


@dataclass(frozen=True)
class Confirmed:
    """Everything that was measured on confirming prompts."""

    plan: MeasurementPlan
    original: StateOutcomes
    edit: StateOutcomes
    opposite: StateOutcomes
    flips: tuple[StateOutcomes, ...]
    random: tuple[StateOutcomes, ...]
    paper: tuple[StateOutcomes, ...]
    """Under the paper's rule, where it was asked for."""
    design: Design

    @property
    def others(self) -> list[StateOutcomes]:
        """Every state but the original and the edit, in the order of the report."""
        return [self.opposite, *self.paper, *self.flips, *self.random]


def confirm(
    folder: Path, model: HookedModel, config: ImproveConfig, chosen: Chosen, plan: MeasurementPlan
) -> Confirmed:
    """Steps 6 to 8: the nulls, what can be detected, the edit and its opposite."""
    papers = []
    if chosen.paper:
        papers.append(chosen.paper.state)
        # Mutual information under the paper's rule needs its neurons' activations in every state.
        first, second = chosen.paper.neurons
        plan = replace(plan, store=replace(plan.store, neurons=first | second))
    # The original, the edit and its opposite, and all beside them.
    total = 3 + len(papers) + len(chosen.flips) + len(chosen.random)
    with progress_bar(total=total, desc="confirming", unit="state") as progress:
        plan = replace(plan, progress=progress)
        original = original_of(plan, model)

        def measured(state: State, *, in_full: bool = False) -> StateOutcomes:
            return outcomes_of(plan, model, state, reference=original.measurement, in_full=in_full)

        flips = []
        for number, flip in enumerate(chosen.flips):
            answers = number < config.answers.n_answer_controls
            flips.append(measured(flip, in_full=answers))
        random = [measured(state) for state in chosen.random]
        design = design_of(original, flips or random)
        write_json(folder / "design.json", design)
        opposite_gates = dosed(chosen.gates, -1.0)
        opposite = measured(gated_state("opposite", "opposite", opposite_gates))
        edit = measured(gated_state("edit", "edit", chosen.gates), in_full=True)
        paper = [measured(state, in_full=True) for state in papers]
    return Confirmed(
        plan=plan,
        original=original,
        edit=edit,
        opposite=opposite,
        flips=tuple(flips),
        random=tuple(random),
        paper=tuple(paper),
        design=design,
    )


def information_of(chosen: Chosen, confirmed: Confirmed) -> dict[str, tuple[MutualInformation, ...]]:
    """Step 9: mutual information before and under the edit and the paper's rule, both beside the same nulls.

    It is between the neurons that are important to one behaviour alone by the paper's scores. Empty without the rule.
    """
    if chosen.paper is None:
        return {}
    return kept_information(
        confirmed.plan,
        confirmed.original,
        edits=[confirmed.edit, *confirmed.paper],
        nulls=[*confirmed.flips, *confirmed.random],
        neurons=chosen.paper.neurons,
    )


def kept_information(
    plan: MeasurementPlan,
    original: StateOutcomes,
    *,
    edits: Sequence[StateOutcomes],
    nulls: Sequence[StateOutcomes],
    neurons: tuple[Selection, Selection],
) -> dict[str, tuple[MutualInformation, ...]]:
    """Mutual information before and under each edit, by its name, beside the nulls; kept in the folder of the store."""

    def make(_: Unfinished) -> list[tuple[MutualInformation, ...]]:
        return information_before_and_under(plan, original, edits=edits, controls=nulls, neurons=neurons)

    depends_on = [measured.state.fingerprint for measured in (*edits, *nulls)]
    depends_on += [selection.fingerprint for selection in neurons]
    information = plan.store.record("information.json", depends_on, list[tuple[MutualInformation, ...]], make)
    return {edit.state.name: of_edit for edit, of_edit in zip(edits, information, strict=True)}
