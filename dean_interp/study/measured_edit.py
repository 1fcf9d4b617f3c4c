"""Which finished run measured an edit: what the edit changes, and by how much, is what the run chose."""

from pathlib import Path

from dean_interp.editing.edit import Edit, load_edit
from dean_interp.editing.value_names import described, described_in_words
from dean_interp.editing.values import Multiply, Zero
from dean_interp.errors import InputError
from dean_interp.models.sites import Unit
from dean_interp.selection.gates import load_gates
from dean_interp.selection.selection import load_selection
from dean_interp.study.improvement import EDIT_FILE, GATES_FILE, Improvement, is_improvement, load_improvement
from dean_interp.study.results import RESULTS_FILE, Results, load_results


def load_run(folder: str | Path) -> Improvement | Results:
    """What a finished run of `improve` or `run` found. Raises `InputError` for any other folder."""
    folder = Path(folder)
    if is_improvement(folder):
        return load_improvement(folder)
    return load_results(folder / RESULTS_FILE)


def measured_in(folder: Path, edit: Edit) -> Improvement | Results:
    """What the run in a folder measured of an edit; of a study, the edit's kind of unit alone.

    Raises `InputError` where the folder holds no finished run, or the run measured another edit.
    """
    run = load_run(folder)
    if isinstance(run, Improvement):
        gates = load_gates(folder / GATES_FILE)
        of_run = load_edit(folder / EDIT_FILE)
        is_of_gates = _is(edit, gates.selection.fingerprint, described(Multiply(gates)))
        if is_of_gates and _bases(edit) == _bases(of_run):
            return run
    else:
        for results in run.units:
            if _is_silenced(edit, folder, results.unit):
                return run.only(results.unit)
    raise InputError(
        f"{folder} measured another edit than this one, whose units of {edit.facts['model']} are "
        f"{described_in_words(edit.facts['value'])}: give the run folder that its gates or its selection came from"
    )


def _is_silenced(edit: Edit, folder: Path, unit: Unit) -> bool:
    selection = load_selection(folder / f"selection.{unit}.safetensors")
    return _is(edit, selection.fingerprint, described(Zero()))


def _is(edit: Edit, selection: str, value: str) -> bool:
    return (edit.facts["selection"], edit.facts["value"]) == (selection, value)


def _bases(edit: Edit) -> set[str]:
    """What tells the tensors that the edit changes from those of another model."""
    return {change.base for change in edit.changes.values()}
