"""`dean-interp edit`: the arguments of each action, and what it does."""

from dataclasses import dataclass, field
from functools import reduce, singledispatch
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from dean_interp.cli.model import Model
from dean_interp.editing.apply import create_edit
from dean_interp.editing.checkpoint import apply_to_checkpoint, export, revert_checkpoint, tensor_states
from dean_interp.editing.edit import Edit, compare, joint_edit_state, load_edit, refuse_state, stack
from dean_interp.editing.values import Mean, Scale, Zero
from dean_interp.errors import InputError
from dean_interp.evaluation.guard import held_super_weights, super_weights
from dean_interp.files import check_writable
from dean_interp.scoring.scores import load_scores
from dean_interp.selection.selection import load_selection


@dataclass(frozen=True)
class CreateEdit:
    """Make an edit file: what an ablation would change in the checkpoint, a small file that can be taken back."""

    selection: Positional[Path]
    """The selection file: neurons or weights."""
    out: Path
    """The edit file to write."""
    alpha: float = 0.0
    """What the units are multiplied by: 0 silences."""
    mean: Path | None = None
    """A score file: put neurons' means over its examples in place, where the model has biases to carry them."""
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class ShowEdit:
    """Say what an edit changes and where it comes from."""

    edit: Positional[Path]
    """The edit file."""


@dataclass(frozen=True)
class ApplyEdit:
    """Write an edited copy of a checkpoint folder, file by file, without loading the model."""

    edit: Positional[Path]
    """The edit file."""
    checkpoint: Positional[Path]
    """A Hugging Face checkpoint folder with safetensors files; it is read only."""
    out: Path
    """The new folder."""


@dataclass(frozen=True)
class RevertEdit:
    """Write a copy of an edited checkpoint without the edit: the same bytes as before it."""

    edit: Positional[Path]
    """The edit file."""
    checkpoint: Positional[Path]
    """The edited checkpoint folder; it is read only."""
    out: Path
    """The new folder."""


@dataclass(frozen=True)
class VerifyEdit:
    """Say whether a checkpoint is the edit's base or holds the edit; neither is an error."""

    edit: Positional[Path]
    """The edit file."""
    checkpoint: Positional[Path]
    """The checkpoint folder."""


@dataclass(frozen=True)
class DiffEdits:
    """Compare two edits, tensor by tensor."""

    first: Positional[Path]
    """An edit file."""
    second: Positional[Path]
    """Another."""


@dataclass(frozen=True)
class StackEdits:
    """Make one edit of several of the same base."""

    edits: Positional[tuple[Path, ...]]
    """The edit files."""
    out: Path
    """The edit file to write."""


@dataclass(frozen=True)
class ExportEdit:
    """Write a model with the edit as a checkpoint folder; load it in plain transformers, compare logits, generate."""

    edit: Positional[Path]
    """The edit file."""
    out: Path
    """The new folder."""
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class EditStep:
    """Edits as files: create, show, apply, verify, revert, diff, stack, export."""

    action: OmitArgPrefixes[
        Annotated[CreateEdit, subcommand("create")]
        | Annotated[ShowEdit, subcommand("show")]
        | Annotated[ApplyEdit, subcommand("apply")]
        | Annotated[VerifyEdit, subcommand("verify")]
        | Annotated[RevertEdit, subcommand("revert")]
        | Annotated[DiffEdits, subcommand("diff")]
        | Annotated[StackEdits, subcommand("stack")]
        | Annotated[ExportEdit, subcommand("export")]
    ]


@singledispatch
def edit_action(action: object) -> tuple[dict[str, Any], str]:
    """A record and a text for its user. Raises `InputError` for what can be put right."""
    raise TypeError(f"no action of `edit`: {action!r}")


@edit_action.register
def _(action: CreateEdit) -> tuple[dict[str, Any], str]:
    check_writable(action.out)
    selection = load_selection(action.selection)
    if action.mean is not None and action.alpha:
        raise InputError(f"give --alpha or --mean, not both; got --alpha {action.alpha} and --mean {action.mean}")
    scores = load_scores(action.mean) if action.mean else None
    value = Mean(scores) if scores else Scale(action.alpha) if action.alpha else Zero()
    model = action.model.loaded()
    edit = create_edit(model, selection, value=value)
    held = [str(one) for one in held_super_weights(selection, super_weights(model))]
    edit.save(action.out)
    size = action.out.stat().st_size
    record = {"out": str(action.out), "bytes": size, "super_weights": held, **_record(edit)}
    warning = f"it changes super weights, which may break the model: {', '.join(held)}\n" if held else ""
    return record, f"{_text(edit)}\n{warning}edit: {action.out.resolve()} ({size / 1000:.0f} kB)"


