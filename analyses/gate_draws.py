"""Does the rise depend on which examples made the gates, and does it go over to other data? Gates from several draws.

    python analyses/gate_draws.py --out runs/gate_draws

on the demo model (--model for another, --also for data sets that are measured beside the confirming prompts). Each draw
takes a random 13 of the 21 calibration topics of both behaviours, makes gates as `dean-interp improve` does, sets their
dose by KL on the same general text, and measures them on the prompts that confirm in `improve`. Gains and damage are
scored once. Resumes where it was stopped. Writes results.json, report.html and a picture (SVG, CSV).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, load_behaviour
from dean_interp.cli.ending import command, script
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import MARGIN, Outcome
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.selection.gates import dosed
from dean_interp.study import day
from dean_interp.study.arm_results import ArmResults, margin_lines
from dean_interp.study.choosing import direction_of, effects, gates_store
from dean_interp.study.dosing import Dose, gated_state, kl_meter, largest_dose
from dean_interp.study.flips import drawn_topics
from dean_interp.study.improve_data import ImproveData, improve_data
from dean_interp.study.improvement import ImproveConfig
from dean_interp.study.method import original_of
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig
from dean_interp.study.state_outcomes import measurement_plan, outcomes_of
from dean_interp.study.study_data import PromptSets


@dataclass(frozen=True)
class GateDraws:
    """Gates from several draws of the calibration topics, each measured on prompts that no draw holds."""

    out: Path = Path("runs/gate_draws")
    """The run folder."""
    n_draws: int = 5
    """Number of draws."""
    also: tuple[str, ...] = ()
    """Other data sets with safe and unsafe answers, whose test prompts are measured, too."""
    quick: bool = False
    """Make two draws."""
    study: OmitArgPrefixes[ImproveConfig] = field(default_factory=ImproveConfig)


def run(given: GateDraws) -> ArmResults:
    """Every draw, from the store where it was measured before."""
    config = dataclasses.replace(given.study, answers=AnswerConfig(n_answers=0))
    config.check()
    data = improve_data(config)
    others = [load_behaviour(source, n_examples=None, split="test") for source in given.also]
    scoring = calibration_of(data)
    with owned(given.out, dataclasses.replace(given, out=Path()), [*data.all, *others]):
        model = day.of_evaluation(config.model, given.out, ()).load()
        scores = effects(model, scoring, config, given.out)
        kl = kl_meter(gates_store(given.out / "choose", model, config, data.choosing), model)
        store = gates_store(given.out / "confirm", model, config, data.confirming, [*data.others, *others])
        plan = measurement_plan(store, PromptSets(), config.answers, model, progress=None)
        original = original_of(plan, model)
        doses: dict[str, Dose] = {}
        outcomes: dict[str, list[Outcome]] = {}
        for number in progress_bar(range(2 if given.quick else given.n_draws), desc="draws", unit="draw"):
            name = f"draw {number + 1}"
            direction = direction_of(scores, config, drawn_topics(scores, seed=number)).gates
            doses[name] = largest_dose(direction, kl, max_kl=config.max_kl)
            state = gated_state(name, "edit", dosed(direction, doses[name].dose))
            measured = outcomes_of(plan, model, state, reference=original.measurement, in_full=True)
            outcomes[name] = list(measured.outcomes)
    lines = compare_each(list(original.outcomes), outcomes)
    results = ArmResults(
        title=f"Does the rise in {config.model.title} depend on which examples made the gates?",
        model=config.model.title,
        facts=facts(data, doses),
        conclusions=conclusions(lines),
        arms=lines,
    )
    picture = changes_by_arm(results.margins, "change of the margin (nats per token)")
    page = write_arms_report(results, given.out, {"Margins by draw": picture})
    print(results, f"page: {page.resolve()}", sep="\n\n")
    return results


def calibration_of(data: ImproveData) -> list[Behaviour]:
    """All calibration examples of both behaviours; of general text and the register set what `improve` scores."""
    wholes = []
    for roles in data.roles[:2]:
        examples = roles.score.examples + roles.choose.examples
        wholes.append(dataclasses.replace(roles.score, examples=examples))
    return [*wholes, *data.scoring[2:]]


def facts(data: ImproveData, doses: Mapping[str, Dose]) -> dict[str, str]:
    """How it was done."""
    return {
        "confirming prompts": ", ".join(f"{len(part)} of {part.name}" for part in [*data.confirming, *data.others]),
        "KL on the text that chose the dose": "; ".join(f"{name}: {dose.kl.mean:.4f}" for name, dose in doses.items()),
        "command": command(),
    }


def conclusions(lines: Mapping[str, Sequence[Line]]) -> tuple[str, ...]:
    """For every data set: the changes of its margin in every draw."""
    paragraphs = []
    by_draw = {draw: margin_lines(of_draw) for draw, of_draw in lines.items()}
    for name in next(iter(by_draw.values())):
        changes = [of_draw[name].change for of_draw in by_draw.values()]
        n_rising = sum(change.low > 0 for change in changes)
        means = [change.mean for change in changes]
        paragraphs.append(
            f"{name}: {MARGIN} rises beyond its interval in {n_rising} of {len(changes)} draws; mean change "
            f"{np.mean(means):+.3f} nats per token, from {min(means):+.3f} to {max(means):+.3f}. By draw: "
            f"{'; '.join(map(str, changes))}."
        )
    return tuple(paragraphs)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(GateDraws, description=__doc__)))
