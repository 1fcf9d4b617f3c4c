"""`dean-interp edit`: make edit files, write them into checkpoints, and take them back."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from dean_interp.cli.cards import MeasuringRun, WriteCard, checkpoint_card, do_card, where_the_card_is
from dean_interp.cli.replacement import Replacement
from dean_interp.cli.step_result import StepResult
from dean_interp.editing.apply import create_edit
from dean_interp.editing.checkpoint import (
    apply_edit_to_checkpoint,
    export,
    refuse_existing,
    revert_edit_in_checkpoint,
    tensor_states,
)
from dean_interp.editing.edit import Edit, compare, joint_edit_state, load_edit, stack
from dean_interp.editing.value_names import described_in_words
from dean_interp.editing.values import Multiply
from dean_interp.errors import InputError
from dean_interp.evaluation.guard import held_super_weights, super_weights
from dean_interp.files import check_writable
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import parse_site
from dean_interp.selection.gates import is_gates_file, load_gates
from dean_interp.selection.selection import Selection, load_selection
from dean_interp.study.settings import ModelConfig

CHECKPOINT_STATES = {
    "base": "is the edit's base",
    "edited": "holds the edit",
    "both": "is left as it is by this edit",
    "other": "is neither the base of this edit nor its result",
}
"""What `edit verify` says of a checkpoint."""


@dataclass(frozen=True)
class EditedModel:
    """The model whose weights the edit changes."""

    model: str = ModelConfig.name
    """A name on the Hugging Face hub, a local folder, a .gguf file, or the demo model."""
    adapter: str | None = ModelConfig.adapter
    """A folder with an adapter that `peft` saved, which is merged into the weights of the model."""
    device: Literal["cpu", "cuda", "mps", "auto"] | None = ModelConfig.device
    """Where the model runs. Unset: CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = ModelConfig.dtype
    """Number format of the weights."""

    def load(self) -> HookedModel:
        """Load the model. Errors are those of `ModelConfig.load`."""
        return ModelConfig(name=self.model, adapter=self.adapter, device=self.device, dtype=self.dtype).load()


@dataclass(frozen=True)
class CreateEdit:
    """Make an edit file: what silencing selected units, or gates, change in the checkpoint. It can be taken back."""

    selection: Positional[Path]
    """Selection file (of neurons or of weights), or gates file."""
    out: Path
    """Edit file to write."""
    replacement: OmitArgPrefixes[Replacement] = field(default_factory=Replacement)
    model: OmitArgPrefixes[EditedModel] = field(default_factory=EditedModel)


@dataclass(frozen=True)
class ShowEdit:
    """Print what an edit changes and where it comes from."""

    edit: Positional[Path]
    """Edit file."""


@dataclass(frozen=True)
class ApplyEdit:
    """Write an edited copy of a checkpoint folder, file by file, without loading the model."""

    edit: Positional[Path]
    """Edit file."""
    checkpoint: Positional[Path]
    """Hugging Face checkpoint folder with safetensors files; nothing is written to it."""
    out: Path
    """New folder to write."""
    measured: OmitArgPrefixes[MeasuringRun] = field(default_factory=MeasuringRun)


@dataclass(frozen=True)
class RevertEdit:
    """Write a copy of an edited checkpoint without the edit: the same bytes as before it."""

    edit: Positional[Path]
    """Edit file."""
    checkpoint: Positional[Path]
    """Edited checkpoint folder; nothing is written to it."""
    out: Path
    """New folder to write."""


@dataclass(frozen=True)
class VerifyEdit:
    """Check whether a checkpoint is the edit's base or holds the edit. The exit code is 1 where it is neither."""

    edit: Positional[Path]
    """Edit file."""
    checkpoint: Positional[Path]
    """Checkpoint folder."""


@dataclass(frozen=True)
class DiffEdits:
    """Compare two edits, tensor by tensor."""

    first: Positional[Path]
    """First edit file."""
    second: Positional[Path]
    """Second edit file."""


@dataclass(frozen=True)
class StackEdits:
    """Make one edit of several with the same base."""

    edits: Positional[tuple[Path, ...]]
    """Edit files."""
    out: Path
    """Edit file to write."""


@dataclass(frozen=True)
class ExportEdit:
    """Write a model with the edit as a checkpoint folder, compare its logits in plain transformers, generate."""

    edit: Positional[Path]
    """Edit file."""
    out: Path
    """New folder to write."""
    measured: OmitArgPrefixes[MeasuringRun] = field(default_factory=MeasuringRun)
    model: OmitArgPrefixes[EditedModel] = field(default_factory=EditedModel)


@dataclass(frozen=True)
class EditStep:
    """Create, show, apply, verify, revert, diff, stack or export edit files, or write an edit's card."""

    action: OmitArgPrefixes[
        Annotated[CreateEdit, subcommand("create")]
        | Annotated[ShowEdit, subcommand("show")]
        | Annotated[ApplyEdit, subcommand("apply")]
        | Annotated[VerifyEdit, subcommand("verify")]
        | Annotated[RevertEdit, subcommand("revert")]
        | Annotated[DiffEdits, subcommand("diff")]
        | Annotated[StackEdits, subcommand("stack")]
        | Annotated[ExportEdit, subcommand("export")]
        | Annotated[WriteCard, subcommand("card")]
    ]


