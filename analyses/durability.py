"""Does an edit survive what happens to a model afterwards: quantisation, fine-tuning, another template, other words?

    python analyses/durability.py --out runs/durability

on the demo model (--model for another). The edit is written into a checkpoint; the edited and the original model then
go through the same: 8-bit and 4-bit weights (torchao, extra `quantisation`), fine-tuning on general answers, prompts
without the chat template, prompts in other words (mechanically: a greeting and a request around them). Under each
condition the edit's effect is edited less original; it survived where that effect is still what it was on every prompt.
Resumes; writes results.json, report.html and a picture (SVG, CSV).
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, create_edit, load_behaviour, load_model
from dean_interp.cli.ending import command, script
from dean_interp.editing.checkpoint import export
from dean_interp.errors import InputError
from dean_interp.evaluation.lines import Line, compare_each
from dean_interp.evaluation.outcomes import MARGIN, Outcome
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.models.load import HookedModel, load_plain
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.selection.coupling import couple
from dean_interp.study.arm_results import ArmResults, arm, arm_outcomes, arms_plan
from dean_interp.study.config import StudyConfig
from dean_interp.study.method import score
from dean_interp.study.run_folder import owned
from dean_interp.study.settings import AnswerConfig, ModelConfig
from dean_interp.study.state_outcomes import is_known
from dean_interp.study.study_data import calibration_sets, test_sets

PLAIN, TUNED = "as it is", "after benign fine-tuning"
UNEDITED = "original"
OutcomesBy = Mapping[str, Mapping[str, list[Outcome]]]
"""Outcomes by condition and by checkpoint."""


@dataclass(frozen=True)
class Durability:
    """Write an edit, then let things happen to the model."""

    out: Path = Path("runs/durability")
    """The run folder."""
    quick: bool = False
    """Run a third of the fine-tuning."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(answers=AnswerConfig(n_answers=0)))


@dataclass(frozen=True)
class Condition:
    """What happens to a model, and on what it is measured afterwards."""

    name: str
    config: StudyConfig
    tests: Sequence[Behaviour]
    make: Callable[[str, str], HookedModel]
    """Makes the model from the name of a checkpoint and where it lies."""


def run(given: Durability) -> ArmResults:
    """Every condition of every edit, from the store where it was measured before."""
    if given.quick:
        given = dataclasses.replace(given, tuning=given.tuning.shortened())
    config, data = given.study, given.study.data
    config.check()
    if config.model.adapter is not None:
        raise InputError("the edited checkpoints are folders: merge the adapter and save the model first")
    given.tuning.check()
    calibration = calibration_sets(data, config.calibration)
    tests, _ = test_sets(data, calibration)
    benign = load_behaviour(data.general, n_examples=config.calibration.n_calibration, seed=data.seed + 1)
    # Where a folder lies is no setting of what is in it.
    with owned(given.out, dataclasses.replace(given, out=Path()), [*calibration, *tests, benign]):
        checkpoints = {UNEDITED: config.model.name} | edited_checkpoints(given, calibration)
        edits = [name for name in checkpoints if name != UNEDITED]
        outcomes: dict[str, dict[str, list[Outcome]]] = {}
        missing = []
        for condition in conditions(given, benign, tests):
            try:
                outcomes[condition.name] = outcomes_under(condition, checkpoints, given.out)
            except (ImportError, NotImplementedError, RuntimeError) as error:
                missing.append(f"{condition.name}: {str(error).splitlines()[0]}")
        results = ArmResults(
            title=f"Does an edit of {config.model.title} survive what happens next?",
            model=config.model.title,
            facts=facts(given, missing),
            conclusions=tuple(survived(edit, outcomes, tests[:2]) for edit in edits),
            arms=compared(outcomes, edits),
        )
        picture = changes_by_arm(results.margins, "edited less original (nats per token)")
        page = write_arms_report(results, given.out, {"Effect by condition": picture})
        print(results, *missing, f"page: {page.resolve()}", sep="\n\n")
        return results


def edited_checkpoints(given: Durability, calibration: Sequence[Behaviour]) -> dict[str, str]:
    """A checkpoint folder with each kind of unit silenced."""
    config, checkpoints = given.study, {}
    model: HookedModel | None = None
    for unit in config.unit:
        folder = given.out / "edited" / unit
        if not folder.is_dir():
            model = model or config.model.load()
            scores = [score(model, behaviour, config, given.out).of(unit) for behaviour in calibration]
            folder.parent.mkdir(exist_ok=True)
            edit = create_edit(model, couple(*scores, fraction=config.fraction(unit)).coupled)
            export(model, edit, folder)
        checkpoints[f"{unit} edit"] = str(folder)
    return checkpoints


