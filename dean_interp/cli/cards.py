"""`dean-interp edit card`: the card of an edit or of a finished run; and the cards that edited checkpoints carry."""

from dataclasses import dataclass, field
from datetime import date
from itertools import takewhile
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.step_result import StepResult
from dean_interp.editing.card_file import DIGEST_KEY, card_names
from dean_interp.editing.edit import Edit, load_edit
from dean_interp.errors import InputError
from dean_interp.files import check_writable, write_text
from dean_interp.report.card_data import licence_of_model
from dean_interp.report.edit_card import EditCard, card_of_edit, card_of_run
from dean_interp.study.improvement import EDIT_FILE, Improvement
from dean_interp.study.measured_edit import load_run, measured_in
from dean_interp.study.results import RESULTS_FILE, Results


@dataclass(frozen=True)
class MeasuringRun:
    """Where the numbers on a card come from."""

    run: Path | None = None
    """Run folder that measured the edit, for its card. Unset: the folder of the edit file, where it is one."""


@dataclass(frozen=True)
class WriteCard:
    """Write the card of an edit or of a finished run: what changes, what was measured, its limits, how to undo it."""

    source: Positional[Path]
    """Edit file, or run folder of `improve` or `run`."""
    out: Path
    """Markdown file to write, such as README.md. Another text than a card is not replaced."""
    measured: OmitArgPrefixes[MeasuringRun] = field(default_factory=MeasuringRun)
    licence: str | None = None
    """Licence of the model, as hubs write it (apache-2.0). Unset: what the model's own card says, where it is at
    hand."""


def do_card(step: WriteCard) -> StepResult:
    """Write a card. Raises `InputError` for what its user can put right."""
    check_writable(step.out)
    if step.out.is_file() and f"{DIGEST_KEY}: " not in step.out.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{step.out} is there and is no card of an edit: give another --out, or move it away")
    if step.source.is_dir():
        card, model = _of_folder(step.source)
    else:
        card, model = _of_file(step.source, step.measured.run)
    write_text(step.out, card.markdown(licence=step.licence or licence_of_model(model), written=date.today()))
    record = {"out": str(step.out), "measured": bool(card.effects)}
    text = f"card: {step.out.resolve()}"
    return StepResult(record, text if card.effects else f"{text}\nit says that nothing was measured: see --run")


def checkpoint_card(edit: Edit, path: Path, run: Path | None, checkpoint: Path | None) -> str:
    """The text of the card that an edited checkpoint carries.

    Args:
        path: the edit's file.
        run: the run folder that measured it; None: the folder of the file, where it is one.
        checkpoint: the folder of the model that is edited, whose card may name a licence.
    """
    measured = _measured(edit, path, run)
    model = edit.facts["model"] if measured is None else measured.config.model.name
    licence = licence_of_model(str(checkpoint)) if checkpoint else None
    card = card_of_edit(edit, measured)
    return card.markdown(licence=licence or licence_of_model(model), written=date.today(), library="transformers")


def where_the_card_is(folder: Path) -> str:
    """A line that says so where the README.md of an edited checkpoint is the unedited model's; else nothing."""
    names = list(takewhile(lambda name: (folder / name).exists(), card_names()))
    if len(names) < 2:
        return ""
    return f"\nits card is {names[-1]}; README.md is that of the model before this edit"


def _of_folder(folder: Path) -> tuple[EditCard, str]:
    """The card of a finished run, and the name of its model."""
    run = load_run(folder)
    if isinstance(run, Improvement):
        return card_of_edit(load_edit(folder / EDIT_FILE), run), run.config.model.name
    return card_of_run(run), run.config.model.name


def _of_file(path: Path, folder: Path | None) -> tuple[EditCard, str]:
    """The card of an edit file, and the name of its model."""
    edit = load_edit(path)
    run = _measured(edit, path, folder)
    return card_of_edit(edit, run), edit.facts["model"] if run is None else run.config.model.name


def _measured(edit: Edit, path: Path, folder: Path | None) -> Improvement | Results | None:
    """What was measured of an edit: in the folder that is named, or in that of its file, where it is the edit's run."""
    if folder is not None:
        return measured_in(folder, edit)
    if not (path.parent / RESULTS_FILE).is_file():
        return None
    try:
        return measured_in(path.parent, edit)
    # A folder that nobody named may hold anything.
    except InputError:
        return None
