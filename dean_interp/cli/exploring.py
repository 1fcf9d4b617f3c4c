"""`dean-interp explore`: a change at fixed doses as one page, with a slider."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.step_result import StepResult
from dean_interp.editing.edit_at_dose import as_hooks, load_any_edit
from dean_interp.errors import InputError, refuse_below
from dean_interp.exploring.explore_page import explore_page
from dean_interp.exploring.held_out import ExploreConfig, refuse_other_kinds, unscored
from dean_interp.files import check_writable
from dean_interp.report.html import options_of
from dean_interp.scoring.scores import load_scores
from dean_interp.study.settings import DataConfig, ModelConfig


@dataclass(frozen=True)
class ExploreChange:
    """Write a page that shows an edit from dose -1 over 0 (the original) to 2, with a slider. It needs no Python.

    The page shows both answers to a prompt, the next tokens, the margins of held-out prompts, and the KL on general
    text. The doses are fixed: every quarter. `explore` in a notebook takes any dose and any prompt.
    """

    edit: Positional[Path]
    """Gates file, edit file, or selection file (its units are silenced)."""
    behaviours: tuple[str, ...] = (DataConfig.first, DataConfig.second)
    """Behaviours whose test prompts are measured: built-in names, files, or published sets."""
    general: str = DataConfig.general
    """General text, on which the KL to the original is measured."""
    n_test: int = 6
    """Number of test prompts of each behaviour. Prompts that were scored to make the edit are left out."""
    n_general_test: int = DataConfig.n_general_test
    """Number of general texts."""
    prompts: tuple[str, ...] = ()
    """Prompts that are answered at every dose. Unset: the first test prompt of each behaviour."""
    scores: tuple[Path, ...] = ()
    """Score files, one a behaviour, for the units' ranks."""
    answer_tokens: int | None = DataConfig.answer_tokens
    """Number of first tokens of each written answer that are measured (None: all)."""
    answer_length: int = ExploreConfig.answer_length
    """Number of new tokens of each answer of the model, at most."""
    seed: int = DataConfig.seed
    """Seed for sampling examples."""
    out: Path = Path("explore.html")
    """Page to write."""
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)


def do_explore(step: ExploreChange) -> StepResult:
    """Measure the edit at every dose and write the page. Raises `InputError` for what can be put right."""
    refuse_below(step, {"n_test": 1, "n_general_test": 1, "answer_tokens": 1, "answer_length": 1, "seed": 0})
    if any(not prompt.strip() for prompt in step.prompts):
        raise InputError("prompts must not be blank")
    check_writable(step.out)
    # What can be wrong is read before the model is.
    change = load_any_edit(step.edit)
    scores = [load_scores(path) for path in step.scores]
    scored = as_hooks(change)[0].prompt_hashes
    behaviours = [unscored(name, step.n_test, scored, seed=step.seed) for name in step.behaviours]
    general = unscored(step.general, step.n_general_test, scored, seed=step.seed)
    refuse_other_kinds(behaviours, general)
    page = explore_page(
        step.model.load(),
        change,
        behaviours=behaviours,
        general=general,
        scores=scores,
        prompts=step.prompts,
        config=ExploreConfig(step.model.template, step.answer_tokens, step.answer_length),
    )
    page = dataclasses.replace(page, command=_command(step))
    page.save(step.out)
    states = [each.state for each in page.recorded]
    record = {"page": str(step.out), "states": TypeAdapter(list).dump_python(states, mode="json")}
    return StepResult(record, f"{page.headline}\npage: {step.out.resolve()}")


def _command(step: ExploreChange) -> str:
    """The command that makes the page again: the edit, and every option that is not the default."""
    options = options_of(step, ExploreChange(step.edit))
    return shlex.join(["dean-interp", "explore", str(step.edit), *options])