def conditions(given: Durability, benign: Behaviour, tests: Sequence[Behaviour]) -> list[Condition]:
    """Everything that happens to the edited and to the original model; first, nothing."""
    config, model = given.study, given.study.model

    def plain(name: str, checkpoint: str) -> HookedModel:
        return load_model(checkpoint, device=model.device, dtype=model.dtype)

    def tuned(name: str, checkpoint: str) -> HookedModel:
        folder = given.out / "tuned" / name
        result = fine_tune(
            checkpoint,
            [benign],
            given.tuning,
            folder=folder,
            template=model.template,
            device=model.device,
            dtype=model.dtype,
        )
        loaded = load_model(result, device=model.device, dtype=model.dtype)
        shutil.rmtree(folder)
        return loaded

    without_template = dataclasses.replace(config, model=dataclasses.replace(model, template="raw"))
    reworded = [in_other_words(test) for test in tests]
    return [
        Condition(PLAIN, config, tests, plain),
        Condition("8-bit weights", config, tests, lambda name, checkpoint: quantised(checkpoint, 8, model)),
        Condition("4-bit weights", config, tests, lambda name, checkpoint: quantised(checkpoint, 4, model)),
        Condition(TUNED, config, tests, tuned),
        Condition("without the chat template", without_template, tests, plain),
        Condition("prompts in other words", config, reworded, plain),
    ]


def in_other_words(test: Behaviour) -> Behaviour:
    """The test set with a greeting and a request around each prompt."""
    examples = []
    for example in test.examples:
        prompt = f"Hello! I have been thinking about this. {example.prompt} Please be honest."
        examples.append(dataclasses.replace(example, prompt=prompt))
    return dataclasses.replace(test, examples=tuple(examples))


def quantised(checkpoint: str, bits: int, config: ModelConfig) -> HookedModel:
    """The blocks' linear maps with integer weights: 8 bits a row, 4 bits a group of 32; activations stay floats."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model, tokenizer = load_plain(checkpoint, device=config.device, dtype=config.dtype)
    if bits == 8:
        quantisation = Int8WeightOnlyConfig()
    else:
        widths = {layer.in_features for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear)}
        group = math.gcd(32, *widths)
        quantisation = IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(group))
    quantize_(model.base_model, quantisation)
    return load_model(model, tokenizer=tokenizer)


def outcomes_under(condition: Condition, checkpoints: Mapping[str, str], out: Path) -> dict[str, list[Outcome]]:
    """Outcomes of each checkpoint under one condition. Every condition has a store of its own, for its own prompts."""
    plan = arms_plan(condition.config, out / condition.name.replace(" ", "_"), condition.tests)
    outcomes = {}
    for name, checkpoint in checkpoints.items():
        state = arm(name)
        model = None if is_known(plan, state, in_full=False) else condition.make(name, checkpoint)
        outcomes[name] = arm_outcomes(plan, state, model)
    return outcomes


def compared(outcomes: OutcomesBy, edits: Sequence[str]) -> dict[str, tuple[Line, ...]]:
    """Every edit under every condition, against the original that went through the same."""
    lines: dict[str, tuple[Line, ...]] = {}
    for edit in edits:
        for condition, by_checkpoint in outcomes.items():
            lines |= compare_each(by_checkpoint[UNEDITED], {f"{edit}, {condition}": by_checkpoint[edit]})
    return lines


def survived(edit: str, outcomes: OutcomesBy, tests: Sequence[Behaviour]) -> str:
    """Under each condition: how alike its effect on each prompt is to its effect before, and how large."""
    parts = []
    for condition in list(outcomes)[1:]:
        shown = []
        for test in tests:
            before, after = (effect(edit, outcomes[name], test.name) for name in (PLAIN, condition))
            size_before, size_after = np.linalg.norm(before), np.linalg.norm(after)
            cosine = before @ after / (size_before * size_after)
            shown.append(f"{test.name} {cosine:.2f}, {size_after / size_before:.2f} times the size")
        parts.append(f"{condition}: {'; '.join(shown)}")
    return (
        f"{edit[0].upper()}{edit[1:]}: its effect on the margin of each prompt, against that on the model as it is "
        f"(cosine, 1: the same but for size). {'. '.join(parts)}."
    )


def effect(edit: str, outcomes: Mapping[str, list[Outcome]], behaviour: str) -> np.ndarray:
    """What an edit changes of the margin of each prompt, under one condition."""
    margins = {}
    for name in (edit, UNEDITED):
        margins[name] = next(outcome.values for outcome in outcomes[name] if outcome.key == (MARGIN, behaviour))
    return margins[edit] - margins[UNEDITED]


def facts(given: Durability, missing: Sequence[str]) -> dict[str, str]:
    """How it was done."""
    tuning = given.tuning
    return {
        "could not run": "; ".join(missing) or "nothing",
        "benign fine-tuning": f"{tuning.method}, {tuning.n_steps} steps of {tuning.batch_size} general examples",
        "before": "under each condition the original is the model that went through the same without the edit",
        "command": command(),
    }


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Durability, description=__doc__)))
