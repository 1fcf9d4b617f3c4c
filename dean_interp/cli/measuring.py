"""`dean-interp ablate`, `evaluate` and `information`: what changes when the selected units are silenced."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.replacement import Replacement
from dean_interp.cli.step_result import StepResult
from dean_interp.data.examples import load_behaviour
from dean_interp.editing.ablated_positions import Positions
from dean_interp.editing.ablation import ablate
from dean_interp.editing.edit_at_dose import load_any_edit
from dean_interp.editing.value_names import described, value_fingerprint
from dean_interp.errors import refuse_below
from dean_interp.evaluation.judges.lexical import LexicalJudge, labels_or_faults
from dean_interp.files import check_writable, read_json, write_json
from dean_interp.models.generate import generate
from dean_interp.models.load import model_fingerprint
from dean_interp.models.native_tokenizer import chat_parts
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import load_scores
from dean_interp.selection.selection import load_selection
from dean_interp.study.config import EvaluationConfig, InformationConfig
from dean_interp.study.evaluate import estimate_information, evaluate_edit
from dean_interp.study.settings import AnswerConfig, DataConfig, ModelConfig


@dataclass(frozen=True)
class AblateUnits:
    """Show what the model answers with and without the selected units."""

    selection: Positional[Path]
    """Selection file."""
    prompts: tuple[str, ...] = ()
    """Questions to ask. Unset: test prompts of `--behaviour`."""
    behaviour: str = "privacy"
    """Behaviour whose test prompts are asked, where no `--prompts` are given."""
    n_prompts: int = 8
    """Number of test prompts of the behaviour to ask."""
    replacement: OmitArgPrefixes[Replacement] = field(default_factory=Replacement)
    positions: Positions = "all"
    """Where in the text units are silenced: everywhere, in the prompt only, or in the answer only."""
    answer_length: int = AnswerConfig.answer_lengths[0]
    """Number of new tokens of each answer."""
    answer_batch: int = AnswerConfig.answer_batch
    """Number of prompts a batch."""
    seed: int = DataConfig.seed
    """Seed for sampling prompts of the behaviour."""
    out: Path | None = None
    """JSON file to write, too. A killed command with such a file goes on from the last finished batch."""
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class EvaluateEdit:
    """Print one table of what an edit does: margins, answers, over-refusal, general ability.

    With `--scores` the same is measured under random controls. A killed command goes on from the last finished batch.
    """

    edit: Positional[Path]
    """Selection file, whose units are silenced; or gates file, or edit file."""
    out: Path
    """Folder for `evaluation.json` and what was measured; `information` may share it."""
    scores: tuple[Path, ...] = ()
    """Score files of first, second and general: random controls of a selection are matched by them. Unset: no
    controls."""
    evaluation: OmitArgPrefixes[EvaluationConfig] = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class EstimateInformation:
    """Estimate mutual information between both behaviours' neurons, before and under an ablation.

    The same is estimated under random controls.
    """

    selection: Positional[Path]
    """Selection file."""
    out: Path
    """Folder for `information.json` and what was measured; `evaluate` may share it."""
    scores: tuple[Path, ...] = ()
    """Score files of first, second and general. Required: they say which neurons are each behaviour's."""
    information: OmitArgPrefixes[InformationConfig] = field(default_factory=InformationConfig)


def do_ablate(step: AblateUnits) -> StepResult:
    """Answer all prompts twice, and judge the answers."""
    refuse_below(step, {"n_prompts": 1, "answer_length": 1, "answer_batch": 1, "seed": 0})
    selection = load_selection(step.selection)
    if step.out:
        check_writable(step.out)
    value = step.replacement.load()
    prompts = step.prompts or _test_prompts(step)
    model = step.model.load()
    # A killed command goes on from its last batch only where all that the answers depend on is the same.
    parts = [model_fingerprint(model), selection.fingerprint, value_fingerprint(value), str(step), str(prompts)]
    key = " ".join([*parts, *chat_parts(model)])
    kept = Unfinished(step.out.with_suffix(".unfinished"), key) if step.out else None

    def answers(label: str) -> list[str]:
        return generate(
            model,
            prompts,
            max_new_tokens=step.answer_length,
            template=step.model.template,
            batch_size=step.answer_batch,
            label=label,
            unfinished=kept.part(label) if kept else None,
        )

    before = answers("before")
    with ablate(model, selection, value=value, positions=step.positions):
        under = answers("under")
    rows = _rows(prompts, before, under)
    record = {
        "n_units": len(selection),
        "value": described(value),
        "positions": step.positions,
        "judge": LexicalJudge().name,
        "answers": rows,
    }
    if step.out and kept:
        write_json(step.out, record)
        kept.discard()
    return StepResult(record, "\n\n".join(map(_row_text, rows)))


def _test_prompts(step: AblateUnits) -> tuple[str, ...]:
    behaviour = load_behaviour(step.behaviour, n_examples=step.n_prompts, seed=step.seed, split="test")
    return tuple(behaviour.prompts)


def _rows(prompts: Sequence[str], before: Sequence[str], under: Sequence[str]) -> list[dict[str, str]]:
    columns = {
        "prompt": prompts,
        "before": before,
        "under": under,
        "verdict_before": labels_or_faults(prompts, before),
        "verdict_under": labels_or_faults(prompts, under),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _row_text(row: dict[str, str]) -> str:
    return (
        f"{row['prompt']}\n"
        f"  before ({row['verdict_before']}): {row['before']}\n"
        f"  under  ({row['verdict_under']}): {row['under']}"
    )


def do_evaluate(step: EvaluateEdit) -> StepResult:
    """Evaluate one edit; the table is in `evaluation.json` too."""
    edit = load_any_edit(step.edit)
    scores = [load_scores(path) for path in step.scores]
    evaluation = evaluate_edit(edit, scores, step.evaluation, step.out)
    return StepResult(read_json(step.out / "evaluation.json", dict[str, Any]), str(evaluation))


def do_information(step: EstimateInformation) -> StepResult:
    """Estimate mutual information; the numbers are in `information.json` too."""
    selection = load_selection(step.selection)
    scores = [load_scores(path) for path in step.scores]
    estimates = estimate_information(selection, scores, step.information, step.out)
    record = read_json(step.out / "information.json", dict[str, Any])
    return StepResult(record, "\n\n".join(map(str, estimates)))
