"""Does an edit survive what happens to a model afterwards: quantisation, fine-tuning, another template, other words?

    python analyses/durability.py --out runs/durability

on the demo model (--model for another). The edit is written into a checkpoint; the edited and the original model then
go through the same: 8-bit and 4-bit weights (torchao, extra `quantisation`), fine-tuning on general answers, prompts
without the chat template, prompts in other words (mechanically: a greeting and a request around them). Under each
condition the edit's effect is edited less original; it survived where that effect is still what it was on every prompt.
Resumes; writes results.json, report.html and a figure.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from dean_interp.study.folder import owned
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, couple, create_edit, load_behaviour, load_model
from dean_interp.cli.ending import script
from dean_interp.editing.checkpoint import export
from dean_interp.evaluation.outcomes import Outcome
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.models.load import HookedModel, load_plain
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.study.arms import MARGIN, ArmResults, Arms, command, compared
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import score_into

PLAIN, TUNED = "as it is", "after benign fine-tuning"


@dataclass(frozen=True)
class Durability:
    """Write an edit, then let things happen to the model."""

    out: Path = Path("runs/durability")
    quick: bool = False
    """A third of the fine-tuning."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(n_answers=0))


def run(given: Durability) -> ArmResults:
    """Every condition of every edit, from its file where it was taken before."""
    config, tuning = given.study, given.tuning.shortened() if given.quick else given.tuning
    config.check()
    tuning.check()
    calibration = config.calibration()
    tests, _ = config.tests(calibration)
    benign = load_behaviour(config.general, n_examples=config.n_calibration, seed=config.seed + 1)
    settings = {"study": dataclasses.asdict(config), "tuning": dataclasses.asdict(tuning)}
    with owned(given.out, settings, [*calibration, *tests, benign]):
        checkpoints = {"original": config.model} | edited(given, calibration)
        taken: dict[str, dict[str, list[Outcome]]] = {}
        missing: list[str] = []
        for name, (settings_of, prompts, made) in conditions(given, tuning, benign, tests).items():
            arms = Arms(settings_of, given.out / name.replace(" ", "_"), prompts)
            try:
                taken[name] = {
                    which: arms.known(which) or arms.take(which, made(which, str(checkpoint)))
                    for which, checkpoint in checkpoints.items()
                }
            except (ImportError, NotImplementedError, RuntimeError) as error:
                missing.append(f"{name}: {str(error).splitlines()[0]}")
        lines = {}
        for which in list(checkpoints)[1:]:
            for name, some in taken.items():
                lines |= compared(some["original"], {f"{which}, {name}": some[which]})
        facts = {
            "could not run": "; ".join(missing) or "nothing",
            "benign fine-tuning": f"{tuning.method}, {tuning.n_steps} steps of {tuning.batch_size} general examples",
            "before": "under each condition the original is the model that went through the same without the edit",
            "command": command(),
        }
        names = [one.name for one in tests[:2]]
        results = ArmResults(
            f"Does an edit of {config.model} survive what happens next?", config.model, facts,
            tuple(survived(which, taken, names) for which in list(checkpoints)[1:]), lines,
        )  # fmt: skip
        figure = changes_by_arm(results.margins, "edited less original (nats per token)")
        page = write_arms_report(results, given.out, {"Effect by condition": figure})
        print(results, *missing, f"page: {page.resolve()}", sep="\n\n")
        return results


def edited(given: Durability, calibration: list[Behaviour]) -> dict[str, Path]:
    """A checkpoint folder with each kind of unit silenced."""
    config, found = given.study, {}
    model: HookedModel | None = None
    for unit in config.units:
        folder = given.out / "edited" / unit
        if not folder.is_dir():
            model = model or load_model(config.model, device=config.device, dtype=config.dtype)
            own = [score_into(given.out, model, one, config).of(unit) for one in calibration]
            folder.parent.mkdir(exist_ok=True)
            export(model, create_edit(model, couple(*own, fraction=config.fraction(unit)).coupled), folder)
        found[f"{unit} edit"] = folder
    return found


Condition = tuple[StudyConfig, list[Behaviour], Callable[[str, str], HookedModel]]


def conditions(
    given: Durability, tuning: FineTuningConfig, benign: Behaviour, tests: list[Behaviour]
) -> Mapping[str, Condition]:
    """By name: the settings, the tests, and what is made of a checkpoint."""
    config, options = given.study, {"device": given.study.device, "dtype": given.study.dtype}

    def tuned(which: str, checkpoint: str) -> HookedModel:
        folder = given.out / "tuned" / which
        found = fine_tune(checkpoint, [benign], tuning, folder=folder, template=config.template, **options)
        model = load_model(found, **options)
        shutil.rmtree(folder)
        return model

    def plain(which: str, checkpoint: str) -> HookedModel:
        return load_model(checkpoint, **options)

    reworded = [dataclasses.replace(test, examples=tuple(
        dataclasses.replace(one, prompt=f"Hello! I have been thinking about this. {one.prompt} Please be honest.")
        for one in test.examples)) for test in tests]  # fmt: skip
    return {
        PLAIN: (config, tests, plain),
        "8-bit weights": (config, tests, lambda _, checkpoint: quantised(checkpoint, 8, options)),
        "4-bit weights": (config, tests, lambda _, checkpoint: quantised(checkpoint, 4, options)),
        TUNED: (config, tests, tuned),
        "without the chat template": (dataclasses.replace(config, template="raw"), tests, plain),
        "prompts in other words": (config, reworded, plain),
    }


def quantised(checkpoint: str, bits: int, options: Mapping[str, str | None]) -> HookedModel:
    """The blocks' linear maps with integer weights: 8 bits a row, 4 bits a group of 32; activations stay floats."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model, tokenizer = load_plain(checkpoint, **options)
    group = math.gcd(32, model.config.hidden_size, model.config.intermediate_size)
    how = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(group))
    quantize_(model.base_model, how)
    return load_model(model, tokenizer=tokenizer)


def survived(which: str, taken: Mapping[str, Mapping[str, list[Outcome]]], names: list[str]) -> str:
    """Under each condition: how alike its effect on each prompt is to its effect before, and how large."""

    def effect(condition: str, name: str) -> np.ndarray:
        after, before = ({(one.metric, one.on): one.values for one in taken[condition][state]}
                         for state in (which, "original"))  # fmt: skip
        return after[MARGIN, name] - before[MARGIN, name]

    parts = []
    for condition in list(taken)[1:]:
        shown = []
        for name in names:
            old, new = effect(PLAIN, name), effect(condition, name)
            sizes = np.linalg.norm(old), np.linalg.norm(new)
            shown.append(f"{name} {old @ new / (sizes[0] * sizes[1]):.2f}, {sizes[1] / sizes[0]:.2f} times the size")
        parts.append(f"{condition}: {'; '.join(shown)}")
    return (f"{which[0].upper()}{which[1:]}: its effect on the margin of each prompt, against that on the model as it "
            f"is (cosine, 1: the same but for size). {'. '.join(parts)}.")  # fmt: skip


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Durability, description=__doc__)))
