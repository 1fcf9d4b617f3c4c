"""Does mutual information between the behaviours fall where an edit mends their conflict? At the doses of a comparison.

    python analyses/frontier_information.py --frontier runs/frontier --out runs/frontier_information

takes a finished `frontier.py` of any model, and estimates `downstream_mi` and `awareness_mi` before and under the
paper's rule and the edits that raise both behaviours, each at its dose, on the confirming prompts. Beside them stand
random gates of the same KL. The paper's theory says that the information falls where the conflict is mended. Resumes
where it was stopped. Writes results.json, and a page for each edit.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dean_interp.arms.all_arms import all_arms
from dean_interp.arms.arm import Arm
from dean_interp.arms.at_kl import dose_at_kl
from dean_interp.arms.comparison import ComparisonConfig, SharedWork, begun, records_of
from dean_interp.arms.coupled_arms import rule_scores
from dean_interp.arms.measured_arms import named
from dean_interp.arms.random_arms import RandomGatesArm
from dean_interp.cli.ending import command, script
from dean_interp.errors import InputError
from dean_interp.files import write_json, write_text
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.html import write_information_report
from dean_interp.resume import read_kept
from dean_interp.selection.selection import Selection
from dean_interp.study import day
from dean_interp.study.confirming import kept_information
from dean_interp.study.dosing import state_kl_meter
from dean_interp.study.improve_data import improve_data
from dean_interp.study.method import disjoint_neurons, original_of
from dean_interp.study.results import InformationResults
from dean_interp.study.run_folder import begun_with, owned
from dean_interp.study.settings import INFORMATION_FRACTION, AnswerConfig
from dean_interp.study.state_outcomes import MeasurementPlan, StateOutcomes, outcomes_of
from dean_interp.study.store import State, file_name
from dean_interp.study.study_data import PromptSets

DOSES = "doses.json"


@dataclass(frozen=True)
class FrontierInformation:
    """Mutual information before and under the arms of a comparison."""

    frontier: Path = Path("runs/frontier")
    """The run folder of the comparison."""
    out: Path = Path("runs/frontier_information")
    """The run folder."""
    arms: tuple[str, ...] = ("paper's rule, neurons", "silencing by sign", "gates, closed form", "gates of improve")
    """Arms that change neurons, by name."""
    n_nulls: int = 19
    """Number of random gates of the same KL. Below 19, p cannot reach 0.05."""


def run(given: FrontierInformation) -> dict[str, tuple[MutualInformation, ...]]:
    """Both estimands before and under every arm."""
    config = begun_with(given.frontier, ComparisonConfig).config
    config = dataclasses.replace(
        config,
        study=dataclasses.replace(config.study, model=day.of_run(config.study.model, given.frontier)),
    )
    arms = _arms(given, config)
    data = improve_data(config.study)
    settings = dataclasses.replace(given, out=Path(), frontier=Path())
    with owned(given.out, settings, data.all):
        model = config.study.model.load()
        work = begun(given.frontier, config, data, model)
        neurons = disjoint_neurons(rule_scores(work.examples(arms[0]), "neuron"), INFORMATION_FRACTION)
        plan = _plan(work, given.out, neurons)
        edits = [_state(work, arm) for arm in arms]
        nulls = _nulls(work, given)
        information = _estimated(plan, model, edits, nulls, neurons)
    write_json(given.out / "results.json", information)
    text = "\n\n".join(_in_words(given.out, config, name, of_arm) for name, of_arm in information.items())
    write_text(given.out / "summary.md", text + "\n")
    print(text)
    return information


def _arms(given: FrontierInformation, config: ComparisonConfig) -> list[Arm]:
    """The arms by name. Raises `InputError` where one is unknown, or is not done."""
    known = {arm.name: arm for arm in all_arms(config.study.n_random)}
    records = records_of(given.frontier, given.arms)
    for name in given.arms:
        if name not in known or name not in records or not records[name].states:
            raise InputError(f"{given.frontier} holds no finished arm '{name}'; finished: {', '.join(records)}")
    return [known[name] for name in given.arms]


def _plan(work: SharedWork, out: Path, neurons: tuple[Selection, Selection]) -> MeasurementPlan:
    """Measures on confirming prompts, and keeps the neurons' activations at the ends of texts."""
    store = dataclasses.replace(work.confirm.store, folder=out, neurons=neurons[0] | neurons[1], others=())
    no_answers = AnswerConfig(n_answers=0, n_answer_controls=0)
    return dataclasses.replace(work.confirm, store=store, prompts=PromptSets(), config=no_answers)


def _state(work: SharedWork, arm: Arm) -> State:
    """An arm at its dose."""
    record = records_of(work.folder, [arm.name])[arm.name]
    at = next(state for state in record.states if state.kl == work.config.chosen_at)
    change = arm.fit(work.examples(arm), record.settings)
    return named(change.at(at.dose), arm.name)


def _nulls(work: SharedWork, given: FrontierInformation) -> list[State]:
    """Random gates at doses of their own; the doses are kept."""
    path, kl = given.out / DOSES, work.config.chosen_at
    doses = read_kept(path, dict[str, float]) if path.is_file() else {}
    meter, start, nulls = state_kl_meter(work.choose.store, work.model), None, []
    # Random arms of the comparison have the first numbers.
    first = work.config.study.n_random + 1
    for number in progress_bar(range(first, first + given.n_nulls), desc="doses of nulls", unit="null"):
        arm = RandomGatesArm(number)
        change = arm.fit(work.examples(arm), {})
        if arm.name not in doses:
            doses[arm.name] = dose_at_kl(change, meter, kl=kl, start=start).dose
            write_text(path, json.dumps(doses) + "\n")
        start = doses[arm.name]
        nulls.append(named(change.at(start), arm.name))
    return nulls


def _estimated(
    plan: MeasurementPlan,
    model: HookedModel,
    edits: Sequence[State],
    nulls: Sequence[State],
    neurons: tuple[Selection, Selection],
) -> dict[str, tuple[MutualInformation, ...]]:
    """Before and under every edit, beside the nulls."""
    original = original_of(plan, model)
    measured: dict[str, StateOutcomes] = {}
    for state in progress_bar([*edits, *nulls], desc="states", unit="state"):
        measured[state.name] = outcomes_of(plan, model, state, reference=original.measurement, in_full=False)

    return kept_information(
        plan,
        original,
        edits=[measured[state.name] for state in edits],
        nulls=[measured[state.name] for state in nulls],
        neurons=neurons,
    )


def _in_words(out: Path, config: ComparisonConfig, name: str, informations: tuple[MutualInformation, ...]) -> str:
    """What both estimands say of one arm; its page is written."""
    facts = {
        "arm": name,
        "KL": f"{config.chosen_at:g} nats per token, or what the whole set reaches",
        "command": command(),
    }
    results = InformationResults(config.study.model.title, facts, informations)
    write_information_report(results, out / "pages" / file_name(name))
    return "\n".join([f"{name}:", *(information.headline for information in informations)])


if __name__ == "__main__":
    script(lambda: run(tyro.cli(FrontierInformation, description=__doc__)))