@edit_action.register
def _(action: ShowEdit) -> tuple[dict[str, Any], str]:
    edit = load_edit(action.edit)
    return _record(edit), _text(edit)


@edit_action.register
def _(action: ApplyEdit) -> tuple[dict[str, Any], str]:
    edit = load_edit(action.edit)
    apply_to_checkpoint(edit, action.checkpoint, action.out)
    return {"out": str(action.out), "numbers": len(edit)}, f"edited checkpoint: {action.out.resolve()}"


@edit_action.register
def _(action: RevertEdit) -> tuple[dict[str, Any], str]:
    edit = load_edit(action.edit)
    revert_checkpoint(edit, action.checkpoint, action.out)
    return {"out": str(action.out), "numbers": len(edit)}, f"checkpoint without the edit: {action.out.resolve()}"


@edit_action.register
def _(action: VerifyEdit) -> tuple[dict[str, Any], str]:
    edit = load_edit(action.edit)
    states = tensor_states(action.checkpoint, edit)
    state = joint_edit_state(list(states.values()))
    if state == "other":
        refuse_state(state, "base", edit, str(action.checkpoint))
    said = {"base": "is the edit's base", "edited": "holds the edit", "both": "is left as it is by this edit"}[state]
    return {"state": state, "tensors": states}, f"{action.checkpoint} {said}, in the {len(states)} tensors it changes"


@edit_action.register
def _(action: DiffEdits) -> tuple[dict[str, Any], str]:
    found = compare(load_edit(action.first), load_edit(action.second))
    columns = ("alike", "different", "first_only", "second_only")
    lines = [f"{'':<44}" + "".join(f"{column:>13}" for column in columns)]
    total = {column: sum(row[column] for row in found.values()) for column in columns}
    lines += [f"{name:<44}" + "".join(f"{row[column]:>13}" for column in columns)
              for name, row in [*found.items(), ("in all", total)]]  # fmt: skip
    return {"tensors": found, "in_all": total}, "\n".join(lines)


@edit_action.register
def _(action: StackEdits) -> tuple[dict[str, Any], str]:
    if len(action.edits) < 2:
        raise InputError(f"a stack needs two edits or more, got {len(action.edits)}")
    check_writable(action.out)
    edit = reduce(stack, map(load_edit, action.edits))
    edit.save(action.out)
    return {"out": str(action.out), **_record(edit)}, f"{_text(edit)}\nedit: {action.out.resolve()}"


@edit_action.register
def _(action: ExportEdit) -> tuple[dict[str, Any], str]:
    edit = load_edit(action.edit)
    said = export(edit, action.model.loaded(), action.out)
    text = (f"checkpoint: {action.out.resolve()}\nin plain transformers its logits differ from the hooked model's "
            f"by at most {said['largest_difference']:.2g} (largest logit {said['largest_logit']:.3g}); it answers:\n"
            f"{said['answer']}")  # fmt: skip
    return {"out": str(action.out), **said}, text


def _record(edit: Edit) -> dict[str, Any]:
    tensors = {name: {"numbers": len(change.indices), "shape": list(change.shape), "base": change.base}
               for name, change in edit.changes.items()}  # fmt: skip
    facts = {name: fact for name, fact in edit.facts.items() if name != "prompt_hashes"}
    return {"numbers": len(edit), "digest": edit.digest, **facts, "tensors": tensors,
            "n_scored_prompts": len(edit.facts["prompt_hashes"])}  # fmt: skip


def _text(edit: Edit) -> str:
    facts = edit.facts
    kinds = {kind: sum(n for site, n in facts["units"].items() if (site.endswith("neurons")) == (kind == "neurons"))
             for kind in ("neurons", "weights")}  # fmt: skip
    units = " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    return (
        f"{edit!r}\n{units} of {facts['architecture']}, {facts['value']}; selected with "
        f"{len(facts['prompt_hashes'])} prompts; digest {edit.digest[:16]}"
    )