def do_edit(step: EditStep) -> StepResult:
    """Do one action of `edit`. Raises `InputError` for what its user can put right."""
    action = step.action
    match action:
        case CreateEdit():
            return _create(action)
        case ShowEdit():
            edit = load_edit(action.edit)
            return StepResult(_record(edit), _text(edit))
        case ApplyEdit():
            return _apply(action)
        case RevertEdit():
            return _revert(action)
        case VerifyEdit():
            return _verify(action)
        case DiffEdits():
            return _diff(action)
        case StackEdits():
            return _stack(action)
        case ExportEdit():
            return _export(action)
        case WriteCard():
            return do_card(action)


def _create(action: CreateEdit) -> StepResult:
    check_writable(action.out)
    if is_gates_file(action.selection):
        selection, value = _gating(action)
    else:
        selection, value = load_selection(action.selection), action.replacement.load()
    model = action.model.load()
    edit = create_edit(model, selection, value=value)
    held = [str(super_weight) for super_weight in held_super_weights(selection, super_weights(model))]
    edit.save(action.out)
    size = action.out.stat().st_size
    record = {"out": str(action.out), "bytes": size, "super_weights": held, **_record(edit)}
    warning = f"it changes super weights, which may break the model: {', '.join(held)}\n" if held else ""
    return StepResult(record, f"{_text(edit)}\n{warning}edit: {action.out.resolve()} ({size / 1000:.0f} kB)")


def _gating(action: CreateEdit) -> tuple[Selection, Multiply]:
    """The neurons that a gates file changes, and by how much."""
    if action.replacement != Replacement():
        raise InputError(f"{action.selection} holds gates, which say by how much: leave --value and --scores out")
    gates = load_gates(action.selection)
    return gates.selection, Multiply(gates)


def _apply(action: ApplyEdit) -> StepResult:
    edit = load_edit(action.edit)
    card = checkpoint_card(edit, action.edit, action.measured.run, action.checkpoint)
    apply_edit_to_checkpoint(action.checkpoint, edit, action.out, card=card)
    record = {"out": str(action.out), "numbers": len(edit)}
    return StepResult(record, f"edited checkpoint: {action.out.resolve()}{where_the_card_is(action.out)}")


def _revert(action: RevertEdit) -> StepResult:
    edit = load_edit(action.edit)
    revert_edit_in_checkpoint(action.checkpoint, edit, action.out)
    record = {"out": str(action.out), "numbers": len(edit)}
    return StepResult(record, f"checkpoint without the edit: {action.out.resolve()}")


def _verify(action: VerifyEdit) -> StepResult:
    states = tensor_states(action.checkpoint, load_edit(action.edit))
    state = joint_edit_state(list(states.values()))
    text = f"{action.checkpoint} {CHECKPOINT_STATES[state]}, in the {len(states)} tensors it changes"
    return StepResult({"state": state, "tensors": states}, text, holds=state != "other")


def _diff(action: DiffEdits) -> StepResult:
    by_tensor = compare(load_edit(action.first), load_edit(action.second))
    columns = ("alike", "different", "first_only", "second_only")
    total = {column: sum(counts[column] for counts in by_tensor.values()) for column in columns}
    lines = [_diff_line("", columns)]
    for name, counts in [*by_tensor.items(), ("in all", total)]:
        lines.append(_diff_line(name, [counts[column] for column in columns]))
    return StepResult({"tensors": by_tensor, "in_all": total}, "\n".join(lines))


def _diff_line(name: str, cells: tuple[str, ...] | list[int]) -> str:
    return f"{name:<44}" + "".join(f"{cell:>13}" for cell in cells)


def _stack(action: StackEdits) -> StepResult:
    if len(action.edits) < 2:
        raise InputError(f"a stack needs two edits or more, got {len(action.edits)}")
    check_writable(action.out)
    edit = reduce(stack, map(load_edit, action.edits))
    edit.save(action.out)
    return StepResult({"out": str(action.out), **_record(edit)}, f"{_text(edit)}\nedit: {action.out.resolve()}")


def _export(action: ExportEdit) -> StepResult:
    edit = load_edit(action.edit)
    refuse_existing(action.out)
    card = checkpoint_card(edit, action.edit, action.measured.run, Path(action.model.model))
    check = export(action.model.load(), edit, action.out, card=card)
    text = (
        f"checkpoint: {action.out.resolve()}\n"
        f"in plain transformers its logits differ from the edit's in memory by at most "
        f"{check['largest_difference']:.2g} (largest logit {check['largest_logit']:.3g}); it answers:\n"
        f"{check['answer']}"
    )
    return StepResult({"out": str(action.out), **check}, text)


def _record(edit: Edit) -> dict[str, Any]:
    tensors = {}
    for name, change in edit.changes.items():
        tensors[name] = {"numbers": len(change), "shape": list(change.shape), "base": change.base}
    facts = {name: fact for name, fact in edit.facts.items() if name != "prompt_hashes"}
    return {
        "numbers": len(edit),
        "digest": edit.digest,
        **facts,
        "tensors": tensors,
        "n_scored_prompts": len(edit.facts["prompt_hashes"]),
    }


def _text(edit: Edit) -> str:
    facts = edit.facts
    return (
        f"{edit!r}\n{_units_text(facts['units'])} of {facts['architecture']}, {described_in_words(facts['value'])}; "
        f"digest {edit.digest[:16]}"
    )


def _units_text(units_per_site: Mapping[str, int]) -> str:
    counts: Counter[str] = Counter()
    for site, n in units_per_site.items():
        counts[f"{parse_site(site).unit}s"] += n
    return " and ".join(f"{counts[kind]} {kind}" for kind in ("neurons", "weights") if counts[kind])
