"""Does fine-tuning for one behaviour lower the other? Full fine-tuning and adapters on either behaviour and on both.

    python analyses/tradeoff_under_finetuning.py --out runs/tradeoff

on the demo model (--model for another, --first and --second for other data: `paper:fairness@folder`). Margins are taken
along the steps, answers at the end, on test prompts, for several seeds. Resumes where it was stopped. Writes
results.json, report.html and a figure. The paper's claim is that privacy rises and fairness falls where only privacy is
trained; its dose is not stated, the one here is.
"""

import dataclasses
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import tyro
from published_numbers import published
from tyro.conf import OmitArgPrefixes

from dean_interp import load_model
from dean_interp.cli.ending import script
from dean_interp.evaluation.outcomes import Outcome
from dean_interp.fine_tuning import FineTuningConfig, FineTuningMethod
from dean_interp.report.figures import changes_along
from dean_interp.report.html import write_arms_report
from dean_interp.study.arms import ArmResults, Arms, answered, averaged, command, compared, margins
from dean_interp.study.config import StudyConfig
from dean_interp.study.folder import owned


@dataclass(frozen=True)
class Tradeoff:
    """Fine-tune on first, on second and on both; measure both along the steps."""

    out: Path = Path("runs/tradeoff")
    methods: tuple[FineTuningMethod, ...] = ("full", "lora")
    """One after the other, whatever `tuning.method` is."""
    n_seeds: int = 3
    """From `tuning.seed` on."""
    quick: bool = False
    """One seed and a third of the steps."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=StudyConfig)


def run(given: Tradeoff) -> ArmResults:
    """All arms, from their files where they were taken before."""
    config, tuning = given.study, given.tuning.shortened() if given.quick else given.tuning
    n_seeds = 1 if given.quick else given.n_seeds
    config.check()
    for method in given.methods:
        dataclasses.replace(tuning, method=method).check()
    calibration, benign = config.calibration()[:2], config.benign()
    tests, _ = config.tests(calibration)
    first, second = calibration
    trained = {second.name: [second], first.name: [first], "both": [first, second]}
    settings = {"study": dataclasses.asdict(config), "tuning": dataclasses.asdict(tuning), "n_seeds": n_seeds}
    steps = list(range(tuning.every, tuning.n_steps + 1, tuning.every))
    with owned(given.out, settings, [*calibration, *tests, *benign]):
        arms = Arms(config, given.out, tests, benign)
        original = arms.known("original") or arms.take(
            "original", load_model(config.model, device=config.device, dtype=config.dtype), answers=True
        )
        taken: dict[str, dict[int, list[Outcome]]] = {}
        for method, (on, behaviours) in product(given.methods, trained.items()):
            seeds = [
                arms.fine_tuned(
                    f"{method} on {on}, seed {seed}", behaviours, dataclasses.replace(tuning, method=method, seed=seed)
                )
                for seed in range(tuning.seed, tuning.seed + n_seeds)
            ]
            taken[f"{method} on {on}"] = {step: averaged([seed[step] for seed in seeds]) for step in steps}
        along = {step: compared(original, {name: some[step] for name, some in taken.items()}) for step in steps}
        results = ArmResults(
            f"Does fine-tuning for one behaviour lower the other in {config.model}?", config.model,
            {
                "dose": f"{tuning.n_steps} steps of {tuning.batch_size} examples, of {len(first)} a behaviour; "
                f"{n_seeds} seeds, averaged prompt by prompt", "published": published(4),
                "test prompts": f"{len(tests[0])} of each behaviour, {config.n_answers} of them answered",
                "command": command(),
            },
            (), along[steps[-1]],
        )  # fmt: skip
        results = dataclasses.replace(results, said=tuple(said(results, first.name, second.name)))
        panels = {
            f"{one.name} margin": {
                name: [(float(step), margins(along[step][name])[one.name].change) for step in steps] for name in taken
            } for one in tests[:2]
        }  # fmt: skip
        figure = changes_along(panels, "steps", "change of the margin (nats per token)")
        page = write_arms_report(results, given.out, {"Margins": figure})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def said(results: ArmResults, first: str, second: str) -> list[str]:
    """For every arm that trained one behaviour: did it rise, and did the other fall?"""
    found = []
    for arm in results.arms:
        method, _, on = arm.partition(" on ")
        if on == "both":
            continue
        other = first if on == second else second
        own, theirs = (margins(results.arms[arm])[name].change for name in (on, other))
        kind = ("the trained behaviour falls too, so a fall of the other is no sign of conflict" if own.high < 0 else
                "the trained behaviour does not rise beyond its interval: too small a dose to tell" if own.low <= 0 else
                "the trade-off appears" if theirs.high < 0 else
                "both rise: no trade-off" if theirs.low > 0 else
                f"what {other} does is within its interval")  # fmt: skip
        name = "Full fine-tuning" if method == "full" else {"lora": "LoRA", "dora": "DoRA"}[method]
        found.append(
            f"{name} on {on}: {on} margin {own}, {other} margin {theirs} nats per token; {kind}. "
            + answered(results.arms[arm])
        )
    return found


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Tradeoff, description=__doc__)))
