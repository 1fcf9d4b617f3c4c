"""The paper's first table for any model: original, fine-tuning, DEAN on neurons and weights, the released selection.

    python analyses/dean_against_finetuning.py --out runs/table1

on the demo model (--model for another, --first and --second for other data: `paper:fairness@folder`). DEAN's arms stand
beside random units of the same size, matched by site and stratum. Resumes where it was stopped. Writes results.json,
report.html and a figure. With --response unsafe everything is scored and trained on unsafe answers alone
(`malicious_only.py`).
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from dean_interp.study.folder import owned
from published_numbers import published
from tyro.conf import OmitArgPrefixes

from dean_interp import Selection, couple, load_model, random_like
from dean_interp.cli.ending import script
from dean_interp.evaluation.outcomes import Outcome
from dean_interp.fine_tuning import FineTuningConfig, FineTuningMethod
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.scoring.scores import Scores
from dean_interp.selection.released import released_coupling
from dean_interp.selection.strata import strata
from dean_interp.study.arms import LOSS, ArmResults, Arms, answered, averaged, command, compared, margins
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import score_into


@dataclass(frozen=True)
class Table:
    """Every arm of the paper's first table, and controls."""

    out: Path = Path("runs/table1")
    methods: tuple[FineTuningMethod, ...] = ("full", "lora", "dora")
    """Of fine-tuning on both behaviours, one after the other, whatever `tuning.method` is."""
    n_seeds: int = 1
    """Of fine-tuning, from `tuning.seed` on."""
    quick: bool = False
    """Full fine-tuning alone, four controls."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=StudyConfig)


def run(given: Table, title: str = "DEAN against fine-tuning in {model}") -> ArmResults:
    """All arms, from their files where they were taken before."""
    config, methods = given.study, ("full",) if given.quick else given.methods
    n_random = min(4, config.n_random) if given.quick else config.n_random
    config.check()
    for method in methods:
        dataclasses.replace(given.tuning, method=method).check()
    calibration, benign = config.calibration(), config.benign()
    tests, _ = config.tests(calibration)
    settings = {
        "study": dataclasses.asdict(config),
        "tuning": dataclasses.asdict(given.tuning),
        "n_seeds": given.n_seeds,
    }
    with owned(given.out, settings, [*calibration, *tests, *benign]):
        arms = Arms(config, given.out, tests, benign)
        model = load_model(config.model, device=config.device, dtype=config.dtype)
        original = arms.take("original", model, answers=True)
        scores = [score_into(given.out, model, one, config) for one in calibration]
        taken, controls, sizes = edits(arms, model, scores, config, n_random)
        del model
        for method in methods:
            last = given.tuning.n_steps
            seeds = [
                arms.fine_tuned(
                    f"fine-tuned {method} seed {seed}", calibration[:2],
                    dataclasses.replace(given.tuning, method=method, seed=seed), at=(last,),
                )[last]
                for seed in range(given.tuning.seed, given.tuning.seed + given.n_seeds)
            ]  # fmt: skip
            taken[f"fine-tuned, {method}"] = averaged(seeds)
        lines = compared(original, taken, controls)
        results = ArmResults(
            title.format(model=config.model), config.model,
            {
                "units silenced": ", ".join(f"{name} {n}" for name, n in sizes.items()),
                "controls": f"{n_random} random sets of the size of each edit of DEAN, matched by site and stratum",
                "fine-tuning": f"on {config.response} answers of both behaviours, {given.tuning.n_steps} steps of "
                f"{given.tuning.batch_size} examples of {len(calibration[0]) + len(calibration[1])}",
                "test prompts": f"{len(tests[0])} of each behaviour, {config.n_answers} of them answered",
                "published": published(),
                "command": command(),
            },
            said(lines, [one.name for one in tests]), lines,
        )  # fmt: skip
        figure = changes_by_arm(results.margins, "change (nats per token)")
        page = write_arms_report(results, given.out, {"Margins by arm": figure})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def edits(
    arms: Arms, model: HookedModel, scores: list[Scores], config: StudyConfig, n_random: int
) -> tuple[dict[str, list[Outcome]], dict[str, list[list[Outcome]]], dict[str, int]]:
    """Outcomes of each edit, of its random controls, and the sizes."""
    chosen: dict[str, Selection] = {}
    taken, controls = {}, {}
    for unit in config.units:
        own = [one.of(unit) for one in scores]
        chosen[f"DEAN, {unit}s"] = edit = couple(*own, fraction=config.fraction(unit)).coupled
        matched = strata(model, own)
        controls[f"DEAN, {unit}s"] = [
            arms.take(f"{unit} random {i}", model, random_like(edit, matched, seed=config.seed * 1000 + i))
            for i in progress_bar(range(n_random), desc=f"random {unit}s", unit="control")
        ]
        if unit == "weight":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it is no intersection: that is why it stands here
                second_first = own[1], own[0], own[2]  # privacy first, as the authors' script
                chosen["released selection, weights"] = released_coupling(
                    *second_first, fraction=config.weight_fraction
                )
    for name, one in chosen.items():
        taken[name] = arms.take(name, model, one, answers=True)
    return taken, controls, {name: len(one) for name, one in chosen.items()}


def said(lines: Mapping[str, tuple], names: list[str]) -> tuple[str, ...]:
    """Of every arm: do both margins rise, and what does it cost?"""
    found = []
    for arm, some in lines.items():
        moved = margins(some)
        (loss,) = (line.change for line in some if line.metric == LOSS and line.on == names[2])
        up = [name for name, line in moved.items() if line.change.low > 0]
        down = [name for name, line in moved.items() if line.change.high < 0]
        beaten = [name for name, line in moved.items() if line.rank is not None and line.rank <= 0.05]
        control = (
            f" Beyond every random control: {' and '.join(beaten) or 'neither'}." if arm.startswith("DEAN") else ""
        )
        changes = "; ".join(f"{name} {line.change}" for name, line in moved.items())
        found.append(
            f"{arm[0].upper()}{arm[1:]}: {changes} (margins, nats per token). Raised beyond the interval: "
            f"{' and '.join(up) or 'neither'}; lowered: {' and '.join(down) or 'neither'}.{control} Loss on general "
            f"answers {loss}. {answered(some)}"
        )
    return tuple(found)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Table, description=__doc__)))
