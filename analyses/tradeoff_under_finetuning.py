"""Does fine-tuning for one behaviour lower the other? Full fine-tuning and adapters on either behaviour and on both.

    python analyses/tradeoff_under_finetuning.py --out runs/tradeoff

on the demo model (--model for another, --first and --second for other data: `paper:fairness@folder`). Margins are taken
along the steps, answers at the end, on test prompts, for several seeds. Resumes where it was stopped. Writes
results.json, report.html and a picture (SVG, CSV). The paper's claim is that privacy rises and fairness falls where
only privacy is trained; its dose is not stated, the one here is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from published_numbers import published
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour
from dean_interp.cli.ending import command, script
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import Outcome, averaged
from dean_interp.fine_tuning import FineTuningConfig, FineTuningMethod
from dean_interp.report.figures import changes_along
from dean_interp.report.html import write_arms_report
from dean_interp.statistics import Interval
from dean_interp.study.arm_results import ArmResults, arm_outcomes, arms_plan, fine_tuned_arms, margin_lines
from dean_interp.study.conclusions import answers_in_words
from dean_interp.study.config import StudyConfig
from dean_interp.study.run_folder import owned
from dean_interp.study.state_outcomes import MeasurementPlan, is_known
from dean_interp.study.store import ORIGINAL
from dean_interp.study.study_data import calibration_sets, prompt_sets, test_sets

METHOD_NAMES = {"full": "Full fine-tuning", "lora": "LoRA", "dora": "DoRA"}
Lines = Mapping[str, Sequence[Line]]
"""The lines of each arm."""
Curve = list[tuple[float, Interval]]
"""Steps of fine-tuning, and the change of a margin after them."""


@dataclass(frozen=True)
class Tradeoff:
    """Fine-tune on first, on second and on both; measure both along the steps."""

    out: Path = Path("runs/tradeoff")
    """The run folder."""
    methods: tuple[FineTuningMethod, ...] = ("full", "lora")
    """Methods of fine-tuning, one after the other, whatever `tuning.method` is."""
    n_seeds: int = 3
    """Number of seeds, from `tuning.seed` on."""
    quick: bool = False
    """Run one seed and a third of the steps."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=StudyConfig)


def run(given: Tradeoff) -> ArmResults:
    """All arms, from the store where they were measured before."""
    if given.quick:
        given = dataclasses.replace(given, n_seeds=1, tuning=given.tuning.shortened())
    config = given.study
    config.check()
    for method in given.methods:
        dataclasses.replace(given.tuning, method=method).check()
    first, second, _ = calibration_sets(config.data, config.calibration)
    tests, _ = test_sets(config.data, (first, second))
    scored = first.prompt_hashes | second.prompt_hashes
    prompts = prompt_sets(config.data, config.answers, scored=scored, calibration=(first, second))
    data = [first, second, *tests, *prompts.over_refusal]
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), data):
        plan = arms_plan(config, given.out, tests, prompts)
        model = None if is_known(plan, ORIGINAL, in_full=True) else config.model.load()
        original = arm_outcomes(plan, ORIGINAL, model, in_full=True)
        # Fine-tuning loads models of its own.
        del model
        outcomes = outcomes_by_arm(plan, given, first, second)
        by_step = {}
        for step in range(given.tuning.every, given.tuning.n_steps + 1, given.tuning.every):
            by_step[step] = compare_each(original, {name: steps[step] for name, steps in outcomes.items()})
        lines = by_step[given.tuning.n_steps]
        results = ArmResults(
            title=f"Does fine-tuning for one behaviour lower the other in {config.model.title}?",
            model=config.model.title,
            facts=facts(given, n_examples=len(first), n_test=len(tests[0])),
            conclusions=conclusions(lines, first.name, second.name),
            arms=lines,
        )
        picture = changes_along(panels(by_step, tests[:2]), "steps")
        page = write_arms_report(results, given.out, {"Margins": picture})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def outcomes_by_arm(
    plan: MeasurementPlan, given: Tradeoff, first: Behaviour, second: Behaviour
) -> dict[str, dict[int, list[Outcome]]]:
    """Outcomes of every arm by step, averaged over its seeds."""
    trained = {second.name: [second], first.name: [first], "both": [first, second]}
    outcomes = {}
    for method in given.methods:
        for on, behaviours in trained.items():
            seeds = []
            for seed in range(given.tuning.seed, given.tuning.seed + given.n_seeds):
                tuning = dataclasses.replace(given.tuning, method=method, seed=seed)
                seeds.append(
                    fine_tuned_arms(
                        plan=plan,
                        config=given.study,
                        name=f"{method} on {on}, seed {seed}",
                        behaviours=behaviours,
                        tuning=tuning,
                    )
                )
            outcomes[f"{method} on {on}"] = {step: averaged([seed[step] for seed in seeds]) for step in seeds[0]}
    return outcomes


def facts(given: Tradeoff, *, n_examples: int, n_test: int) -> dict[str, str]:
    """How it was done."""
    return {
        "dose": f"{given.tuning.n_steps} steps of {given.tuning.batch_size} examples, of {n_examples} a behaviour; "
        f"{given.n_seeds} seeds, averaged prompt by prompt",
        "published": published(4),
        "test prompts": f"{n_test} of each behaviour, {given.study.answers.n_answers} of them answered",
        "command": command(),
    }


def panels(by_step: Mapping[int, Lines], tests: Sequence[Behaviour]) -> dict[str, dict[str, Curve]]:
    """The change of each behaviour's margin along the steps of every arm."""
    drawn = {}
    for test in tests:
        curves: dict[str, Curve] = {}
        for step, lines in by_step.items():
            for name, of_arm in lines.items():
                curves.setdefault(name, []).append((float(step), margin_lines(of_arm)[test.name].change))
        drawn[f"{test.name} margin"] = curves
    return drawn


def conclusions(lines: Lines, first: str, second: str) -> tuple[str, ...]:
    """Of every arm that trained one behaviour: did it rise, and did the other fall?"""
    paragraphs = []
    for name, of_arm in lines.items():
        method, _, on = name.partition(" on ")
        if on == "both":
            continue
        other = first if on == second else second
        margins = margin_lines(of_arm)
        of_trained, of_other = margins[on].change, margins[other].change
        paragraphs.append(
            f"{METHOD_NAMES[method]} on {on}: {on} margin {of_trained}, {other} margin {of_other} nats per token; "
            f"{verdict(of_trained, of_other, other)}. {answers_in_words(of_arm)}"
        )
    return tuple(paragraphs)


def verdict(of_trained: Interval, of_other: Interval, other: str) -> str:
    """Whether training one behaviour lowered the other one, in words."""
    if of_trained.high < 0:
        return "the trained behaviour falls too, so a fall of the other is no sign of conflict"
    if of_trained.low <= 0:
        return "the trained behaviour does not rise beyond its interval: too small a dose to tell"
    if of_other.high < 0:
        return "the trade-off appears"
    if of_other.low > 0:
        return "both rise: no trade-off"
    return f"what {other} does is within its interval"


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Tradeoff, description=__doc__)))
